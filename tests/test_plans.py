"""Plans of all published trees and of 10,000 random ones: what their rows see, what they cost, how they spread."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bench.trees import WORKLOADS, lay_out
from radixgen.calibration import cost_models
from radixgen.core import Plan
from radixgen.core.plan import Int32Array, reduce_ranges
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.schedule import makespan
from radixgen.scheduler.balance import ENOUGH, LEAST_KEYS
from radixgen.scheduler.planner import PLAN_MODES, CostModel, Forest, PlanMode, plan

Ints = NDArray[np.int64]
Laid = tuple[Forest, Int32Array, Int32Array]
"""A forest, and each row's node and position."""

PROCESSORS = 132
TREES = {f"{name} {tree}": built for name in ("W5", "W7", "W8", "W12") for tree, built in WORKLOADS[name]()}
COSTS: dict[str, Sequence[CostModel]] = {"default": (CostModel(),)} | {
    f"{q_heads}/{kv_heads}": cost_models(
        torch.device("cpu"), Geometry(kv_heads, q_heads // kv_heads, 128, 128, torch.bfloat16)
    )
    for q_heads, kv_heads in ((32, 32), (32, 8), (16, 1))
}
"""The default, and those shipped for the H100, by query and KV heads."""
BATCHES, BATCH = 10, 1000


def random_tree(seed: int) -> Laid:
    """Up to 24 nodes, bushy or deep, of 0 to 4,096 keys in up to 3 extents that lie in any order, and up to 40 rows,
    at the ends of nodes and inside them.
    """
    rng = np.random.default_rng(seed)
    size, reach = int(rng.integers(1, 25)), int(rng.choice([1, 2, 4, 24]))
    parents = np.maximum(np.arange(size) - rng.integers(1, reach + 1, size), -1)
    counts = rng.integers(0, 4, size)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    extents = (2.0 ** rng.uniform(-1, rng.choice([3, 7, 12]), offsets[-1])).astype(np.int64) // np.repeat(
        np.maximum(counts, 1), counts
    )
    sums = np.concatenate([[0], np.cumsum(extents)])
    lengths = np.diff(sums[offsets])
    starts = np.zeros_like(lengths)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            starts[node] = starts[parent] + lengths[parent]
    order = rng.permutation(extents.size)
    slots = np.empty_like(extents)
    slots[order] = np.cumsum(extents[order] + rng.integers(0, 2, extents.size)) - extents[order]
    nodes = rng.integers(0, size, rng.integers(1, 41)).astype(np.int32)
    back = rng.integers(0, np.maximum(lengths[nodes], 1)) * rng.integers(0, 2, nodes.size)
    positions = (starts + lengths)[nodes] - 1 - back
    narrow = [array.astype(np.int32) for array in (parents, starts, lengths, extents, positions)]
    return Forest(*narrow[:3], offsets, slots, narrow[3]), nodes, narrow[4]


def random_trees(batch: int) -> Iterator[tuple[int, Laid]]:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        yield seed, random_tree(seed)


# -- what the rows see ------------------------------------------------------------------------------------


def members(begin: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Every member of the half-open ranges `[begin, stop)`, and which range it is of."""
    counts = stop - begin
    owners = np.repeat(np.arange(counts.size), counts)
    return owners, np.arange(owners.size) + (begin - np.cumsum(counts) + counts)[owners]


def seen(found: Plan) -> Ints:
    """What the plan has its rows see: row, first position, keys, first slot of each piece, `[pieces, 4]`."""
    segment, row = members(*found.segment_rows.astype(np.int64).T)
    first = found.segment_positions[segment]
    keys = np.minimum(found.segment_lengths[segment], found.row_positions[row] + 1 - first)
    return np.stack([row, first, keys, found.segment_starts[segment]], axis=1)


def on_paths(forest: Forest, nodes: Int32Array, positions: Int32Array) -> Ints:
    """What the rows are to see, as `seen` gives it, from the extents of their paths."""
    holder, extent = members(forest.extent_offsets[:-1], forest.extent_offsets[1:])
    before = np.concatenate([[0], np.cumsum(forest.extent_lengths)])
    firsts = forest.starts[holder] + before[extent] - before[forest.extent_offsets[holder]]
    pieces = []
    rows, at = np.arange(nodes.size), nodes
    while rows.size:
        owner, extent = members(forest.extent_offsets[at], forest.extent_offsets[at + 1])
        row, first = rows[owner], firsts[extent]
        keys = np.minimum(forest.extent_lengths[extent], positions[row] + 1 - first)
        pieces.append(np.stack([row, first, keys, forest.extent_starts[extent]], axis=1))
        rows, at = rows[forest.parents[at] >= 0], forest.parents[at]
        at = at[at >= 0]
    return np.concatenate(pieces)


def tiles(pieces: Ints, positions: Int32Array) -> Ints:
    """Row, first position and slot of each run of consecutive slots, once the pieces are seen to tile each row's
    positions up to its own, without gap or overlap.
    """
    pieces = pieces[pieces[:, 2] > 0]
    row, first, keys, slot = pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))].T
    ends = first + keys
    begins = np.append(True, row[1:] != row[:-1])[: row.size]
    closes = np.append(begins[1:], True)[: row.size]
    assert np.array_equal(row[begins], np.flatnonzero(positions >= 0))
    assert not first[begins].any() and np.array_equal(ends[closes], positions[row[closes]] + 1)
    assert np.array_equal(first[1:][~begins[1:]], ends[:-1][~begins[1:]])
    begins[1:] |= np.diff(slot - first) != 0
    return np.stack([row, first, slot], axis=1)[begins]


def assert_covers(found: Plan, forest: Forest, nodes: Int32Array, positions: Int32Array) -> None:
    """Every row sees its path, each key once, from the slot that holds it, and nothing else is read."""
    order, segments = found.row_order, len(found.segment_starts)
    assert np.array_equal(np.sort(order), np.arange(nodes.size))
    assert np.array_equal(found.row_positions, positions[order])
    here = tiles(seen(found), found.row_positions)
    assert np.array_equal(here, tiles(on_paths(forest, nodes[order], positions[order]), found.row_positions))
    unit, segment = members(*found.unit_segments.astype(np.int64).T)
    assert np.array_equal(segment, np.arange(segments))
    rows, readers = found.unit_rows[unit], found.segment_rows
    assert (rows[:, 0] <= readers[:, 0]).all() and (readers[:, 1] <= rows[:, 1]).all()
    newest = reduce_ranges(np.maximum, found.row_positions, readers)
    assert (found.segment_lengths > 0).all()
    assert (found.segment_positions + found.segment_lengths <= newest + 1).all()


@pytest.mark.parametrize("heads", COSTS)
@pytest.mark.parametrize("tree", TREES)
def test_each_published_tree_is_read_once(tree: str, heads: str) -> None:
    laid = lay_out(TREES[tree])
    for mode in PLAN_MODES:
        found = plan(*laid, mode=mode, cost=COSTS[heads])
        assert_covers(found, *laid)
        assert mode != "auto" or found.num_units <= 64 * PROCESSORS


@pytest.mark.parametrize("batch", range(BATCHES))
def test_each_random_tree_is_read_once(batch: int) -> None:
    for seed, laid in random_trees(batch):
        heads = list(COSTS)[seed % len(COSTS)]
        for mode in ("auto", PLAN_MODES[1 + seed // len(COSTS) % 3]):
            assert_covers(plan(*laid, mode=mode, cost=COSTS[heads]), *laid)
