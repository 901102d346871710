"""What it costs the host to take in a burst behind one prefix, and to admit a crowd that waits.

`python -m bench.admission [--check] [--burst N] [--crowd N]`

One thread, a model that computes nothing. The limit is memory traffic: every prompt is compared with the tree once, at
the rate at which one core compares memory that no cache holds. The contender is one `match_prefix` a request, nothing
else: what any engine does that matches each prompt once.

Bias: the prefix fits in a cache of the processor, so that comparing can be faster than the limit; and garbage
collections are left out, as `AsyncEngine` leaves them out of its steps.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.null import NullModel
from bench.report import Memory, Report, benchmark_options, measure_memory
from radixgen import Engine, Limits, SamplingParams
from radixgen.cache import TokenArray, match

VOCAB, OWN = 1000, 16
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def prompts_behind(prefix: TokenArray, count: int) -> list[TokenArray]:
    own = np.random.default_rng(1).integers(3, VOCAB, (count, OWN), dtype=np.int32)
    return [np.concatenate([prefix, tokens]) for tokens in own]


def timed(owner: Any, name: str) -> list[float]:
    """The seconds of every call of a method from here on."""
    seconds: list[float] = []
    plain = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(owner, name, call)
    return seconds


def count_comparisons(run: Callable[[], object]) -> int:
    """Comparisons of two runs of tokens while `run` runs."""
    plain, count = match.common_prefix_len, 0

    def counted(a: TokenArray, b: TokenArray) -> int:
        nonlocal count
        count += 1
        return plain(a, b)

    try:
        match.common_prefix_len = counted
        run()
    finally:
        match.common_prefix_len = plain
    return count


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


class Measured(NamedTuple):
    """Seconds."""

    copying: float
    """One prompt, into new memory"""
    submitting: float
    """One request"""
    admissions: list[float]
    """Of each step"""
    first_step: float


def measure(report: Report, memory: Memory, name: str, prefix_len: int, count: int) -> Measured:
    prefix = np.random.default_rng(0).integers(3, VOCAB, prefix_len, dtype=np.int32)
    prompts = prompts_behind(prefix, count)
    limits = Limits(max_waiting=count + 1, max_waiting_tokens=count * (prefix_len + OWN) + 1)
    engine = Engine(NullModel(vocab_size=VOCAB, rows=8192), kv_tokens=400_000, max_step_tokens=8192, limits=limits)
    with engine:
        engine.generate([prefix], PARAMS)
        report.limit(f"{name}: comparing {count:,} prompts", sum(one.nbytes for one in prompts) / memory.compare)
        begin = time.perf_counter()
        for one in prompts:
            engine._core.tree.match_prefix(one)
        report.contender(f"{name}_match_seconds", "one match each", time.perf_counter() - begin)
        begin = time.perf_counter()
        copies = [one.copy() for one in prompts]
        copying = (time.perf_counter() - begin) / count
        begin = time.perf_counter()
        for one in prompts:
            engine.submit(one, PARAMS, output_kind="final")
        submitting = (time.perf_counter() - begin) / count
        del copies
        admissions = timed(engine._core.scheduler.admission, "admit")
        begin = time.perf_counter()
        engine.step()
        first = time.perf_counter() - begin
        drain(engine)
        admissions = admissions.copy()
        report.contender(f"{name}_seconds", f"admitting {count:,}", sum(admissions))
        engine.reset_prefix_cache()
        engine.generate([prefix], PARAMS)
        for one in prompts:
            engine.submit(one, PARAMS, output_kind="final")
        each = count_comparisons(lambda: drain(engine)) / count
    report.figure(f"{name}_comparisons", each, f"{name}: {each:.2f} comparisons a request", at_most=4)
    return Measured(copying, submitting, admissions, first)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--burst", type=int, default=256)
    parser.add_argument("--crowd", type=int, default=10_000)
    parser.add_argument("--prefixes", type=int, nargs=2, default=(16_256, 4_000), help="tokens, of burst and crowd")
    options = parser.parse_args(arguments)
    memory, report = measure_memory(), Report("admission")
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        burst = measure(report, memory, "burst", options.prefixes[0], options.burst)
        text = f"submit: {1e3 * burst.submitting:.3f} ms; one copy of the prompt: {1e3 * burst.copying:.3f}"
        report.figure("submit_ms", 1e3 * (burst.submitting - burst.copying), text, at_most=0.1)
        text = f"first step of {options.burst} requests: {1e3 * burst.first_step:.1f} ms"
        report.figure("first_step_ms", 1e3 * burst.first_step, text, at_most=40)
        admissions = measure(report, memory, "crowd", options.prefixes[1], options.crowd).admissions
    finally:
        gc.enable()
        gc.unfreeze()
    total, worst = sum(admissions), 1e3 * max(admissions)
    report.figure("crowd_total", total, f"admitting {options.crowd:,} requests: {total:.2f} s in all", at_most=1)
    report.figure("worst_ms", worst, f"the longest admission of a step: {worst:.1f} ms", at_most=40)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
