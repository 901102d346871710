"""Where the steps of a workload go: kernels by kind, and when the device has nothing to do.

    python -m bench.profile [--workloads NAME ...] [--first N] [--count N] [--step-tokens N] [--save]

The workloads of `bench.compare`, on the same model. A workload runs three times, each from an empty cache: untimed,
with other prompts of the same lengths; with a clock around each step; and with `--count` of its steps, from `--first`
on, under PyTorch's profiler. The limit is the time that the device is busy: no step is shorter than its kernels.

Bias. Kernels that overlap, as those launched early do, are counted whole, so that kinds can add up to more than the
busy time. The profiler costs the host something. Without a GPU a toy model runs toy sizes, and only steps are timed.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.compare import run
from bench.contenders import Options, Radixgen, random_engine
from bench.report import Report
from bench.shapes import SHAPES
from bench.workloads import FULL, TOY, Workloads, describe

KINDS = {
    "product": ("nvjet", "gemm", "cutlass", "linear_kernel", "splitk"),
    "attention, 128-row tiles": ("attend_wide",),
    "attention, narrower tiles": ("attend",),
    "merge of partial results": ("merge",),
    "write of keys and values": ("write_kv",),
    "drawing": ("weigh_blocks", "narrow_floors", "settle_floors", "choose"),
    "compiled": ("triton_",),
    "copy": ("memcpy", "memset"),
}
"""What the names of kernels hold, the first that fits"""
GAPS = 5
FIRST = {"prefill": 8, "unshared": 80, "latency": 20, "latency8": 20}
"""The first of the steps that are profiled, where 40 is not in the middle of the workload"""


class Kernel(NamedTuple):
    """One that ran; times are nanoseconds."""

    name: str
    begin: int
    end: int


class Steps:
    """Clocks an engine's steps, and calls back before one of them and after `count` more."""

    def __init__(self, engine: Any) -> None:
        loop = engine._loop
        self._step = loop._step
        loop._step = self._clocked
        self.seconds: list[float] = []
        self._window = (0, 0)
        self._begin: Callable[[], object] = lambda: None
        self._end: Callable[[], object] = lambda: None

    def watch(self, first: int, count: int, begin: Callable[[], object], end: Callable[[], object]) -> None:
        """Forget what was clocked; call `begin` before step `first`, and `end` after so many steps."""
        self.seconds.clear()
        self._window, self._begin, self._end = (first, first + count), begin, end

    def _clocked(self) -> Any:
        first, stop = self._window
        if first < stop and len(self.seconds) == first:
            self._begin()
        begin = time.perf_counter()
        outputs = self._step()
        self.seconds.append(time.perf_counter() - begin)
        if first < stop and len(self.seconds) == stop:
            self._end()
        return outputs


def kind_of(name: str) -> str:
    """What a kernel of this name is for; its own name, shortened, where that is not known."""
    for kind, parts in KINDS.items():
        if any(part in name.lower() for part in parts):
            return kind
    return name[:40]


def busy_ns(kernels: Sequence[Kernel]) -> int:
    """Nanoseconds in which at least one of them ran."""
    total = until = 0
    for kernel in sorted(kernels, key=lambda one: one.begin):
        total += max(kernel.end - max(kernel.begin, until), 0)
        until = max(until, kernel.end)
    return total


def gaps(kernels: Sequence[Kernel], count: int) -> list[tuple[float, str, str]]:
    """The longest times in which none ran: milliseconds, and the kernels before and after."""
    found: list[tuple[float, str, str]] = []
    last: Kernel | None = None
    for kernel in sorted(kernels, key=lambda one: one.begin):
        if last is not None and kernel.begin > last.end:
            found.append(((kernel.begin - last.end) / 1e6, last.name[:40], kernel.name[:40]))
        if last is None or kernel.end > last.end:
            last = kernel
    return sorted(found, reverse=True)[:count]


class Profiler:
    """PyTorch's, for the kernels of one stretch of time."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self.seconds = 0.0

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._profile.start()
        self._begun = time.perf_counter()

    def end(self) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._begun
        self._profile.stop()

    def kernels(self) -> list[Kernel]:
        events = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        on_device = [event for event in events if event.device_type().name == "CUDA"]
        return [Kernel(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_device]


def describe_steps(report: Report, name: str, seconds: float, kernels: Sequence[Kernel], count: int) -> dict[str, Any]:
    """Lines and figures about `count` steps that took `seconds` together."""
    wall, busy = 1e3 * seconds / count, busy_ns(kernels) / 1e6 / count
    report.say(f"{name}: busy {busy:.2f} ms a step, {wall:.2f} on the wall")
    kinds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for kernel in kernels:
        kinds[kind_of(kernel.name)] += (kernel.end - kernel.begin) / 1e6 / count
        calls[kind_of(kernel.name)] += 1
    for kind, taken in kinds.most_common(10):
        report.say(f"    {kind:40s} {taken:8.3f} ms, {calls[kind] / count:.0f} launches")
    idle = gaps(kernels, GAPS)
    for taken, before, after in idle:
        report.say(f"    idle {taken:.3f} ms after {before}, before {after}")
    return {"busy_ms": busy, "wall_ms": wall, "kinds_ms": dict(kinds), "idle_ms": [taken for taken, *_ in idle]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(describe(FULL))
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--first", type=int, help="the first step that is profiled; by default one in the middle")
    parser.add_argument("--count", type=int, default=5, help="steps that are profiled")
    parser.add_argument("--step-tokens", type=int, default=0, help="rows of a step; 0: the engine's own default")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    options = parser.parse_args(arguments)
    report, cuda = Report("profile"), torch.cuda.is_available()
    shape, scale = SHAPES["8B" if cuda else "toy"], FULL if cuda else TOY
    kv_tokens, longest = (400_000, 32_768) if cuda else (20_000, 512)
    engine = random_engine(Options(shape, kv_tokens, 1024, longest, options.step_tokens or None))
    contender, steps = Radixgen(engine), Steps(engine)
    for name in options.workloads:
        workloads = Workloads(scale, shape.vocab)
        run(contender, name, Workloads(scale, shape.vocab, seed=1), None)
        steps.watch(0, 0, lambda: None, lambda: None)
        run(contender, name, workloads, None)
        taken = 1e3 * np.array(steps.seconds)
        p10, median, p90 = np.percentile(taken, [10, 50, 90])
        report.say(f"{name}: {taken.size} steps, median {median:.2f} ms, p10 {p10:.2f}, p90 {p90:.2f}")
        figures: dict[str, Any] = {"steps": taken.size, "median_ms": median, "p10_ms": p10, "p90_ms": p90}
        if cuda:
            profiler = Profiler()
            first = FIRST.get(name, 40) if options.first is None else options.first
            steps.watch(first, options.count, profiler.begin, profiler.end)
            run(contender, name, workloads, None)
            figures |= describe_steps(report, name, profiler.seconds, profiler.kernels(), options.count)
        report.keep(**{name: figures})
    return report.finish(check=False, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
