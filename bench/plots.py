"""Pictures of what was measured.

    python -m bench.plots [--out docs]

Of `bench/results/attention.json`, by tree and head shape: `attention_speedup` shows how many times as fast as the
fastest other contender our plan is, peers and our own other plans apart; `attention_roofline` what share of the
roofline it reaches. Each as PNG and SVG. Of `bench/results/reading.json`: `reading` shows what each reading policy
keeps and saves, by the keys that it reads, as SVG.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.attention import OWN
from bench.report import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"peers": "#0b6e99", "our other plans": "#b4b8bd", "roofline": "#0b6e99"}


def cold(row: dict[str, Any], names: Sequence[str]) -> float:
    """Microseconds of the fastest of these contenders; nan where none was timed."""
    return min((row["contenders"][n]["cold_us"] for n in names if "cold_us" in row["contenders"][n]), default=np.nan)


def label(row: dict[str, Any]) -> str:
    return f"{row['name']}  {row['heads'][0]}/{row['heads'][1]}"


def draw_speedup(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    ours = np.array([cold(row, ["radixgen"]) for row in rows])
    place = np.arange(len(rows))
    others = {
        "peers": [cold(row, [n for n in row["contenders"] if n not in OWN]) for row in rows],
        "our other plans": [cold(row, OWN[1:]) for row in rows],
    }
    for name, times in others.items():
        axes.plot(np.array(times) / ours, place, "o", color=COLOURS[name], label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10], labels=["½", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_xlabel("times as fast as the fastest of them")


def draw_roofline(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    share = [100 * row["roofline_us"] / cold(row, ["radixgen"]) for row in rows]
    axes.barh(np.arange(len(rows)), share, color=COLOURS["roofline"], height=0.6)
    axes.axvline(100.0, color="black", linewidth=0.8)
    axes.set_xlabel("percent of the roofline")


PICTURES = {"attention_speedup": draw_speedup, "attention_roofline": draw_roofline}


MEASURES = {
    "needles": "needles, inexact answers",
    "needles_prompts": "needles, inexact prompts too",
    "perplexity": "perplexity over the exact one",
    "decode": "time of a token over the exact one",
}
"""Figures of a policy, and the titles of their axes"""


def draw_policies(found: dict[str, Any], out: Path) -> None:
    """Write the picture of `bench.reading`'s results, `found`, to `out`."""
    from matplotlib import pyplot

    measured = {name: title for name, title in MEASURES.items() if any(name in row for row in found["rows"])}
    figure, cells = pyplot.subplots(1, len(measured), figsize=(4 * len(measured), 3.4), squeeze=False)
    for (measure, title), axes in zip(measured.items(), cells.flat, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["policy"] == policy and measure in row]
            axes.plot([row["keys"] for row in rows], [row[measure] for row in rows], "o-", label=policy)
        exact = found["exact_needles"][str(found["needle_length"])] if measure.startswith("needles") else 1.0
        axes.axhline(exact, color="black", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("keys read")
        axes.grid(alpha=0.3)
    cells.flat[0].legend(fontsize=8)
    figure.suptitle(f"{found['processor']}, {found['date']}, {found['commit']}; the line is exact reading", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "reading.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_attention(found: dict[str, Any], out: Path) -> None:
    """Write the pictures of `bench.attention`'s results, `found`, to `out`."""
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in found["rows"]))
    for name, draw in PICTURES.items():
        groups = [[row for row in found["rows"] if row["workload"] == workload] for workload in workloads]
        columns = min(3, len(groups))
        longest = [max(map(len, groups[i : i + columns])) for i in range(0, len(groups), columns)]
        figure, cells = pyplot.subplots(
            len(longest), columns, figsize=(5 * columns, sum(1.2 + 0.17 * count for count in longest)), squeeze=False,
            height_ratios=[4 + count for count in longest],
        )  # fmt: skip
        for axes in cells.flat[len(groups) :]:
            axes.axis("off")
        for workload, axes, rows in zip(workloads, cells.flat, groups, strict=False):
            draw(axes, rows)
            axes.set_yticks(range(len(rows)), labels=[label(row) for row in rows], fontsize=7)
            axes.invert_yaxis()
            axes.set_title(workload)
            axes.grid(axis="x", alpha=0.3)
        if cells.flat[0].get_legend_handles_labels()[0]:
            cells.flat[0].legend(loc="upper right", fontsize=8)
        figure.suptitle(f"{found['device']}, {found['date']}, {found['commit']}", fontsize=8)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=110, metadata={"Software": None})
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


DRAWN = {"attention": draw_attention, "reading": draw_policies}
"""Benchmarks with pictures"""


def main(arguments: Sequence[str] | None = None) -> int:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "radixgen"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=RESULTS.parent.parent / "docs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        path = options.results / f"{name}.json"
        if path.exists():
            draw(json.loads(path.read_text(encoding="utf-8")), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
