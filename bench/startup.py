"""How long radixgen takes to start: `import radixgen`, and `radixgen --help`.

`python -m bench.startup [--check] [--save] [--repeats N]`

Whole processes, one after the other, files in the page cache. The limit is a Python that imports nothing.

Bias: medians; the first start of all, which reads the files from disk and compiles them, is not counted.
"""

import statistics
import subprocess
import sys

from bench.report import Report, benchmark_options, time_each

COMMANDS = {
    "import": ("import radixgen", ["-c", "import radixgen"], 0.3),
    "help": ("radixgen --help", ["-m", "radixgen", "--help"], 0.5),
}


def seconds(arguments: list[str], repeats: int) -> float:
    """Median of the process's whole life."""

    def start() -> None:
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)

    return statistics.median(time_each(start, times=repeats))


def main(arguments: list[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    chosen = parser.parse_args(arguments)
    report = Report("startup")
    report.limit("a Python that imports nothing", seconds(["-c", ""], chosen.repeats))
    for key, (name, command, most) in COMMANDS.items():
        took = seconds(command, chosen.repeats)
        report.contender(f"seconds_{key}", name, took)
        report.figure(f"{key}_seconds", took, f"{name}: {took:.2f} s", at_most=most)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
