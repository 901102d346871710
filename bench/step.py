"""What a step costs the host: everything but the model, and where it goes.

    python -m bench.step [--check] [--save]

256 sequences decode, with a model that costs nothing. Bound, with --check: a median of 1.5 ms a step, greedy,
without detokenization.

The limit is what Python itself needs to hand out that many results: one output object with one list for each
sequence, and nothing else.

Bias. The vocabulary has 128 tokens, so drawing is overhead alone; on a GPU the arithmetic of a draw is the
device's. What was made before the clock starts is kept from the garbage collector, as `AsyncEngine` does: a full
collection walks all of torch and transformers and takes far longer than a step. Prompts part at their end, so
each sequence is a leaf of its own under one shared node; every request has one sequence. Steps are timed one by
one, those that take new extents and plan anew among them; pieces are timed in further steps, with a little
overhead of their own.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench.null import NullModel
from bench.report import Report, benchmark_options, time_each
from radixgen import CompletionOutput, Engine, RequestOutput, SamplingParams
from radixgen.core import PromptTokens
from radixgen.model.loader import load_tokenizer

SEQUENCES = 256
SHARED, OWN = 512, 8
STEPS = 400
MILLISECONDS = 1.5
PIECES = (
    ("_core.scheduler", "schedule"),
    ("_core.scheduler", "freeze"),
    ("_core.scheduler", "commit"),
    ("_core", "_draw"),
    ("_core.scheduler", "advance"),
    ("_loop.outputs", "process"),
)


def serve(params: SamplingParams, model: NullModel | None = None, **options: Any) -> Engine:
    """An engine in which every sequence decodes."""
    engine = Engine(model or NullModel(), kv_tokens=1 << 20, max_step_tokens=8_192, **options)
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 128, SHARED)
    for _ in range(SEQUENCES):
        prompt = np.concatenate([shared, rng.integers(0, 128, OWN)])
        engine.submit(prompt, params, output_kind="delta")
    while engine.stats().generated_tokens < 20 * SEQUENCES:
        engine.step()
    return engine


@contextmanager
def timed(engine: Engine, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that each piece takes."""
    originals = []
    for owner_name, name in PIECES:
        owner: Any = engine
        for part in owner_name.split("."):
            owner = getattr(owner, part)
        original = getattr(owner, name)

        def call(*args: Any, _run: Callable[..., Any] = original, _name: str = name, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = _run(*args, **kwargs)
            spent[_name] = spent.get(_name, 0.0) + time.perf_counter() - begin
            return result

        setattr(owner, name, call)
        originals.append((owner, name))
    try:
        yield
    finally:
        for owner, name in originals:
            delattr(owner, name)


def bare_outputs() -> list[RequestOutput]:
    """What a step has to return, made from nothing."""
    none = PromptTokens([])
    return [RequestOutput("", none, [CompletionOutput(0, "", [1])], False) for _ in range(SEQUENCES)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = benchmark_options(__doc__).parse_args(arguments)
    report = Report("step")
    floor = float(np.median(time_each(bare_outputs, times=STEPS)))
    report.limit(f"{SEQUENCES} output objects", floor)
    report.say(f"  = {1e3 * floor:.3f} ms")
    ask = {"max_tokens": 4_096, "ignore_eos": True}
    cases = {
        "greedy": (SamplingParams(temperature=0.0, **ask), {}),
        "temperature": (SamplingParams(**ask), {}),
        "top_p": (SamplingParams(top_p=0.9, **ask), {}),
        "detokenized": (SamplingParams(temperature=0.0, **ask), {"tokenizer": load_tokenizer("smollm2")}),
    }
    for name, (params, extra) in cases.items():
        engine = serve(params, **extra)
        gc.collect()
        gc.freeze()
        seconds = time_each(engine.step, times=STEPS)
        median, worst = 1e3 * float(np.median(seconds)), 1e3 * max(seconds)
        bound = MILLISECONDS if name == "greedy" else None
        text = f"{name:<12} {median:6.3f} ms a step, {median / 1e3 / floor:5.1f} × limit; worst {worst:.2f}"
        report.figure(f"{name}_ms", median, text, at_most=bound)
        report.keep(**{f"{name}_worst_ms": worst})
        spent: dict[str, float] = {}
        with timed(engine, spent):
            whole = sum(time_each(engine.step, times=STEPS, warm_up=0))
        pieces = {piece: 1e3 * total / STEPS for piece, total in spent.items()}
        pieces["the rest"] = 1e3 * whole / STEPS - sum(pieces.values())
        report.say("  " + ", ".join(f"{piece} {value:.3f}" for piece, value in pieces.items()))
        report.keep(**{f"{name}_pieces_ms": pieces})
        engine.close()
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
