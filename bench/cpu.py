"""Overlapping and unrelated prompts on a CPU: radixgen, transformers, llama.cpp and OpenVINO GenAI.

    python -m bench.cpu [--threads N] [--runs N] [--workloads NAME ...] [--llama-library PATH] [--check] [--save]

SmolLM2-135M, the same token ids for all, of English text; greedy (samples are drawn at T = 1), the end of text ignored.
What is not installed is left out, with a line that says so: `pip install xllamacpp openvino-genai`. Contenders take
turns, each in a process of its own, and the median of the runs counts. An engine starts each run with an empty cache,
and each run has other prompts.

- radixgen and transformers: `float32` and `bfloat16` are those of weights, products and keys.
- llama.cpp: GGUF files in `F32`, `BF16` and, as published, `Q4_1`; keys in F16. What all prompts begin with is computed
  once and copied to all sequences, which are decoded in one batch. Four variants are tried for each workload and file,
  and the fastest is taken: one KV buffer or one for each sequence, with flash attention or without.
- OpenVINO: a GGUF file in F16, products and keys in `f32`, with prefix caching; what all prompts begin with is sent
  first. Its other precision, bf16, is not measured: version 2026.4 ended with a division by zero where this was tried.
- transformers: `generate` on one padded batch; the keys of what all prompts begin with are computed once.

The limit is that of `bench.limits`: in each step the weights are read once, at the rate at which one large matrix is
read, or multiplied, at the rate of one large product; both rates are measured in the same run. It assumes that weights
come from memory: if a cache of the processor holds them, as it may in bfloat16, an engine can be faster.

Bias. One small model, whose weights were dequantized from Q4_1 and Q8_0, so that Q4_1 loses nothing. One thread:
engines differ in how they use more. The wheel of xllamacpp is built for AVX2, so on a processor with AVX-512 it is
slower than llama.cpp can be: give a library of another build. llama.cpp's loop is Python and its tokens are drawn by
torch. OpenVINO has keys in float32, not its default of 8 bits. Neither HTTP nor text is in it, and starting is not
timed.

Bounds with --check: where prompts overlap, not slower than llama.cpp in F32; and llama.cpp's first tokens are ours.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from bench import llama_cpp
from bench.baseline import Generate, cpu_ceilings
from bench.compare import run
from bench.contenders import Contender, Radixgen
from bench.engine_process import EngineProcess, OpenContender
from bench.limits import StepLimit
from bench.openvino import OpenVino
from bench.report import Report, benchmark_options
from bench.shapes import Shape
from bench.thoughts import Asked, Replay, common_prefix
from bench.workloads import TOY, Answers, Ask, Scale, Tokens, Workload, Workloads
from radixgen import Engine
from radixgen.model import smollm2

SCALE = Scale(
    new=64, latency_prompt=128, requests=32, own=24, prefix=900, root=150, problems=1, question=150, candidates=8,
    candidate=64, system=600, agents=8, turns=4, tool=48, answer=32, unshared=8,
)  # fmt: skip
PRECISIONS = {"f32": "float32", "bf16": "bfloat16"}
"""Data types by the names that other engines give them"""
OVERLAPPING = ("questions", "parallel", "agents")
WORKLOADS = (*OVERLAPPING, "unshared", "latency")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = {"llama.cpp F32": "radixgen float32", "llama.cpp BF16": "radixgen bfloat16"}
"""The engine of ours that each of llama.cpp's files is compared with"""

Variants = dict[str, OpenContender]
"""Settings of one contender, by description, and what opens it"""


class TextWorkloads(Workloads):
    """Prompts are parts of a text."""

    def __init__(self, scale: Scale, text: Tokens, seed: int) -> None:
        super().__init__(scale, max(text) + 1, seed)
        self._text = text

    def tokens(self, key: int, count: int) -> Tokens:
        start = (7_919 * key + 104_729 * self.seed) % (len(self._text) - count)
        return self._text[start : start + count]

    def questions(self) -> Workload:
        """Many questions on one document."""
        document = self.tokens(0, self.scale.prefix)
        own = [self.tokens(1 + row, self.scale.own) for row in range(self.scale.requests)]
        yield Ask([document + one for one in own], self.scale.answer)


class Transformers:
    """`generate`, on top of the keys of what all prompts begin with."""

    def __init__(self, path: Path) -> None:
        self._model = Generate(path).model
        self._replay: Replay | None = None
        self.about: dict[str, Any] = {"engine": "transformers", "version": transformers.__version__}

    def reset(self) -> None:
        self._replay = None

    @torch.inference_mode()
    def answer(self, ask: Ask) -> Answers:
        batch = [Asked(prompt, [0] * ask.new, scored=False) for prompt in ask.prompts for _ in range(ask.n)]
        prefix = common_prefix(batch)
        if self._replay is None or self._replay.prefix != prefix:
            self._replay = Replay(self._model, prefix)
        answers = self._replay.run(batch)[:, -ask.new :].tolist()
        return [answers[first : first + ask.n] for first in range(0, len(answers), ask.n)]


def open_radixgen(path: Path, dtype: str, slots: int) -> AbstractContextManager[Contender]:
    return closing(Radixgen(Engine(path, dtype=dtype, device="cpu", kv_tokens=slots)))


def open_transformers(path: Path) -> AbstractContextManager[Contender]:
    return nullcontext(Transformers(path))


def open_llama(
    library: Path, model: Path, sizes: dict[str, int], *, unified: bool, flash: bool
) -> AbstractContextManager[Contender]:
    return closing(llama_cpp.LlamaCpp(llama_cpp.load(library), model, **sizes, unified=unified, flash=flash))


def open_openvino(model: Path, sequences: int, threads: int) -> AbstractContextManager[Contender]:
    return nullcontext(OpenVino(model, sequences=sequences, threads=threads))


def first_answer(contender: Contender, ask: Ask) -> tuple[dict[str, Any], Tokens]:
    """What the contender is, and its first answer."""
    return contender.about, contender.answer(ask)[0][0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--llama-library", type=Path, help="another libllama than xllamacpp's")
    parser.add_argument("--model", type=Path, help="a directory; radixgen and transformers alone")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, without bounds")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    path, scale, report = chosen.model or smollm2.fetch(), TOY if chosen.toy else SCALE, Report("cpu")
    text = AutoTokenizer.from_pretrained(path)("\n".join(topics.values()), verbose=False)["input_ids"]
    limits = step_limits(report, AutoConfig.from_pretrained(path))
    with tempfile.TemporaryDirectory() as folder:
        engines = ours_and_transformers(path, scale)
        if chosen.model is None:
            engines |= others(report, Path(folder), scale, chosen.threads, chosen.llama_library)
        compare_tokens(report, engines, TextWorkloads(scale, text, 0), chosen.threads, bound=not chosen.toy)
        workloads = [TextWorkloads(scale, text, 1 + seed) for seed in range(1 + chosen.runs)]
        for name in chosen.workloads:
            measure(report, name, engines, workloads, limits, chosen.threads, bound=not chosen.toy)
    report.keep(threads=chosen.threads, runs=chosen.runs)
    return report.finish(check=chosen.check, save=chosen.save)


def step_limits(report: Report, config: PretrainedConfig) -> dict[str, StepLimit]:
    """The limit of a step, by data type."""
    limits = {}
    for name, dtype in DTYPES.items():
        ceilings = cpu_ceilings(dtype)
        limits[name] = StepLimit(Shape.of(config), ceilings, dtype.itemsize)
        report.say(
            f"{name}: weights of {limits[name].weights(1, 1) * ceilings.read / 1e6:.0f} MB, read at "
            f"{ceilings.read / 1e9:.1f} GB/s, multiplied at {ceilings.matrix / 1e9:.0f} GFLOP/s: a step takes at least "
            f"{1e3 * limits[name].weights(1, 1):.1f} ms"
        )
        report.keep(**{f"{name}_ceilings": {"read": ceilings.read, "matrix": ceilings.matrix}})
    return limits


def ours_and_transformers(path: Path, scale: Scale) -> dict[str, Variants]:
    slots = largest(scale) * longest(scale)
    ours: dict[str, Variants] = {
        f"radixgen {dtype}": {"": partial(open_radixgen, path, dtype, slots)} for dtype in DTYPES
    }
    return {**ours, "transformers float32": {"": partial(open_transformers, path)}}


def others(report: Report, folder: Path, scale: Scale, threads: int, library: Path | None) -> dict[str, Variants]:
    """llama.cpp and OpenVINO, if installed, with their model files written to `folder`."""
    library, with_openvino = library or llama_cpp.installed(), find_spec("openvino_genai")
    for name, there in (("llama.cpp", library), ("OpenVINO", with_openvino)):
        if not there:
            report.say(f"{name}: left out, it is not installed")
    if not (library or with_openvino):
        return {}
    published = smollm2.download_gguf(folder)

    def converted(dtype: str) -> Path:
        target = folder / f"{dtype}.gguf"
        llama_cpp.convert(published, target, GGMLQuantizationType[dtype])
        return target

    engines: dict[str, Variants] = {}
    if library:
        features = llama_cpp.features(library)
        report.say(f"llama.cpp uses {' '.join(features)}")
        report.keep(llama_cpp_features=features)
        sizes = {"sequences": largest(scale), "length": longest(scale), "threads": threads}
        for dtype in ("F32", "BF16"):
            engines[f"llama.cpp {dtype}"] = llama_variants(library, converted(dtype), sizes)
        engines["llama.cpp Q4_1"] = llama_variants(library, published, sizes)
    if with_openvino:
        engines["OpenVINO f32"] = {"": partial(open_openvino, converted("F16"), largest(scale), threads)}
    return engines


def llama_variants(library: Path, model: Path, sizes: dict[str, int]) -> Variants:
    """llama.cpp with one KV buffer or several, with flash attention or without."""
    return {
        f"{buffers}, flash attention {'on' if flash else 'off'}": partial(
            open_llama, library, model, sizes, unified=unified, flash=flash
        )
        for buffers, unified in (("one buffer", True), ("a buffer each", False))
        for flash in (True, False)
    }


def largest(scale: Scale) -> int:
    """Sequences at a time."""
    return max(scale.requests, scale.problems * scale.candidates, scale.agents, scale.unshared)


def longest(scale: Scale) -> int:
    """Tokens of a sequence."""
    return max(
        scale.prefix + scale.own + scale.answer,
        scale.root + scale.question + scale.candidate,
        scale.system + scale.turns * (scale.tool + scale.answer),
        scale.latency_prompt + scale.new,
    )


def compare_tokens(
    report: Report, engines: dict[str, Variants], workloads: TextWorkloads, threads: int, *, bound: bool
) -> None:
    """Report how many greedy tokens of one request each engine has in common with the first one."""
    ask = next(workloads.latency())
    answers: dict[str, Tokens] = {}
    versions = {}
    for label, variants in engines.items():
        with closing(EngineProcess(next(iter(variants.values())), threads)) as process:
            about, answers[label] = process.call(first_answer, ask)
        versions[about["engine"]] = about["version"]
    report.keep(versions=versions)
    first, *rest = answers
    for label in rest:
        pairs = zip(answers[first], answers[label], strict=True)
        equal = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        least = ask.new / 2 if bound and label == "llama.cpp F32" else None
        text = f"one request: the first {equal} of {ask.new} tokens of {label} are those of {first}"
        report.figure(f"equal_tokens_{label}", equal, text, at_least=least)


def measure(
    report: Report,
    name: str,
    engines: dict[str, Variants],
    workloads: Sequence[TextWorkloads],
    limits: dict[str, StepLimit],
    threads: int,
    *,
    bound: bool,
) -> None:
    """One workload. The first of `workloads` warms up, and decides how an engine is opened; each other is a run."""
    warm_up, *timed = workloads
    seconds: dict[str, list[float]] = {label: [] for label in engines}
    least: dict[str, float] = {}
    with ExitStack() as stack:
        opened, chosen = {}, {}
        for label, variants in engines.items():
            chosen[label] = fastest(variants, name, warm_up, threads)
            opened[label] = stack.enter_context(closing(EngineProcess(variants[chosen[label]], threads)))
            opened[label].call(run, name, warm_up, None)
        for given in timed:
            for label, process in opened.items():
                dtype = label.removeprefix("radixgen ")
                figures = process.call(run, name, given, limits.get(dtype))
                seconds[label].append(figures["seconds"])
                if dtype in limits:
                    least[dtype] = figures["limit_seconds"]
    words = describe(timed[0].scale)[name]
    report.say(f"{name}: {words}; limit: {', '.join(f'{dtype} {limit:.2f} s' for dtype, limit in least.items())}")
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    for label, median in medians.items():
        dtype = PRECISIONS.get(label.split()[-1].lower(), label.split()[-1])
        ratio = f"{median / least[dtype]:6.2f} × limit" if dtype in least else ""
        report.say(f"{label:<24} {median:8.2f} s  {ratio}  {chosen[label]}")
    report.keep(**{name: {"words": words, "limits": least, "seconds": medians, "runs": seconds, "variants": chosen}})
    for theirs, own in OURS.items():
        if theirs in medians:
            gain = medians[theirs] / medians[own]
            text = f"{name}: {own} is {gain:.2f} times as fast as {theirs}"
            least_gain = 1.0 if bound and name in OVERLAPPING and theirs == "llama.cpp F32" else None
            report.figure(f"{name}_over_{theirs}", gain, text, at_least=least_gain)


def fastest(variants: Variants, name: str, workloads: TextWorkloads, threads: int) -> str:
    """The variant that is fastest at a workload."""
    if len(variants) == 1:
        return next(iter(variants))
    seconds = {}
    for variant, open_contender in variants.items():
        with closing(EngineProcess(open_contender, threads)) as process:
            seconds[variant] = process.call(run, name, workloads, None)["seconds"]
    return min(seconds, key=lambda variant: seconds[variant])


def describe(scale: Scale) -> dict[str, str]:
    """Each workload in words."""
    return {
        "questions": f"{scale.requests} questions on one document of {scale.prefix} tokens, {scale.answer} new each",
        "parallel": f"{scale.candidates} samples of {scale.candidate} tokens of one prompt of "
        f"{scale.problems * (scale.root + scale.question)}",
        "agents": f"{scale.agents} agents, {scale.turns} turns each, one system prompt of {scale.system} tokens",
        "unshared": f"{scale.unshared} prompts that share nothing: {scale.latency_prompt} tokens, {scale.new} new each",
        "latency": f"1 request: {scale.latency_prompt} prompt tokens, {scale.new} new",
    }


if __name__ == "__main__":
    sys.exit(main())
