"""What the benchmarks share: this machine's limits, timing that keeps every iteration, bounds, JSON."""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")

RESULTS = Path(__file__).parent / "results"
WRITTEN = ("bench/results", "docs", "README.md")
"""What benchmarks themselves write; all else that differs from a commit makes its results `-dirty`."""


@dataclass(frozen=True, slots=True)
class Memory:
    """How fast one core compares and copies memory that no cache holds, in bytes of one of the two sides."""

    compare: float
    copy: float


def measure_memory(size: int = 1 << 28, times: int = 5) -> Memory:
    """The best of `times` comparisons of two equal runs of `size` bytes, and of as many copies.

    Best, not median: a limit is what the machine can do when nothing disturbs it.
    """
    source = np.arange(size // 4, dtype=np.int32)
    target = source.copy()
    copied = time_each(lambda: np.copyto(target, source), times=times)
    left, right = source.tobytes(), target.tobytes()
    compared = time_each(lambda: left == right, times=times)
    return Memory(compare=len(left) / min(compared), copy=source.nbytes / min(copied))


def time_each(run: Callable[[], object], *, times: int, warm_up: int = 1) -> list[float]:
    """Seconds that `run` took, every one of `times`, after `warm_up` runs that are not counted."""
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def time_pieces(module: ModuleType, names: Sequence[str], run: Callable[[], object], *, times: int) -> dict[str, float]:
    """Median seconds that a `run` spends in each of these functions of `module`; they may not nest."""
    spent: dict[str, list[float]] = {name: [] for name in names}
    originals = {name: getattr(module, name) for name in names}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = originals[name](*arguments, **options)
            spent[name][-1] += time.perf_counter() - begin
            return result

        return call

    try:
        for name in names:
            setattr(module, name, timed(name))
        for _ in range(times):
            for seconds in spent.values():
                seconds.append(0.0)
            run()
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
    return {name: float(np.median(seconds)) for name, seconds in spent.items()}


def track(items: Sequence[Item], label: str, every: int = 1) -> Iterator[Item]:
    """`items`, with a bar on stderr where that is a terminal, drawn between items and never during one."""
    hidden = not sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), auto_refresh=False, transient=True, disable=hidden)
    with bar:
        task = bar.add_task(label, total=len(items))
        for done, item in enumerate(items):
            if done % every == 0:
                bar.update(task, completed=done, refresh=True)
            yield item


class Report:
    """Collects figures and the bounds on them: a line for each, and one JSON line of all at the end."""

    def __init__(self, benchmark: str) -> None:
        self.figures: dict[str, Any] = {"benchmark": benchmark}
        self.missed: list[str] = []
        self.bounds: list[list[str]] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def figure(
        self,
        key: str,
        value: float,
        text: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Keep `value` under `key` and print `text`, with the bound and whether it holds."""
        self.figures[key] = value
        for limit, holds, word in (
            (at_least, at_least is None or value >= at_least, "at least"),
            (at_most, at_most is None or value <= at_most, "at most"),
        ):
            if limit is not None:
                self.bounds.append([text, f"{word} {limit:,.12g}{'' if holds else ': missed'}"])
                text += f"  [{word} {limit:g}: {'holds' if holds else 'MISSED'}]"
            if not holds:
                self.missed.append(key)
        self.say(text)

    def limit(self, what: str, seconds: float) -> None:
        """The physical limit, which every contender is then held against."""
        self.figures["limit_seconds"] = seconds
        self.say(f"limit: {what}: {seconds:.2f} s")

    def contender(self, key: str, name: str, seconds: float) -> None:
        """Seconds of one contender, and their ratio to the limit."""
        self.figures[key] = seconds
        ratio = seconds / self.figures["limit_seconds"]
        self.say(f"{name:<24} {seconds:8.2f} s  {ratio:6.2f} × limit")

    def keep(self, **figures: Any) -> None:
        """Figures for the JSON line alone."""
        self.figures.update(figures)

    def finish(self, *, check: bool, save: bool = False) -> int:
        """Print the JSON line, and with `save` keep it under `bench/results/`.

        Returns the exit status: 1 where a bound was missed and `check` is asked for.
        """
        line = json.dumps({**self.figures, "bounds": self.bounds, "missed": self.missed, **surroundings()})
        self.say(line)
        if save:
            target = RESULTS / f"{self.figures['benchmark']}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(line + "\n", encoding="utf-8")
        return int(check and bool(self.missed))


def benchmark_options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    return parser


def _git(*arguments: str) -> str:
    """What git prints; nothing where there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(RESULTS.parent.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def surroundings() -> dict[str, str]:
    """Arguments, date, commit, processor, versions, and the GPU where there is one."""
    commit = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{name}" for name in WRITTEN))
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    gpu = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "arguments": " ".join(Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": (commit or "unknown") + ("-dirty" if changed else ""),
        "processor": f"{models[0] if models else platform.machine()}, {len(models)} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }
