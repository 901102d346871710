"""Whole engines on models of true shapes with random weights: tokens per second against the step's limit.

    python -m bench.engine [--workloads W2 W3 W4 W10] [--quick] [--check] [--save]

- W2: one prefix, a short question of its own for each sequence, decoding alone is timed (Hydragen, section 4.2).
- W3: a root of 2,400 tokens, 8 problems of 300, 128 sampled candidates each.
- W4: questions of 30 tokens on one text of 19,947, 10 new tokens, the text cached before.
- W10: 128 requests of programs: A system prompts in four levels, B few-shot branches, C conversations of four turns, D
  documents with questions; with transformers' continuous batching.

The limit of a decoding step: the weights read once (or multiplied, whichever is longer), and in each layer every
distinct key read once. Contenders: radixgen; the same stored tree read path by path (`plan="unshared"`); one common
prefix only (`plan="prefix"`, W3); private copies (`share=False`) at the largest batch that fits. What does not fit
is printed as `n/a (GB)`. With `--quick`, W2 and W10 run radixgen alone. Ceilings are measured in the same run. Each
workload ends with a JSON line of its own, kept as `engine_W2.json` and so on.

Bias. Weights are random, so text means nothing and sampled candidates part at once. End-of-sequence is ignored.
W3 decodes 64 tokens rather than 512, unshared contenders 8. Without a GPU a toy model runs each workload at toy size.
"""

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from bench.attention import roofline_us
from bench.device import Ceilings, Timer
from bench.limits import StepLimit
from bench.report import Report, benchmark_options
from bench.shapes import SHAPES, Shape, build
from bench.trees import Tree, levels, shared_prefix
from radixgen import Engine, SamplingParams
from radixgen.core import Limits
from radixgen.scheduler.planner import PlanMode

Prompt = list[int]
MARGIN = 5 << 30
"""Bytes left for activations, logits and captured graphs."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the workloads: as published, or toy."""

    prefixes: tuple[int, ...]
    batch: int
    new_tokens: int
    root: int
    problems: int
    candidates: int
    text: int
    questions: tuple[int, ...]
    program: int
    """Tokens of each part of a program, in hundredths of the published ones"""
    requests: int


FULL = Scale((1024, 16_256), 256, 128, 2400, 8, 128, 19_947, (64, 256, 1024), 100, 128)
TOY = Scale((16, 32), 4, 3, 24, 2, 2, 40, (3,), 2, 4)


@dataclass(frozen=True, slots=True)
class Bench:
    """A model on a device, and what it is measured against."""

    network: PreTrainedModel
    shape: Shape
    ceilings: Ceilings | None
    scale: Scale
    report: Report
    quick: bool = False
    """Without contenders"""

    def engine(self, kv_tokens: int, *, plan: PlanMode = "auto", share: bool = True) -> Engine:
        cuda = self.network.device.type == "cuda"
        limits = Limits(max_num_seqs=2048)
        return Engine(self.network, kv_tokens=kv_tokens, plan=plan, share=share, limits=limits, torch_compile=cuda)

    def missing_gb(self, kv_tokens: int) -> float:
        """How much the pool would take, in GB, where it does not fit; else 0."""
        if self.ceilings is None:
            return 0.0
        gc.collect()
        torch.cuda.empty_cache()
        size = kv_tokens * self.kv_bytes
        return size / 1e9 if size + MARGIN > torch.cuda.mem_get_info()[0] else 0.0

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim

    def limit_us(self, tree: Tree) -> float:
        """Of a step that decodes one token for each row of `tree`."""
        if self.ceilings is None:
            return 0.0
        attention = roofline_us(tree, (self.shape.q_heads, self.shape.kv_heads), self.ceilings)
        rows = len(tree[2])
        return 1e6 * StepLimit(self.shape, self.ceilings).weights(rows, rows) + self.shape.layers * attention

    def tokens(self, seed: int, count: int) -> Prompt:
        drawn: Prompt = np.random.default_rng(seed).integers(3, self.shape.vocab, count).tolist()
        return drawn


def greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


def decode_seconds(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[float]:
    """Seconds of every step in which all sequences draw a token, of all requests' whole life, from the third on: the
    first ones compile and capture.
    """
    for prompt in prompts:
        engine.submit(prompt, params, output_kind="final")
    total, before, seconds = len(prompts) * params.n, 0, []
    while engine.has_unfinished:
        begin = time.perf_counter()
        engine.step()
        taken = time.perf_counter() - begin
        after = engine.stats().generated_tokens
        if after - before == total:
            seconds.append(taken)
        before = after
    return seconds[2:] or seconds


def tell(bench: Bench, key: str, label: str, seconds: Sequence[float], rows: int, tree: Tree) -> float:
    """Print and keep one contender's median step. Returns it, in seconds."""
    median, limit = float(np.median(seconds)), bench.limit_us(tree) / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.ceilings else 0.0
    bench.report.say(
        f"{label:<52} {rows / median:9,.0f} tokens/s, {1e3 * median:8.2f} ms a step, limit {1e3 * limit:7.2f} "
        f"({100 * limit / median:3.0f} %), {peak:.1f} GB at the most"
    )
    bench.report.keep(**{key: {"ms": 1e3 * median, "limit_ms": 1e3 * limit, "rows": rows, "gb": peak}})
    return median


def w2(bench: Bench) -> None:
    scale, batch = bench.scale, bench.scale.batch
    tails = [bench.tokens(1000 + row, 4) for row in range(batch)]
    medians: dict[int, float] = {}
    for prefix in scale.prefixes:
        prompts = [bench.tokens(0, prefix) + tail for tail in tails]
        grown = shared_prefix(batch, prefix, 4 + scale.new_tokens // 2)
        contenders: list[tuple[str, PlanMode, int]] = [("radixgen", "auto", scale.new_tokens)]
        if not bench.quick:
            contenders.append(("read unshared", "unshared", 8))
        for label, plan, new in contenders:
            pool = prefix + batch * (scale.new_tokens + 24)
            if missing := bench.missing_gb(pool):
                bench.report.say(f"W2 {prefix} x {batch}, {label}: n/a ({missing:.0f} GB)")
                continue
            with bench.engine(pool, plan=plan) as engine:
                seconds = decode_seconds(engine, prompts, greedy(new))
            median = tell(bench, f"W2_{prefix}_{plan}", f"W2 {prefix} x {batch}, {label}", seconds, batch, grown)
            if plan == "auto":
                medians[prefix] = median
            else:
                bench.report.figure(
                    f"W2_{prefix}_gain", median / medians[prefix],
                    f"W2 {prefix}: {median / medians[prefix]:.1f} times as fast as reading unshared",
                    at_least=30.0 if prefix == FULL.prefixes[-1] else None,
                )  # fmt: skip
        if not bench.quick:
            private(bench, prefix, tails)
    judge(bench, medians)


def private(bench: Bench, prefix: int, tails: Sequence[Prompt]) -> None:
    """Copies of their own for as many sequences as fit, and long enough that all of them decode together."""
    new = 64
    each = prefix + new + 24
    fits = len(tails)
    while fits > 1 and bench.missing_gb(fits * each):
        fits -= 1
    prompts = [bench.tokens(0, prefix) + tail for tail in tails[:fits]]
    with bench.engine(fits * each, share=False) as engine:
        seconds = decode_seconds(engine, prompts, greedy(new))
    unshared: Tree = ([-1] * fits, [prefix + new // 2] * fits, list(range(fits)))
    tell(bench, f"W2_{prefix}_private", f"W2 {prefix} x {fits}, private copies", seconds, fits, unshared)


def judge(bench: Bench, medians: dict[int, float]) -> None:
    """The bounds on W2, where it ran at full size."""
    if bench.ceilings is None or FULL.prefixes[-1] not in medians:
        return
    short, long = FULL.prefixes
    rate = bench.scale.batch / medians[long]
    trees = {prefix: shared_prefix(bench.scale.batch, prefix, 68) for prefix in (short, long)}
    limits = {prefix: bench.limit_us(tree) / 1e6 for prefix, tree in trees.items()}
    report = bench.report
    report.figure("W2_rate", rate, f"W2 {long}: {rate:,.0f} tokens/s", at_least=8800)
    share = limits[long] / medians[long]
    report.figure("W2_share", share, f"W2 {long}: {100 * share:.0f} % of the limit", at_least=0.65)
    extra = (medians[long] - medians[short]) / (limits[long] - limits[short])
    report.figure("W2_extra", extra, f"W2: the longer prefix costs {extra:.2f} x what the limit says", at_most=1.1)


def w3(bench: Bench) -> None:
    scale = bench.scale
    root = bench.tokens(0, scale.root)
    prompts = [root + bench.tokens(1 + problem, scale.root // 8) for problem in range(scale.problems)]
    rows = scale.problems * scale.candidates
    new = min(64, scale.new_tokens)
    grown = levels(f"1,{scale.problems},{rows} / {scale.root},{scale.root // 8},{max(new // 2, 1)}")
    for label, plan, count in (("two levels", "auto", new), ("one level", "prefix", new), ("none", "unshared", 8)):
        pool = 2 * scale.root + rows * (count + 64)
        with bench.engine(pool, plan=plan) as engine:
            params = SamplingParams(n=scale.candidates, temperature=1.0, seed=1, max_tokens=count, ignore_eos=True)
            seconds = decode_seconds(engine, prompts, params)
        tell(bench, f"W3_{plan}", f"W3 {scale.problems} x {scale.candidates}, {label}", seconds, rows, grown)


def w4(bench: Bench) -> None:
    text = bench.tokens(0, bench.scale.text)
    for count in bench.scale.questions:
        prompts = [text + bench.tokens(1 + question, 30) for question in range(count)]
        with bench.engine(bench.scale.text + count * 64 + 4096) as engine:
            engine.generate([text], greedy(1))
            for _ in range(2):  # the first compiles and captures
                engine.reset_prefix_cache()
                engine.generate([text], greedy(1))
                begin = time.perf_counter()
                engine.generate(prompts, greedy(min(10, bench.scale.new_tokens)))
                seconds = time.perf_counter() - begin
        bench.report.say(f"W4 {count:5d} questions on {bench.scale.text:,} cached tokens: {seconds:.2f} s")
        bench.report.keep(**{f"W4_{count}_seconds": seconds})


def programs(bench: Bench) -> dict[str, list[Prompt]]:
    """The bursts of W10: A, B and D."""
    scale, count = bench.scale, bench.scale.requests
    size = {tokens: max(1, tokens * scale.program // 100) for tokens in (459, 38, 584, 2112, 100, 2000, 64)}
    own = [bench.tokens(10_000 + request, size[64]) for request in range(count)]

    def part(seed: int, tokens: int) -> Prompt:
        return bench.tokens(seed, size[tokens])

    return {
        "A": [
            part(0, 459) + part(10 + r % 2, 38) + part(20 + r % 8, 584) + part(40 + r % 32, 2112) + own[r]
            for r in range(count)
        ],
        "B": [
            [token for shot in range(20) for token in part(100 * (r % 8) + shot, 100)] + own[r] for r in range(count)
        ],
        "D": [part(r % 16, 2000) + own[r] for r in range(count)],
    }


def w10(bench: Bench) -> None:
    new = 2 * bench.scale.new_tokens
    bursts = programs(bench)
    most = max(len({tuple(p[: i + 1]) for p in b for i in range(0, len(p), 64)}) * 64 for b in bursts.values())
    with bench.engine(most + bench.scale.requests * (new + 64) * 2) as engine:
        engine.generate([b[0] for b in bursts.values()], greedy(4))
        for name, prompts in bursts.items():
            engine.reset_prefix_cache()
            tell_burst(bench, name, "radixgen", len(prompts) * new, burst_seconds(engine, prompts, new))
        engine.reset_prefix_cache()
        tell_burst(bench, "C", "radixgen", bench.scale.requests * new, chat_seconds(bench, engine, new))
    if bench.ceilings is not None and not bench.quick:
        for name, prompts in bursts.items():
            continuous_batching(bench, name, prompts, new)


def burst_seconds(engine: Engine, prompts: Sequence[Prompt], new: int) -> float:
    begin = time.perf_counter()
    engine.generate(prompts, greedy(new))
    return time.perf_counter() - begin


def chat_seconds(bench: Bench, engine: Engine, new: int) -> float:
    """Conversations of four turns, each turn resending everything before it."""
    talks = [bench.tokens(50_000 + chat, 32) for chat in range(max(bench.scale.requests // 4, 1))]
    begin = time.perf_counter()
    for turn in range(4):
        answers = engine.generate(talks, greedy(new))
        talks = [
            talk + answer.outputs[0].token_ids + bench.tokens(60_000 + 100 * chat + turn, 16)
            for chat, (talk, answer) in enumerate(zip(talks, answers, strict=True))
        ]
    return time.perf_counter() - begin


def continuous_batching(bench: Bench, name: str, prompts: Sequence[Prompt], new: int) -> None:
    """What transformers itself does on the same weights, with half of what memory is left for its cache: it needs the
    other half for activations.
    """
    former = bench.network.config._attn_implementation
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    gc.collect()
    torch.cuda.empty_cache()
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        memory = ContinuousBatchingConfig(max_memory_percent=0.5)
        bench.network.set_attn_implementation("paged|sdpa")
        begin = time.perf_counter()
        answers = bench.network.generate_batch(  # type: ignore[operator]
            inputs=list(prompts), generation_config=config, continuous_batching_config=memory
        )
        seconds = time.perf_counter() - begin
        generated = sum(len(answer.generated_tokens) for answer in answers.values())
        if generated != len(prompts) * new:
            raise RuntimeError(f"{generated} of {len(prompts) * new} tokens were generated")
        tell_burst(bench, name, "transformers", generated, seconds)
    except Exception as error:
        bench.report.say(f"W10 {name}, transformers: did not run: {error!r:.200}")
        bench.report.keep(**{f"W10_{name}_transformers": repr(error)})
    finally:
        bench.network.set_attn_implementation(former)


def tell_burst(bench: Bench, name: str, contender: str, generated: int, seconds: float) -> None:
    bench.report.say(f"W10 {name}, {contender:<14} {seconds:8.2f} s, {generated / seconds:9,.0f} tokens/s")
    bench.report.keep(**{f"W10_{name}_{contender}": {"seconds": seconds, "generated": generated}})


WORKLOADS = {"W2": (w2, "13B"), "W3": (w3, "8B"), "W4": (w4, "6B"), "W10": (w10, "8B")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--quick", action="store_true", help="radixgen alone")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = Timer(device).ceilings() if device.type == "cuda" else None
    network, built, missed = None, "", 0
    for name in options.workloads:
        report = Report(f"engine_{name}")
        if ceilings:
            report.say(f"limit: {torch.cuda.get_device_name()} {ceilings.describe()}")
            report.keep(ceilings=asdict(ceilings))
        run, shape = WORKLOADS[name]
        shape = shape if ceilings else "toy"
        if shape != built:
            network = None
            gc.collect()
            network, built = build(SHAPES[shape], device), shape
        assert network is not None
        if ceilings:
            torch.cuda.reset_peak_memory_stats()
        run(Bench(network, SHAPES[shape], ceilings, FULL if ceilings else TOY, report, options.quick))
        missed |= report.finish(check=options.check, save=options.save)
    return missed


if __name__ == "__main__":
    sys.exit(main())
