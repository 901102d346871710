"""Everything that a GPU is needed for, in one command: check, time, keep, draw.

    python -m bench.gpu [--full] [--stages checks calibration attention model engine] [--minutes 10] [--again]

Stages run one after the other, each in a process of its own, with its output in between. A stage whose results were
kept at this commit on this device is not run again, unless `--again`: an interrupted run goes on where it stopped. No
stage begins after `--minutes`. The core, which ends within ten minutes on an H100: the kernel tests, W5 and W12, the
model around attention, W2; `--full` runs every workload. Results are under `bench/results/`, pictures under `docs/`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from bench import plots
from bench.report import RESULTS, Report, surroundings

CHECKS = ("tests/test_kernels.py", "tests/test_cuda.py")


def checks(*, full: bool) -> int:
    """The tests of kernels and engine on the device; their last line is kept."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS[: 2 if full else 1]]
    done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
    report = Report("checks")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    report.say("\n".join(lines[-20:]))
    report.keep(passed=not done.returncode, summary=lines[-1] if lines else done.stderr[-300:], tests=command[5:])
    report.finish(check=False, save=True)
    return done.returncode


def benchmark(name: str, *core: str) -> Callable[..., int]:
    """A benchmark in a process of its own; `core` narrows it down."""

    def stage(*, full: bool) -> int:
        command = [sys.executable, "-m", f"bench.{name}", "--save", *([] if full else core)]
        return subprocess.run(command, cwd=RESULTS.parent.parent, check=False).returncode

    return stage


STAGES: dict[str, Callable[..., int]] = {
    "checks": checks,
    "calibration": benchmark("calibrate"),
    "attention": benchmark("attention", "--workloads", "W5", "W12"),
    "model": benchmark("model"),
    "engine": benchmark("engine", "--workloads", "W2"),
}


def kept(name: str) -> bool:
    """Whether the stage's results are of this commit, unchanged, and of this device."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return False
    found, now = json.loads(path.read_text(encoding="utf-8")), surroundings()
    same = all(found.get(key) == now.get(key) for key in ("commit", "device", "torch"))
    return same and not now["commit"].endswith("-dirty")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--full", action="store_true", help="every workload and test")
    parser.add_argument("--minutes", type=float, default=10.0, help="no stage begins later than this")
    parser.add_argument("--again", action="store_true", help="run what was run before, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is checked or timed")
        return 0
    begin, failed = time.monotonic(), []
    for place, name in enumerate(options.stages, 1):
        label = f"[{place}/{len(options.stages)}] {name}"
        if kept(name) and not options.again:
            print(f"{label}: kept from before", flush=True)
        elif time.monotonic() - begin > 60 * options.minutes:
            print(f"{label}: not begun, {options.minutes:g} minutes are over; run the command again", flush=True)
            failed.append(name)
        else:
            print(f"{label}: {(time.monotonic() - begin) / 60:.1f} minutes in", flush=True)
            if STAGES[name](full=options.full):
                failed.append(name)
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (python -m bench.plots draws them later)")
    elif "attention" in options.stages and "attention" not in failed:
        plots.main([])
    print(f"failed or left out: {', '.join(failed)}" if failed else "all done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
