"""How long a plan takes: 1,024 decoding leaves under about 2,000 nodes, in trees of three shapes.

    python -m bench.plan [--check]

From nothing: `Planner.plan` reads the tree's columns and lays out every row, unit and segment anew, by the default
costs, and by those that are shipped for the H100, for 32 query and 8 KV heads.
Carried: every leaf has grown by one token in place, and only lengths and positions move on. Revised: one leaf has
ended, and every 16th of the others has gone on to a new extent. Bounds, with --check, on each shape: 1 ms from
nothing, 0.05 ms carried, 0.05 ms revised, medians.

The limit is the copy of the finished plan's arrays at the memory bandwidth of one core: what a planner that
had nothing to find out would still have to write.

Bias. A node holds 8 tokens, every leaf has been grown in turn with the others, so that it lies in several
extents, and the tree holds nothing but what is planned. Advancing the tree itself is not timed.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch

from bench.report import Memory, Report, benchmark_options, measure_memory, time_each, time_pieces, track
from radixgen.cache import ExtentPool, Lock, RadixTree
from radixgen.calibration import cost_models
from radixgen.core import Plan
from radixgen.kernels.geometry import Geometry
from radixgen.scheduler import planner as planner_module
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.revise import StepRows

LEAVES = 1_024
RUN = 8
GROWTH = 40
"""Tokens that each leaf has decoded before the first plan."""
RESERVE = 16
H100 = Geometry(kv_heads=8, group=4, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
PIECES = ("active_forest", "walk_paths", "_choose", "_fill")


# -- shapes: the parent of each node, parents first, -1 for the first -------------------------------------


def bush(leaves: int) -> list[int]:
    """Every node has two children: log2 levels."""
    return [-1, *((node - 1) // 2 for node in range(1, 2 * leaves - 1))]


def random_splits(leaves: int) -> list[int]:
    """A random leaf parts in two until there are enough."""
    rng = np.random.default_rng(0)
    parents, ends = [-1], [0]
    while len(ends) < leaves:
        place = int(rng.integers(len(ends)))
        parents += [ends[place]] * 2
        ends[place] = len(parents) - 2
        ends.append(len(parents) - 1)
    return parents


def chain(leaves: int) -> list[int]:
    """One leaf leaves a spine at each level: as many levels as leaves."""
    parents = [-1]
    for _ in range(leaves - 1):
        spine = len(parents) - 1
        parents += [spine, spine]
    return parents


SHAPES: dict[str, Callable[[int], list[int]]] = {
    "bush": bush,
    "random": random_splits,
    "chain": chain,
}


def grow(parents: Sequence[int]) -> tuple[RadixTree, list[Lock]]:
    """A tree of this shape, and a cursor on each of its leaves."""
    tree = RadixTree(ExtentPool(len(parents) * (RUN + GROWTH + 1_000)))
    start = tree.insert([0])
    tree.schedule(start.held, 1)
    tree.commit(start.held)
    cursors: list[Lock] = []
    for node, parent in enumerate(parents):
        cursor = tree.lock(cursors[parent].held if parent >= 0 else start.held)
        cursors.append(cursor)
        tree.advance([cursor], node)
        for token in range(1, RUN):
            tree.advance([cursor], token)
        tree.schedule(cursor.held, RUN, RESERVE)
        tree.commit(cursor.held)
    inner = set(parents)
    leaves = [cursor for node, cursor in enumerate(cursors) if node not in inner]
    for node in inner - {-1}:
        tree.unlock(cursors[node])
    tree.unlock(start)
    for _ in range(GROWTH):
        advance(tree, leaves)
    return tree, leaves


def advance(tree: RadixTree, leaves: Sequence[Lock], reserve: int = RESERVE) -> None:
    """One decoded and computed token on every leaf."""
    for cursor in leaves:
        node = tree.advance([cursor], 1)
        tree.schedule(node, 1, reserve)
        tree.commit(node)


def rows(leaves: Sequence[Lock]) -> StepRows:
    """The last token of each leaf."""
    nodes = [cursor.held for cursor in leaves]
    return StepRows(
        np.array([node.id for node in nodes], np.int32),
        np.array([node.end - 1 for node in nodes], np.int32),
        np.concatenate([node.slots(node.known - 1, node.known) for node in nodes]),
        np.zeros(len(nodes), np.int32),
    )


# -- measuring --------------------------------------------------------------------------------------------


def time_carried(tree: RadixTree, leaves: Sequence[Lock], times: int) -> list[float]:
    """Seconds of each plan that was carried over, of `times` steps in which every leaf grows by one token."""
    planner = Planner(tree)
    advance(tree, leaves, reserve=times)
    planner.plan(*rows(leaves))
    seconds = []
    for _ in range(times):
        advance(tree, leaves)
        grown = rows(leaves)
        begin = time.perf_counter()
        step = planner.plan(*grown)
        elapsed = time.perf_counter() - begin
        if not step.rebuilt:
            seconds.append(elapsed)
    return seconds


def time_revised(tree: RadixTree, leaves: Sequence[Lock], times: int) -> list[float]:
    """Seconds of each plan that was revised, of `times` steps; the leaves that end are unlocked."""
    planner = Planner(tree)
    left, seconds = list(leaves), []
    tree.reclaim_reserves(tree.reserved_tokens)
    for place, cursor in enumerate(left):
        advance(tree, [cursor], reserve=1 + place % RESERVE)
    built = planner.plan(*rows(left))
    for turn in range(min(times, len(left) // 9)):
        tree.unlock(left.pop(7 * turn % len(left)))
        advance(tree, left)
        grown = rows(left)
        begin = time.perf_counter()
        step = planner.plan(*grown)
        elapsed = time.perf_counter() - begin
        if step.nodes is built.nodes:
            seconds.append(elapsed)
        built = step
    return seconds


def num_bytes(plan: Plan) -> int:
    values = [getattr(part, f.name) for part in (plan, plan.nodes) for f in fields(part)]
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def report_shape(report: Report, name: str, leaves: int, times: int, memory: Memory) -> None:
    tree, cursors = grow(SHAPES[name](leaves))
    last = rows(cursors)
    plan = Planner(tree).plan(*last)
    limit = num_bytes(plan) / memory.copy
    report.say(
        f"limit, {name}: {1e3 * limit:.4f} ms to copy the plan's {num_bytes(plan):,} bytes; "
        f"{plan.num_rows:,} rows, {plan.nodes.depths.size:,} nodes on {int(plan.nodes.depths.max()) + 1:,} "
        f"levels, {plan.num_units:,} units, {len(plan.segment_starts):,} segments"
    )

    planner = Planner(tree)

    def from_nothing() -> None:
        planner.build_plan(last)

    seconds = time_each(from_nothing, times=times, warm_up=3)
    pieces = time_pieces(planner_module, PIECES, from_nothing, times=times)
    carried = time_carried(tree, cursors, times)
    median = float(np.median(seconds))
    report.figure(
        f"{name}_from_nothing_ms",
        1e3 * median,
        f"{name}: {1e3 * median:.2f} ms from nothing, median of {times} (best {1e3 * min(seconds):.2f}), "
        f"{median / limit:.0f} times the limit",
        at_most=1.0,
    )
    parts = {piece.strip("_"): 1e3 * spent for piece, spent in pieces.items()}
    parts["rest"] = 1e3 * median - sum(parts.values())
    report.say(f"{name}:   " + ", ".join(f"{piece} {spent:.2f}" for piece, spent in parts.items()))
    planner = Planner(tree, cost=cost_models(torch.device("cpu"), H100))
    shipped = time_each(lambda: planner.build_plan(last), times=times, warm_up=3)
    shipped_ms = 1e3 * float(np.median(shipped))
    report.figure(
        f"{name}_shipped_ms",
        shipped_ms,
        f"{name}: {shipped_ms:.2f} ms from nothing by the H100's costs, median of {times} "
        f"(best {1e3 * min(shipped):.2f})",
        at_most=1.0,
    )
    carried_ms = 1e3 * float(np.median(carried)) if carried else float("inf")
    report.figure(
        f"{name}_carried_ms",
        carried_ms,
        f"{name}: {carried_ms:.3f} ms carried, median of {len(carried)} of {times} steps",
        at_most=0.05,
    )
    revised = time_revised(tree, cursors, times)
    revised_ms = 1e3 * float(np.median(revised)) if revised else float("inf")
    report.figure(
        f"{name}_revised_ms",
        revised_ms,
        f"{name}: {revised_ms:.3f} ms revised, median of {len(revised)} of {times} steps",
        at_most=0.05,
    )
    report.keep(
        **{
            f"{name}_pieces_ms": parts,
            f"{name}_nodes": plan.nodes.depths.size,
            f"{name}_units": plan.num_units,
            f"{name}_segments": len(plan.segment_starts),
            f"{name}_limit_ms": 1e3 * limit,
            f"{name}_from_nothing_seconds": seconds,
            f"{name}_shipped_seconds": shipped,
            f"{name}_carried_seconds": carried,
            f"{name}_revised_seconds": revised,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--leaves", type=int, default=LEAVES)
    parser.add_argument("--times", type=int, default=50, help="plans timed, of each kind and shape")
    options = parser.parse_args(arguments)

    report = Report("plan")
    memory = measure_memory()
    report.say(f"limit: one core copies {memory.copy / 1e9:.1f} GB/s")
    report.keep(copy_bytes_per_second=memory.copy, leaves=options.leaves)
    for name in track(list(SHAPES), "planning"):
        report_shape(report, name, options.leaves, options.times, memory)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
