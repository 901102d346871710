"""Attention over the trees of published workloads, against the chip's limit and against its peers.

    python -m bench.attention [--workloads W5 W12] [--without fa3_paged] [--check] [--save]

Prints the ceilings measured in the same run; then, for each tree and head shape, the roofline (each distinct key
read once, queries and results once, or the matrix products at the measured rate, whichever is longer) and, for each
contender, microseconds with a cold cache, the share of the roofline, and the error: the norm of the difference from
our kernels in float32 under the naive plan, over the norm of that. Contenders: radixgen's plan by the calibrated cost
model; its own `unshared`, `prefix` and `naive` plans, run by the same kernels; and the peers that are installed
(bench/peers.py). A peer that fails on a tree is reported so, and the run goes on.

Times are of one layer in bfloat16, head_dim 128, in a CUDA graph, 192 MiB written before each call. Plans are
made before, and their time is printed beside. Without a GPU the kernels run in Triton's interpreter on toy sizes, and
nothing is timed.

Bias. Our plan is calibrated on the device that is measured; the peers' own settings are their defaults. Keys lie in one
extent a node, as a pool that was never full leaves them.
"""

import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.device import Ceilings, Timer
from bench.peers import PEERS, Call, Contender, peers
from bench.report import Report, benchmark_options, track
from bench.trees import WORKLOADS, Tree, lay_out, path_tokens, shared_prefix
from radixgen.calibration import cost_models
from radixgen.kernels.backend import backend
from radixgen.kernels.geometry import Geometry
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, plan

HEADS = {
    "W1": [(8, 1)], "W5": [(32, 32), (32, 8), (16, 1)], "W7": [(32, 8)], "W8": [(32, 8)], "W9": [(32, 32)],
    "W12": [(32, 8)],
}  # fmt: skip
HEAD_DIM = 128
OWN = ("radixgen", *PLAN_MODES[1:])
AGREEMENT = 0.02
"""A peer whose outputs are off by more than this share of their norm has not done the work, and is not timed."""


@dataclass
class Row:
    """One tree and head shape, with what each contender did."""

    workload: str
    name: str
    heads: tuple[int, int]
    roofline_us: float
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)

    def best_other(self) -> float:
        """The fastest contender besides our own plan."""
        return min(
            (found["cold_us"] for name, found in self.contenders.items() if name != "radixgen" and "cold_us" in found),
            default=float("inf"),
        )


def rows_of(names: Sequence[str]) -> list[tuple[str, str, tuple[int, int], Tree]]:
    return [(w, name, heads, tree) for w in names for heads in HEADS[w] for name, tree in WORKLOADS[w]()]


def roofline_us(tree: Tree, heads: tuple[int, int], ceilings: Ceilings) -> float:
    unique, unshared = path_tokens(tree)
    read = 2 * HEAD_DIM * 2 * (heads[1] * unique + heads[0] * len(tree[2]))
    return 1e6 * max(read / ceilings.read, 4 * HEAD_DIM * heads[0] * unshared / ceilings.matrix)


def inputs(tree: Tree, heads: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v; on a GPU in bfloat16."""
    forest, nodes, _ = lay_out(tree)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    slots = int(forest.lengths.sum())
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(nodes.size, heads[0], HEAD_DIM, device=device, dtype=dtype, generator=generator)
    k, v = torch.randn(2, slots, heads[1], HEAD_DIM, device=device, dtype=dtype, generator=generator)
    return q, k, v


def own(
    tree: Tree, q: Tensor, k: Tensor, v: Tensor, mode: PlanMode, cost: Sequence[CostModel]
) -> tuple[Call, dict[str, Any]]:
    """One of our own plans, as a call whose rows come in the plan's order: `back` puts them in the tree's."""
    forest, nodes, positions = lay_out(tree)
    begin = time.perf_counter()
    made = plan(forest, nodes, positions, mode=mode, cost=cost)
    seconds = time.perf_counter() - begin
    attention = backend("triton", q.device).attention(made, None, q.device)
    order = torch.from_numpy(made.row_order).to(q.device)
    queries, back = q[order], torch.argsort(order)
    return lambda: attention(queries, k, v, HEAD_DIM**-0.5)[0], {
        "plan_ms": 1e3 * seconds, "units": made.num_units, "keys_read": made.kv_tokens_read,
        "predicted_us": made.predicted, "back": back,
    }  # fmt: skip


def contenders(
    tree: Tree, q: Tensor, k: Tensor, v: Tensor, cost: Sequence[CostModel], without: Collection[str]
) -> Iterator[Contender]:
    """Our own plans first, then the peers."""
    for mode in PLAN_MODES:
        yield "radixgen" if mode == "auto" else mode, *own(tree, q, k, v, mode, cost)
    yield from peers(tree, q, k, v, without)


def run_row(row: Row, tree: Tree, timer: Timer | None, device: torch.device, without: Collection[str] = ()) -> None:
    """Every contender on one tree; of a peer that fails, its error is kept instead of its times."""
    geometry = Geometry(row.heads[1], row.heads[0] // row.heads[1], HEAD_DIM, HEAD_DIM, torch.bfloat16)
    q, k, v = inputs(tree, row.heads, device)
    call, exact = own(tree, q.float(), k.float(), v.float(), "naive", [CostModel()])
    reference = call()[exact["back"]]
    del call
    for name, call, facts in contenders(tree, q, k, v, cost_models(device, geometry), without):
        back = facts.pop("back", None)
        row.contenders[name] = facts
        try:
            out = call().float()
            out = out if back is None else out[back]
            facts |= compare(call, out, reference, timer, AGREEMENT if name not in OWN else math.inf)
        except Exception as error:
            if name in OWN:
                raise
            facts["error"] = f"{type(error).__name__}: {error}"[:300]
        del call


def compare(call: Call, out: Tensor, reference: Tensor, timer: Timer | None, agreement: float) -> dict[str, float]:
    """How far a contender's output is from the reference, and its times if that is near enough."""
    difference = float((out - reference).norm() / reference.norm())
    if not difference <= agreement:
        raise ValueError(f"differs by {difference:.2g}")
    if timer is None:
        return {"difference": difference}
    cold, warm = timer.cold(call), timer.warm(call)
    return {
        "difference": difference, "cold_us": cold.median, "cold_p10_us": cold.p10, "cold_p90_us": cold.p90,
        "warm_us": warm.median,
    }  # fmt: skip


def describe(row: Row) -> str:
    ours = row.contenders["radixgen"]
    if "cold_us" not in ours:
        return f"{row.workload} {row.name}: {ours['units']} units, differences at most " + (
            f"{max(found['difference'] for found in row.contenders.values()):.1e}"
        )
    others = ", ".join(
        f"{n} {f['cold_us']:.1f}" if "cold_us" in f else f"{n} failed ({f['error']})"
        for n, f in row.contenders.items()
        if n != "radixgen"
    )
    return (
        f"{row.workload} {row.heads[0]}/{row.heads[1]} {row.name:32s} roofline {row.roofline_us:7.1f} us; radixgen "
        f"{ours['cold_us']:7.1f} ({100 * row.roofline_us / ours['cold_us']:3.0f} %, "
        f"predicted {ours['predicted_us']:.0f}, "
        f"warm {ours['warm_us']:.1f}, plan {ours['plan_ms']:.1f} ms, {ours['units']} units); {others}; "
        f"{row.best_other() / ours['cold_us']:.2f} x"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument(
        "--workloads", nargs="+", default=["W5", "W1", "W12", "W7", "W8", "W9"], choices=list(WORKLOADS)
    )
    parser.add_argument("--without", nargs="+", default=[], choices=list(PEERS), help="peers to leave out")
    options = parser.parse_args(arguments)
    report = Report("attention")
    if not torch.cuda.is_available():
        return toy(report)
    device = torch.device("cuda")
    timer = Timer(device)
    ceilings = timer.ceilings()
    report.say(f"limit: {torch.cuda.get_device_name()} {ceilings.describe()}")
    done: list[Row] = []
    for workload, name, heads, tree in track(rows_of(options.workloads), "attending"):
        row = Row(workload, name, heads, roofline_us(tree, heads, ceilings))
        run_row(row, tree, timer, device, options.without)
        done.append(row)
        report.say(describe(row))
    summarize(report, done)
    keep_errors(report, done)
    report.keep(ceilings=asdict(ceilings), rows=[vars(row) for row in done])
    return report.finish(check=options.check, save=options.save)


def keep_errors(report: Report, done: Sequence[Row]) -> None:
    """Our error next to FlashAttention-3's on the unshared layout, or PyTorch's where that is not there."""
    pairs = []
    for row in done:
        theirs = [row.contenders[name].get("difference") for name in ("fa3_paged", "pytorch") if name in row.contenders]
        if theirs and theirs[0]:
            pairs.append((row.contenders["radixgen"]["difference"], theirs[0]))
    if pairs:
        worst = max(ours / other for ours, other in pairs)
        mean = float(np.mean([ours for ours, _ in pairs]))
        report.figure(
            "error_over_flash", worst,
            f"errors against float32: {mean:.1e} on average, at most {worst:.2f} x flash attention's unshared",
            at_most=1.0,
        )  # fmt: skip


def summarize(report: Report, done: Sequence[Row]) -> None:
    for workload, heads in dict.fromkeys((row.workload, row.heads) for row in done):
        rows = [row for row in done if (row.workload, row.heads) == (workload, heads)]
        ratios = [row.best_other() / row.contenders["radixgen"]["cold_us"] for row in rows]
        shares = [row.roofline_us / row.contenders["radixgen"]["cold_us"] for row in rows]
        errors = [
            abs(row.contenders["radixgen"]["predicted_us"] / row.contenders["radixgen"]["cold_us"] - 1) for row in rows
        ]
        label = f"{workload} {heads[0]}/{heads[1]}"
        mean, worst = float(np.exp(np.mean(np.log(ratios)))), rows[int(np.argmin(ratios))].name
        report.figure(
            f"{label} over the best other", mean,
            f"{label}: {mean:.2f} x the best other (geometric mean), worst {min(ratios):.2f} ({worst}); "
            f"{100 * float(np.mean(shares)):.0f} % of the roofline; "
            f"predicted within {100 * float(np.median(errors)):.0f} %",
        )  # fmt: skip


def toy(report: Report) -> int:
    """Small trees through every contender that runs here, untimed."""
    row = Row("toy", "3 rows, 70 + 5", (4, 2), 0.0)
    run_row(row, shared_prefix(3, 70, 5), None, torch.device("cpu"))
    report.say(describe(row))
    report.keep(rows=[vars(row)])
    return report.finish(check=False, save=False)


if __name__ == "__main__":
    sys.exit(main())
