"""Writes what the README shows out of what was measured: the demo's output and picture, and the table of results.

`python -m bench.readme [--demo]`

The table comes from `bench/results/*.json`, which the benchmarks write with `--save`. `--demo` runs the demo on this
machine first and keeps its picture.
"""

import argparse
import json
import re
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console

from bench.report import RESULTS
from radixgen.demo import run, summary
from radixgen.model import smollm2

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "demo.svg"

TABLE = ("prefix", "unrelated", "agents", "thoughts", "explain", "serve", "http", "tree", "plan", "step", "simulate")
"""Benchmarks with bounds, in README's order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="run the demo and keep its output and picture")
    if parser.parse_args().demo:
        _keep_demo()
    text = README.read_text(encoding="utf-8")
    shown = (RESULTS / "demo.txt").read_text(encoding="utf-8").rstrip()
    text = _replace(text, "demo", f"```console\n{shown}\n```")
    README.write_text(_replace(text, "results", _table()), encoding="utf-8")


def _keep_demo() -> None:
    shown = run(smollm2.NAME)
    text = Console(record=True, width=110, file=StringIO())
    text.print(summary(shown.figures))
    lines = [line.rstrip() for line in text.export_text().splitlines()]
    (RESULTS / "demo.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture = Console(record=True, width=110, file=StringIO(), force_terminal=True)
    shown.print(picture)
    picture.save_svg(str(PICTURE), title="radixgen demo")


def _table() -> str:
    rows = ["| benchmark | measured | bound |", "| --- | --- | --- |"]
    places = []
    for name in TABLE:
        found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        rows += [f"| `bench.{name}` | {text} | {bound} |" for text, bound in found["bounds"]]
        places.append(f"{found['processor']}, torch {found['torch']}, {found['date']}")
    return "\n".join(
        [*rows, "", "; ".join(dict.fromkeys(places)) + ".", "", *_simulated(), "", *_attention(), "", *_model()]
    )


def _attention() -> list[str]:
    """Our plan on a GPU, against the other plans and the peers, by workload and head shape."""
    found = json.loads((RESULTS / "attention.json").read_text(encoding="utf-8"))
    read, matrix = found["ceilings"]["read"], found["ceilings"]["matrix"]
    lines = [
        f"`bench.attention` on one {found['device']} ({read / 1e12:.2f} TB/s read, {matrix / 1e12:.0f} TFLOP/s, "
        f"measured; torch {found['torch']}, {found['date']}): one layer's attention, cold. The best other is the "
        f"fastest of our own unshared, one-prefix and naive plans by the same kernels, and {_peers(found['rows'])}.",
        "",
        "| workload | heads | trees | over the best other | over unshared | of the roofline |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for workload, heads in dict.fromkeys((row["workload"], tuple(row["heads"])) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["workload"], tuple(row["heads"])) == (workload, heads)]
        ours = np.array([row["contenders"]["radixgen"]["cold_us"] for row in rows])
        others = [
            [v["cold_us"] for k, v in row["contenders"].items() if k != "radixgen" and "cold_us" in v] for row in rows
        ]
        unshared = np.array([row["contenders"]["unshared"]["cold_us"] for row in rows])
        best, share = np.array([min(times) for times in others]) / ours, [row["roofline_us"] for row in rows] / ours
        lines.append(
            f"| {workload} | {heads[0]}/{heads[1]} | {len(rows)} | {_mean(best)} | {_mean(unshared / ours)} "
            f"| {share.min():.0%} to {share.max():.0%} |"
        )
    return lines


def _model() -> list[str]:
    """A model's step on a GPU, by the number of rows, as multiples of its limit."""
    found = json.loads((RESULTS / "model.json").read_text(encoding="utf-8"))
    kinds = {
        "eager": "transformers' own", "fused": "layers with one input fused", "compiled": "and compiled",
        "step": "whole step",
    }  # fmt: skip
    counts = [key.removeprefix("eager_") for key in found if re.fullmatch(r"eager_\d+", key)]
    return [
        f"`bench.model` on one {found['device']} (torch {found['torch']}, {found['date']}): Llama of {found['shape']} "
        "in CUDA graphs without attention, against reading its weights or multiplying by them; and a whole compiled "
        "step, each row with 64 tokens of its own on 4,096 shared ones, against that and reading each distinct key.",
        "",
        f"| rows | {' | '.join(kinds.values())} |",
        "| --- |" + " --- |" * len(kinds),
        *(f"| {rows} | " + " | ".join(f"{found[f'{kind}_{rows}']:.2f}×" for kind in kinds) + " |" for rows in counts),
    ]


def _peers(rows: list[dict[str, Any]]) -> str:
    """The other systems that were timed on any tree, in words."""
    words = {"pytorch": "PyTorch over private copies", "flashinfer": "FlashInfer", "fa3": "FlashAttention-3"}
    timed = {name.split("_")[0] for row in rows for name, one in row["contenders"].items() if "cold_us" in one}
    return " and ".join(text for name, text in words.items() if name in timed)


def _mean(ratios: Any) -> str:
    return f"{np.exp(np.log(ratios).mean()):.2f}× ({ratios.min():.2f} to {ratios.max():.2f})"


def _simulated() -> list[str]:
    """Hit rates of the trace that went through the whole engine."""
    found = json.loads((RESULTS / "simulate.json").read_text(encoding="utf-8"))
    rows = [
        f"`bench.simulate`: {found['requests']:,} requests of a trace of conversations through the whole engine, on a "
        f"simulated clock. Ideal token hit rate {found['ideal_hit_rate']:.1%}.",
        "",
        "| KV pool, tokens | admitted by | token hit rate | of the ideal | median latency | × real time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows += [
        f"| {one['slots']:,} | {one['order']} | {one['hit_rate']:.1%} | {one['of_ideal']:.0%} "
        f"| {one['latency_p50_seconds']:.0f} s | {one['times_real_time']:.0f} |"
        for one in found["runs"]
    ]
    return rows


def _replace(text: str, name: str, body: str) -> str:
    pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    main()
