"""Nine workloads on whole engines, side by side: radixgen, and vLLM where it is installed.

    python -m bench.compare [--engines radixgen vllm vllm-cascade] [--workloads NAME ...] [--step-tokens N]
        [--minutes N] [--save]

Prints a line a workload: its limit, then what each engine took and its ratio to that. A Llama of 8B shape in bfloat16
with random weights, the same for all; KV of 400,000 tokens, at most 1,024 sequences, token ids in and out, the end of
sequence ignored. Each engine runs in a process of its own. A workload runs once untimed, with other prompts of the same
lengths, so that graphs are captured; then the cache is dropped and the time from the first prompt to the last token is
taken. It is run again for one new token, which tells the time to all first tokens and what decoding took.

The limit: the weights read once a step (or multiplied, whichever is longer), each distinct key read once a step, and
prompts computed once. The chip's ceilings are measured in the same run.

Bias. One run a figure: differences under 10 % are noise. Starting is not timed. Neither HTTP nor text is in it. vLLM
runs in one process with its engine, which its users don't have. Without a GPU a toy model runs toy sizes, and there is
no limit.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.contenders import Contender, Options, Radixgen, Vllm, random_engine
from bench.device import Timer
from bench.limits import StepLimit, WorkloadLimit
from bench.report import Report
from bench.shapes import SHAPES
from bench.workloads import FULL, TOY, Workloads, describe

ENGINES = ("radixgen", "vllm", "vllm-cascade")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.alone:
        return _run_one(options)
    report = Report("compare")
    results: dict[str, dict[str, Any]] = {}
    for engine in options.engines:
        command = [sys.executable, "-m", "bench.compare", "--alone", "--engines", engine, "--workloads"]
        command += [*options.workloads, "--step-tokens", str(options.step_tokens), "--minutes", str(options.minutes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        results[engine] = _read(done.stdout)
        if done.returncode:
            report.say(f"{engine}: did not finish (exit status {done.returncode})")
    for line in table(results, options.workloads, describe(FULL if torch.cuda.is_available() else TOY)):
        report.say(line)
    report.keep(engines=results)
    return report.finish(check=False, save=options.save) or int(any("about" not in one for one in results.values()))


def table(results: dict[str, dict[str, Any]], names: Sequence[str], what: dict[str, str]) -> list[str]:
    """A line of Markdown for each workload, which `what` describes: its limit, each engine's time and its ratio to
    that, and how many times faster than the others the first engine is.
    """
    first, *others = results
    lines = [
        "| workload | limit | " + " | ".join([*results, *(f"{first} over {other}" for other in others)]) + " |",
        "| --- |" + " --- |" * (1 + len(results) + len(others)),
    ]
    for name in names:
        found = {engine: one[name] for engine, one in results.items() if name in one}
        limit = next((one["limit_seconds"] for one in found.values() if one.get("limit_seconds")), None)
        cells = [what[name], f"{limit:.2f} s" if limit else "–"]
        cells += [_cell(found[engine]) if engine in found else "–" for engine in results]
        cells += [
            f"{found[other]['seconds'] / found[first]['seconds']:.2f}×" if {first, other} <= found.keys() else "–"
            for other in others
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(found: dict[str, Any]) -> str:
    limit = found.get("limit_seconds")
    ratio = f" ({found['seconds'] / limit:.2f}×)" if limit else ""
    each = f", {found['ms_per_token']:.2f} ms a token" if found.get("ms_per_token") else ""
    return f"{found['seconds']:.2f} s{ratio}; first tokens {1e3 * found['first_seconds']:.0f} ms{each}"


def _read(output: str) -> dict[str, Any]:
    """The output lines of one engine's process, by workload; the line about the engine itself under `about`."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            figures = json.loads(line)
            found[figures.pop("workload", "about")] = figures
    return found


def _run_one(options: argparse.Namespace) -> int:
    """One engine in this process: a JSON line of what it is, then one a workload."""
    begin, cuda = time.monotonic(), torch.cuda.is_available()
    shape, scale = SHAPES["8B" if cuda else "toy"], FULL if cuda else TOY
    given = Options(
        shape,
        kv_tokens=400_000 if cuda else 20_000,
        max_seqs=1024,
        max_model_len=32_768 if cuda else 512,
        step_tokens=options.step_tokens or None,
    )
    ceilings = Timer(torch.device("cuda")).ceilings() if cuda else None
    (name,) = options.engines
    ours = name == "radixgen"
    engine: Contender = Radixgen(random_engine(given)) if ours else Vllm(given, cascade=name == "vllm-cascade")
    measured = {} if ceilings is None else {"read": ceilings.read, "matrix": ceilings.matrix}
    print(json.dumps({**engine.about, **measured}), flush=True)
    step_limit = None if ceilings is None else StepLimit(shape, ceilings)
    for one in options.workloads:
        if time.monotonic() - begin > 60 * options.minutes:
            print(f"{name} {one}: not begun", file=sys.stderr, flush=True)
            continue
        timed, warm_up = Workloads(scale, shape.vocab), Workloads(scale, shape.vocab, seed=1)
        figures = measure(engine, one, timed, warm_up, step_limit)
        print(json.dumps({"workload": one, **figures}), flush=True)
        print(f"{name} {one}: {figures['seconds']:.2f} s", file=sys.stderr, flush=True)
    return 0


def measure(
    engine: Contender, name: str, workloads: Workloads, warm_up: Workloads, step_limit: StepLimit | None
) -> dict[str, Any]:
    """One workload: seconds in all, the least that this takes, and seconds until all first tokens."""
    run(engine, name, warm_up, None)
    whole = run(engine, name, workloads, step_limit)
    begun = run(engine, name, workloads, None, first=True)
    figures = {**whole, "first_seconds": begun["seconds"]}
    if name.startswith("latency"):
        figures["ms_per_token"] = 1e3 * (whole["seconds"] - begun["seconds"]) / (workloads.scale.new - 1)
    return figures


def run(
    engine: Contender, name: str, workloads: Workloads, step_limit: StepLimit | None, *, first: bool = False
) -> dict[str, Any]:
    """One pass from an empty cache; `first` ends it with the first tokens of the first ask that is timed."""
    engine.reset()
    asks = workloads.start(name)
    limit = None if step_limit is None else WorkloadLimit(step_limit, engine.about["step_tokens"])
    seconds = least = 0.0
    tokens = 0
    try:
        ask = next(asks)
        while True:
            if first and ask.timed:
                ask = replace(ask, new=1)
            begin = time.perf_counter()
            answers = engine.answer(ask)
            if ask.timed:
                seconds += time.perf_counter() - begin
                tokens += sum(len(one) for some in answers for one in some)
            if limit is not None:
                least += limit.seconds(ask, answers) * ask.timed
            if first and ask.timed:
                break
            ask = asks.send(answers)
    except StopIteration:
        pass
    figures: dict[str, Any] = {"seconds": seconds, "tokens": tokens}
    return figures if limit is None else {**figures, "limit_seconds": least}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(describe(FULL))
    parser.add_argument("--engines", nargs="+", default=["radixgen"], choices=ENGINES)
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--step-tokens", type=int, default=0, help="rows of a step; 0: the engine's own default")
    parser.add_argument("--minutes", type=float, default=60.0, help="an engine begins no workload later than this")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
