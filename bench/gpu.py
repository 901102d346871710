"""Everything that a GPU is needed for, in one command: check, time, keep, draw.

    python -m bench.gpu [--full] [--stages NAME ...] [--minutes 10] [--again]

Stages run one after the other, each in a process of its own, with its output in between. A stage whose results were
kept at this commit on this device is not run again, unless `--again`: an interrupted run goes on where it stopped. No
stage begins after `--minutes`. The core, which is to end within ten minutes on an H100: the kernel tests, W5 and W12,
the model around attention, W2 without contenders; `--full` runs everything. Results are under `bench/results/`,
pictures under `docs/`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch

from bench import plots
from bench.report import RESULTS, Report, surroundings, track

KERNEL_CHECKS = (
    "tests/test_kernels.py",
    "tests/test_sampling_kernels.py",
    "tests/test_skinny_gemm.py",
    "tests/test_quantized_weights.py",
    "tests/test_fp8_checkpoint.py",
)
CHECKS = (*KERNEL_CHECKS, "tests/test_cuda.py", "tests/test_sampling.py", "tests/test_attention.py")
SANITIZED = tuple(
    f"tests/test_kernels.py::test_{name}"
    for name in (
        "a_long_extent", "two_runs_agree_bit_for_bit", "writes_equal_their_twin", "rows_advance",
        "a_span_has_its_own_diagonal", "a_row_without_keys", "a_static_attention_answers_every_plan_that_is_loaded",
        "rows_move_on_over_the_same_tables",
    )
)  # fmt: skip
PYTEST = [sys.executable, "-m", "pytest", "-rN", "--verbosity=0", "-p", "no:cacheprovider"]


def checks(*, full: bool) -> int:
    """The tests of kernels, sampling and engine on the device, and with --full a few under compute-sanitizer, every
    tensor in memory of its own.
    """
    report, passed = Report("checks"), True
    tests = CHECKS if full else KERNEL_CHECKS
    parallel = ["-n", "8", "-p", "no:benchmark"] if find_spec("xdist") else []
    runs = {"tests": [*PYTEST, *parallel, *tests]}
    if full and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            own = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool]
            runs[tool] = [*own, "--error-exitcode", "9", *PYTEST, *SANITIZED]
    for name, command in track(list(runs.items()), "checking"):
        done = subprocess.run(command, cwd=RESULTS.parent.parent, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr[-300:]]
        report.say(f"{name}: {'passed' if not done.returncode else 'FAILED'}; {lines[-1].strip()}")
        if done.returncode:
            report.say("\n".join(lines[-20:]))
        report.keep(**{name: {"passed": not done.returncode, "summary": lines[-1].strip()}})
        passed &= not done.returncode
    report.keep(passed=passed, files=list(tests))
    report.finish(check=False, save=True)
    return int(not passed)


class Stage(NamedTuple):
    """A benchmark with its arguments, in a process of its own; `core` narrows it down."""

    module: str
    arguments: tuple[str, ...] = ()
    core: tuple[str, ...] = ()

    def command(self, *, full: bool) -> list[str]:
        return ["--save", *self.arguments, *(() if full else self.core)]


CHECKING = "checks"
STAGES = {
    "calibration": Stage("calibrate"),
    "attention": Stage("attention", core=("--workloads", "W5", "W12")),
    "model": Stage("model", core=("--quick",)),
    **{
        f"engine_{name}": Stage("engine", ("--workloads", name), core=("--quick",))
        for name in ("W2", "W3", "W4", "W10")
    },
}
CORE = [CHECKING, "calibration", "attention", "model", "engine_W2"]


def run(name: str, *, full: bool) -> int:
    """The exit status of one stage."""
    if name == CHECKING:
        return checks(full=full)
    stage = STAGES[name]
    command = [sys.executable, "-m", f"bench.{stage.module}", *stage.command(full=full)]
    return subprocess.run(command, cwd=RESULTS.parent.parent, check=False).returncode


def kept(name: str, *, full: bool) -> bool:
    """Whether the stage's results are of this commit, unchanged, of this device, and of the same arguments."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return False
    found, now = json.loads(path.read_text(encoding="utf-8")), surroundings()
    if name != CHECKING:
        now["arguments"] = " ".join(STAGES[name].command(full=full))
    same = all(found.get(key) == now.get(key) for key in ("commit", "device", "torch", "arguments"))
    return same and not now["commit"].endswith("-dirty")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=[CHECKING, *STAGES])
    parser.add_argument("--full", action="store_true", help="every workload and test")
    parser.add_argument("--minutes", type=float, default=10.0, help="no stage begins later than this")
    parser.add_argument("--again", action="store_true", help="run what was run before, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is checked or timed")
        return 0
    begin, failed = time.monotonic(), []
    stages = options.stages or ([CHECKING, *STAGES] if options.full else CORE)
    for place, name in enumerate(stages, 1):
        label = f"[{place}/{len(stages)}] {name}"
        if kept(name, full=options.full) and not options.again:
            print(f"{label}: kept from before", flush=True)
        elif time.monotonic() - begin > 60 * options.minutes:
            print(f"{label}: not begun, {options.minutes:g} minutes are over; run the command again", flush=True)
            failed.append(name)
        else:
            print(f"{label}: {(time.monotonic() - begin) / 60:.1f} minutes in", flush=True)
            if run(name, full=options.full):
                failed.append(name)
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (python -m bench.plots draws them later)")
    elif "attention" in stages and "attention" not in failed:
        plots.main([])
    print(f"failed or left out: {', '.join(failed)}" if failed else "all done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
