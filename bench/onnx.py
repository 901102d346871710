"""An exported model over onnxruntime and TVM, beside PyTorch on the same CPU.

    python -m bench.onnx [--float32 DIR] [--int8 DIR] [--threads N] [--runs N] [--toy] [--check] [--save]

SmolLM2-135M, exported by `radixgen export`, which takes minutes: with `--float32` and `--int8`, directories that it has
written before. The workloads are those of `bench.cpu`; engines take turns, each in a process of its own. Then, in this
process: keys read by an exported step, for each that its plan reads; what weights of 8 bits change on the demo's
document; and one step through TVM (`pip install apache-tvm`), compiled for its sizes, beside onnxruntime.

Bias. Of int8, both weights and inputs are quantized in blocks, the latter as a step runs. TVM compiles for LLVM without
tuning and without a library of matrix products.

Bounds with --check: 32 questions on a document take at most 1.5 times PyTorch's time; at most 1.1 times the plan's keys
are read; TVM's logits are onnxruntime's.
"""

import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoConfig, AutoTokenizer

from bench.contenders import Contender, Radixgen
from bench.cpu import SCALE, TextWorkloads, Variants, largest, longest, measure, open_radixgen, step_limits
from bench.report import Report, benchmark_options
from bench.tvm_step import compile_step, record_step
from bench.workloads import TOY
from radixgen import Engine, SamplingParams
from radixgen.model import smollm2
from radixgen.model.onnx_export import export_onnx
from radixgen.model.onnx_model import OnnxModel

PYTORCH, FLOAT32, INT8 = "radixgen float32", "onnxruntime float32", "onnxruntime int8"


def open_exported(folder: Path, slots: int) -> AbstractContextManager[Contender]:
    return closing(Radixgen(Engine(folder, kv_tokens=slots)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--float32", type=Path, help="a directory that radixgen export has written")
    parser.add_argument("--int8", type=Path, help="the same, in 8 bits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="tiny sizes, without bounds")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    report, scale = Report("onnx"), TOY if chosen.toy else SCALE
    path = smollm2.fetch()
    text = AutoTokenizer.from_pretrained(path)("\n".join(topics.values()), verbose=False)["input_ids"]
    with ExitStack() as stack:
        folders = {}
        for name, given in (("float32", chosen.float32), ("int8", chosen.int8)):
            folders[name] = given or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if given is None:
                export_onnx(path, folders[name], weights=name)
        slots = largest(scale) * longest(scale)
        engines: dict[str, Variants] = {PYTORCH: {"": partial(open_radixgen, path, "float32", slots)}}
        for label, folder in zip((FLOAT32, INT8), folders.values(), strict=True):
            engines[label] = {"": partial(open_exported, folder, slots)}
        limits = step_limits(report, AutoConfig.from_pretrained(path))
        workloads = [TextWorkloads(scale, text, 1 + seed) for seed in range(1 + chosen.runs)]
        for name in ("questions", "latency"):
            measure(report, name, engines, workloads, limits, chosen.threads, bound=False)
        compare_times(report, bound=not chosen.toy)
        compare_reads(report, path, folders["float32"], TextWorkloads(scale, text, 1))
        compare_quality(report, path, folders)
        compare_tvm(report, folders["float32"])
    report.keep(threads=chosen.threads, runs=chosen.runs)
    return report.finish(check=chosen.check, save=chosen.save)


def compare_times(report: Report, *, bound: bool) -> None:
    for name in ("questions", "latency"):
        medians = report.figures[name]["seconds"]
        for label in (FLOAT32, INT8):
            ratio = medians[label] / medians[PYTORCH]
            most = 1.5 if bound and name == "questions" and label == FLOAT32 else None
            report.figure(f"{name}_{label}", ratio, f"{name}: {label} takes {ratio:.2f} x PyTorch's time", at_most=most)


def compare_reads(report: Report, path: Path, folder: Path, workloads: TextWorkloads) -> None:
    """Bytes of KV that both engines read for the same prompts. Their plans are the same."""
    ask, read = next(workloads.questions()), []
    for model in (path, folder):
        with Engine(model, dtype="float32", device="cpu", kv_tokens=8000) as engine:
            engine.generate(ask.prompts, SamplingParams(max_tokens=ask.new, temperature=0.0, ignore_eos=True))
            read.append(engine.stats().kv_bytes_read)
    ratio = read[1] / read[0]
    report.figure("kv_read", ratio, f"an exported step reads {ratio:.3f} x the keys of its plan", at_most=1.1)


def compare_quality(report: Report, path: Path, folders: dict[str, Path]) -> None:
    """Perplexity of the demo's document, and how far apart log-probabilities are."""
    document = files("radixgen.demo").joinpath("document.md").read_text(encoding="utf-8")
    scores = {}
    for name, model in {"pytorch": path, **folders}.items():
        with Engine(model, dtype="float32", device="cpu", kv_tokens=4000) as engine:
            output = engine.generate(document, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
            pairs = zip(output.prompt_tokens.ids, output.prompt_logprobs or [], strict=True)
            scores[name] = [entry[token] for token, entry in pairs if entry is not None]
    perplexity = {name: math.exp(-sum(values) / len(values)) for name, values in scores.items()}
    for name in folders:
        largest_gap = max(abs(a - b) for a, b in zip(scores["pytorch"], scores[name], strict=True))
        change = 100 * (perplexity[name] / perplexity["pytorch"] - 1)
        report.figure(
            f"perplexity_{name}", change,
            f"{name}: perplexity {perplexity[name]:.3f} ({change:+.2f} %, of {perplexity['pytorch']:.3f}), "
            f"log-probabilities off by at most {largest_gap:.2g}",
        )  # fmt: skip


def compare_tvm(report: Report, folder: Path) -> None:
    """One step of four sequences, compiled by TVM."""
    if find_spec("tvm") is None:
        report.say("TVM: left out, it is not installed")
        return
    step = record_step(OnnxModel(folder), range(50, 110), [[1], [2, 3], [4, 5, 6], [7, 8]])
    begin = time.perf_counter()
    run = compile_step(folder, step.inputs)
    seconds = time.perf_counter() - begin
    difference = float(abs(run() - step.logits).max() / abs(step.logits).max())
    took = min(_seconds(run) for _ in range(5))
    report.figure(
        "tvm_difference", difference,
        f"TVM: compiled in {seconds:.0f} s, a step of {len(step.logits)} rows takes {1e3 * took:.0f} ms "
        f"(onnxruntime {1e3 * step.seconds:.0f} ms), logits off by {difference:.1g}", at_most=1e-4,
    )  # fmt: skip


def _seconds(run: partial[object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
