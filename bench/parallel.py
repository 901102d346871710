"""One model over several GPUs: whether it is exact, and how fast it is beside its limits and beside one GPU.

    python -m bench.parallel [--ranks 2] [--parts reduce exact many one large] [--minutes 9] [--save]

- `reduce`: microseconds of an all-reduce of what one layer sends, many to a CUDA graph, by NCCL, and by our kernel if
  the data is not too large.
- `exact`: tiny models in float32, saved and sharded, give the tokens of one process: greedy, sampled and of beams.
- `many` and `one`: an 8B shape over all ranks and on one GPU: one request alone, 256 on a prefix, prompts that share
  nothing.
- `large`: a 70B shape over all ranks, 64 sequences that share nothing.

Weights are random (`load_format="dummy"`), in bfloat16 on a GPU. Each part runs in a process of its own and ends when
its share of the time is over, which a line says. A workload runs once untimed, so that what it needs is compiled and
captured; engines are not warmed up otherwise.

The limit of a decoding step: weights and keys, divided by the ranks, read once, and two all-reduces a layer as they
were measured alone. NVLink multicast is off, unless the environment says otherwise.

Bias. One run a figure: differences under 10 % are noise. Without a GPU all sizes are toys, and there is no limit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from bench.compare import run
from bench.contenders import Options, Radixgen, random_engine, saved_config
from bench.device import Timer
from bench.limits import StepLimit
from bench.report import Report, time_each
from bench.shapes import SHAPES, Shape
from bench.workloads import FULL, TOY, Ask, Scale, Workload, Workloads
from radixgen import BeamSearchParams, Engine, SamplingParams
from radixgen.core.settings import rank_environment
from radixgen.model.rank_all_reduce import RANK_ALL_REDUCE

PARTS = {"reduce": 50, "exact": 180, "many": 110, "one": 90, "large": 110}
"""Seconds that each may take, in `_MINUTES` for all."""
_MINUTES = 9.0
_CALLS = 64
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
}
"""Of the tiny models"""
_SHARED: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.alone:
        return _run_alone(options)
    begun, report = time.monotonic(), Report("parallel")
    found: dict[str, dict[str, Any]] = {}
    for part in options.parts:
        left = 60 * options.minutes - (time.monotonic() - begun)
        found[part] = (
            _measure(part, options.ranks, min(PARTS[part] * options.minutes / _MINUTES, left))
            if left > 0
            else {"failed": "not begun"}
        )
        for line in summary(part, found, options.ranks):
            report.say(line)
    report.keep(ranks=options.ranks, **found)
    exact = not found.get("exact", {}).get("different")
    return report.finish(check=False, save=options.save) or int(
        not exact or any("failed" in one for one in found.values())
    )


def summary(part: str, found: dict[str, dict[str, Any]], ranks: int) -> list[str]:
    """Lines about one part, beside those that were measured before it."""
    figures = found[part]
    lines = [f"{part}: {figures['failed']}"] if "failed" in figures else []
    lines += [f"all-reduce of {name}: {us:.1f} µs" for name, us in figures.get("us", {}).items()]
    if "equal" in figures:
        lines.append(f"exact: {figures['equal']} of {figures['equal'] + len(figures['different'])} answers equal")
        lines += [f"different: {one}" for one in figures["different"]]
    for name, one in figures.get("workloads", {}).items():
        reduces = found.get("reduce", {}).get("us", {}).get(f"{one['rows']} x {figures['hidden']}")
        limit = one.get("limit_ms")
        line = f"{part}, {name}: {one['seconds']:.3f} s, {one['ms_a_step']:.3f} ms a step"
        if limit and part != "one" and reduces is not None:
            each = 2 * figures["layers"] * reduces / 1e3
            line += f"; limit {limit + each:.3f} = {limit:.3f} read + {each:.3f} of {2 * figures['layers']} all-reduces"
        elif limit:
            line += f"; limit {limit:.3f} read"
        lines.append(line)
    if part in ("one", "many"):
        one_gpu, all_gpus = (found.get(which, {}).get("workloads", {}) for which in ("one", "many"))
        for name in (name for name in one_gpu if name in all_gpus):
            faster = one_gpu[name]["seconds"] / all_gpus[name]["seconds"]
            lines.append(f"{ranks} ranks over one, {name}: {faster:.2f}×")
    return lines


def _measure(part: str, ranks: int, seconds: float) -> dict[str, Any]:
    """The last that one part said as JSON, in a process of its own; for `reduce`, in one a rank."""
    command = [sys.executable, "-m", "bench.parallel", "--ranks", str(ranks), "--alone", part]
    with tempfile.TemporaryDirectory() as folder:
        others = []
        if part == "reduce":
            command += ["--store", str(Path(folder) / "store")]
            others += [
                subprocess.Popen([*command, "--rank", str(rank)], env=rank_environment(rank), stdout=subprocess.DEVNULL)
                for rank in range(1, ranks)
            ]
        failed = ""
        try:
            done = subprocess.run(
                command, env=rank_environment(0), stdout=subprocess.PIPE, timeout=seconds, check=False
            )
            output = done.stdout
            failed = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output, failed = error.stdout or b"", f"did not finish within {seconds:.0f} s"
        finally:
            for other in others:
                other.kill()
                other.wait()
    lines = [line for line in output.decode().splitlines() if line.startswith("{")]
    figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return figures | {"failed": failed} if failed else figures


def _run_alone(options: argparse.Namespace) -> int:
    """A JSON line of all figures so far after each of them."""
    if options.alone == "reduce":
        measured = _reduce(options.rank, options.ranks, options.store)
    elif options.alone == "exact":
        measured = _exact(options.ranks)
    else:
        measured = _time_engine(options.alone, options.ranks)
    for figures in measured:
        print(json.dumps(figures), flush=True)
    return 0


# -- parts ----------------------------------------------------------------------------------------------------


def _reduce(rank: int, ranks: int, store: str) -> Iterator[dict[str, Any]]:
    """Microseconds of one all-reduce, by its size."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(store, ranks),  # type: ignore[attr-defined]
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=_MINUTES),
        device_id=device if cuda else None,
    )
    if cuda:
        RANK_ALL_REDUCE.connect(device)
    found = {}
    for rows, hidden in ((1, 4096), (64, 8192), (256, 4096), (8192, 4096)) if cuda else ((1, 64),):
        data = torch.zeros((rows, hidden), dtype=torch.bfloat16 if cuda else torch.float32, device=device)
        if not cuda or RANK_ALL_REDUCE.supports(data.dtype, data.nbytes):
            found[f"{rows} x {hidden}"] = _reduce_us(data, RANK_ALL_REDUCE.all_reduce)
        found[f"{rows} x {hidden} by {dist.get_backend()}"] = _reduce_us(data, dist.all_reduce)
        yield {"us": found}
    dist.destroy_process_group()


def _reduce_us(data: torch.Tensor, reduce: Callable[[torch.Tensor], object]) -> float:
    if data.device.type != "cuda":
        return 1e6 * min(time_each(lambda: reduce(data), times=3))
    reduce(data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            reduce(data)
    torch.cuda.synchronize()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return 1e6 * float(torch.tensor(time_each(replay, times=20, warm_up=5)).median()) / _CALLS


def _exact(ranks: int) -> Iterator[dict[str, Any]]:
    """How many answers are the same over all ranks as in one process, and which are not."""
    equal, different = 0, []
    for name, sizes in _SIZES.items():
        heads = {"num_attention_heads": 2 * ranks, "num_key_value_heads": ranks}
        config = AutoConfig.for_model(name, **_SHARED | heads | sizes)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            one, many = (_answers(folder, size) for size in (1, ranks))
        for label, tokens in one.items():
            if many[label] == tokens:
                equal += 1
            else:
                different.append(f"{name}, {label}: {tokens} became {many[label]}")
        yield {"equal": equal, "different": different}


def _answers(folder: str, ranks: int) -> dict[str, list[list[int]]]:
    """By what was asked: captured, not compiled, through a pool that is always full."""
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 160, (count,), generator=drawn).tolist() for count in (24, 33, 9, 40)]
    prompts.append(prompts[0] + prompts[2])
    found: dict[str, list[list[int]]] = {}
    with Engine(
        folder,
        tensor_parallel_size=ranks,
        kv_tokens=160,
        max_step_tokens=32,
        torch_compile=False,
        warm_up=False,
    ) as engine:
        greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        for index, output in enumerate(engine.generate(prompts, greedy)):
            found[f"greedy {index}"] = [output.outputs[0].token_ids]
        sampled = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=16, ignore_eos=True)
        found["sampled"] = [one.token_ids for one in engine.generate(prompts[1], sampled)[0].outputs]
        beams = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
        found["beams"] = [one.token_ids for one in engine.beam_search(prompts[0], beams)[0].outputs]
    return found


def _time_engine(part: str, ranks: int) -> Iterator[dict[str, Any]]:
    cuda = torch.cuda.is_available()
    shape = SHAPES[("70B" if part == "large" else "8B") if cuda else "toy"]
    scale = replace(FULL, documents=16) if cuda else TOY
    options = Options(
        shape,
        kv_tokens=(60_000 if part == "large" else 400_000) if cuda else 20_000,
        max_seqs=1024,
        max_model_len=32_768 if cuda else 512,
        step_tokens=None,
        ranks=1 if part == "one" else ranks,
        warm_up=False,
    )
    limit = StepLimit(shape, Timer(torch.device("cuda")).ceilings()) if cuda else None
    with tempfile.TemporaryDirectory() as folder:
        engine = Radixgen(random_engine(options, saved_config(options, Path(folder))))
    workloads: dict[str, Any] = {}
    for name in ("wide",) if part == "large" else ("latency", "prefix", "prefill"):
        workloads[name] = _time(engine, name, scale, shape, limit, options.ranks)
        yield {**engine.about, "layers": shape.layers, "hidden": shape.hidden, "workloads": workloads}
    engine.close()


class _Workloads(Workloads):
    """And one more."""

    def wide(self) -> Workload:
        """64 requests that share nothing."""
        rows, length = (64, 256) if self.scale.new >= FULL.new else (4, 8)
        yield Ask([self.tokens(row, length) for row in range(rows)], self.scale.new)


def _time(
    engine: Radixgen, name: str, scale: Scale, shape: Shape, limit: StepLimit | None, ranks: int
) -> dict[str, Any]:
    """Seconds in all, and milliseconds of each step behind the first tokens, beside the least for the mean one."""
    timed, before = (_Workloads(scale, shape.vocab, seed) for seed in (0, 1))
    run(engine, name, before, None)
    whole = run(engine, name, timed, None)["seconds"]
    (ask,) = [ask for ask in timed.start(name) if ask.timed] if name != "prefix" else [_last(timed.start(name))]
    if ask.new == 1:
        return {"seconds": whole, "ms_a_step": 1e3 * whole, "rows": 0}
    first = run(engine, name, timed, None, first=True)["seconds"]
    rows, length, later = len(ask.prompts), len(ask.prompts[0]), ask.new / 2
    shared = scale.prefix if name == "prefix" else 0
    keys, pairs = shared + rows * (length - shared + later), rows * (length + later)
    figures = {"seconds": whole, "ms_a_step": 1e3 * (whole - first) / (ask.new - 1), "rows": rows}
    if limit is None:
        return figures
    return {**figures, "limit_ms": 1e3 * limit.step(rows, rows, int(keys), pairs) / ranks}


def _last(workload: Workload) -> Ask:
    """The last ask of a workload that does not look at its answers."""
    *_, last = workload
    return last


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, or processes where there are none")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="all parts together take no longer")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    parser.add_argument("--alone", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
