"""From active nodes and their rows to a `Plan`: depth-first rows, units, segments.

The loops over nodes are compiled (`radixgen.scheduler.partition`); around them is array work.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from radixgen.cache import RadixTree
from radixgen.core import NodeSummary, Plan
from radixgen.core.plan import Int32Array, Int64Array, reduce_ranges
from radixgen.scheduler.balance import piece_limits
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.partition import MAX_STATES, collect, fill_segments, partition, preorder

__all__ = ["PLAN_MODES", "CostModel", "Forest", "PlanMode", "Planner", "TileCost", "active_forest", "plan"]

PlanMode = Literal["auto", "unshared", "prefix", "naive"]
PLAN_MODES: tuple[PlanMode, ...] = ("auto", "unshared", "prefix", "naive")


@dataclass(frozen=True, slots=True)
class Forest:
    """The nodes of a step, parents before children, and the extents of their keys; arrays are `[nodes]`."""

    parents: Int32Array
    """-1 at a root."""
    starts: Int32Array
    """Position of the node's first token."""
    lengths: Int32Array
    """Keys in the node."""
    extent_offsets: Int64Array
    """`[nodes + 1]`: node `i` holds extents `[extent_offsets[i], extent_offsets[i + 1])`."""
    extent_starts: Int64Array
    """`[extents]`"""
    extent_lengths: Int32Array
    """`[extents]`, adding up to the node's length."""
    rooms: Int32Array | None = None
    """Slots behind the node's last extent into which it can grow; none by default."""


def plan(
    forest: Forest,
    row_nodes: Int32Array,
    row_positions: Int32Array,
    *,
    mode: PlanMode = "auto",
    cost: CostModel | None = None,
) -> Plan:
    """The plan of one step.

    `row_nodes` `[rows]` names each row's node in `forest`; `row_positions` `[rows]` its position inside that
    node's range. Nodes below which no row stands are left out. `mode="auto"` is the cheapest that `cost` knows;
    `"unshared"` gives every node's own rows one unit with their whole path (no read is shared); `"prefix"` shares only
    what all rows of a root have in common; `"naive"` makes every node that has keys, and rows below it, a unit of its
    own.
    """
    cost = cost or CostModel()
    size = forest.parents.size + 1
    # One root above all: rows of several trees are siblings like any others.
    parents = np.empty(size, np.int64)
    parents[0], parents[1:] = -1, forest.parents + 1
    lengths = np.zeros(size, np.int64)
    lengths[1:] = forest.lengths
    starts = np.zeros(size, np.int64)
    starts[1:] = forest.starts
    offsets = np.zeros(size + 1, np.int64)
    offsets[1:] = forest.extent_offsets
    rooms = np.zeros(size, np.int64)
    if forest.rooms is not None:
        rooms[1:] = forest.rooms
    row_positions = row_positions.astype(np.int64)
    lowest, walk, keys, order = preorder(parents, row_nodes.astype(np.int64) + 1, row_positions, lengths)
    positions = row_positions[order]
    tiles, price = cost.columns(), cost.partial * cost.group
    units, fates = collect(walk, keys, *_choose(walk, keys, mode, cost), *tiles)
    limits = piece_limits(units[:, 1] - units[:, 0], units[:, 7], cost)
    layout = (
        units, limits, walk, lowest, parents, starts, lengths, offsets, forest.extent_starts,
        forest.extent_lengths.astype(np.int64), rooms, positions,
    )  # fmt: skip
    nothing = np.empty((0, 7), np.int64)
    num_units, num_segments = fill_segments(*layout, nothing, nothing)
    table, segments = np.empty((num_units, 7), np.int64), np.empty((num_segments, 7), np.int64)
    fill_segments(*layout, table, segments)
    begun = np.bincount(table[:, 0], minlength=positions.size + 1)
    ended = np.bincount(table[:, 1], minlength=positions.size + 1)
    extra = np.cumsum(begun - ended)[:-1] - 1
    unit_cost = cost.unit_costs(table[:, 1] - table[:, 0], table[:, 6])
    unit_cost += np.where(reduce_ranges(np.maximum, extra, table[:, :2]) > 0, price, 0.0) * (table[:, 1] - table[:, 0])
    return Plan(
        row_positions=positions.astype(np.int32),
        row_order=order,
        row_extra=extra.astype(np.int32),
        unit_rows=table[:, :2].astype(np.int32),
        unit_segments=table[:, 2:4].astype(np.int32),
        unit_rank=(table[:, 4] * (table[:, 5].max(initial=0) + 1) + table[:, 5]).astype(np.int32),
        unit_cost=unit_cost,
        segment_starts=np.ascontiguousarray(segments[:, 0]),
        segment_lengths=segments[:, 1].astype(np.int32),
        segment_positions=segments[:, 2].astype(np.int32),
        segment_rows=segments[:, 3:5].astype(np.int32),
        segment_room=segments[:, 6].astype(np.int32),
        growing=np.flatnonzero(segments[:, 5]),
        path_rows=_path_rows(walk, int(tiles[0].max())),
        nodes=NodeSummary(
            depths=(walk[1:, 1] - 1).astype(np.int32),
            lengths=keys[1:].astype(np.int32),
            rows=walk[1:, 3].astype(np.int32),
            fates=fates[1:, 0].astype(np.int8),
            readers=fates[1:, 1].astype(np.int32),
        ),
    )


def _choose(walk: Int64Array, keys: Int64Array, mode: PlanMode, cost: CostModel) -> tuple[Int64Array, Int64Array]:
    """Which nodes are cut and where runs end, as `collect` takes them."""
    if mode == "auto":
        most_pending = int(min(walk[:, 1].max(initial=0) + 1, max(4, MAX_STATES // max(len(walk), 1))))
        may_cut = np.ones(len(walk), np.int64)
        _, cuts, runs = partition(
            walk, keys, may_cut, cost.mix, *cost.columns(), cost.partial * cost.group, most_pending
        )
        return cuts, runs
    cut = np.zeros((len(walk), 1), np.int64)
    if mode == "naive":
        cut[:, 0] = (keys > 0) & (walk[:, 3] > walk[:, 4])
    elif mode == "prefix":
        cut[:, 0] = (keys > 0) & (walk[:, 3] > walk[:, 4]) & (walk[:, 1] == 1)
    return cut, np.full((len(walk), 1, 2), -1, np.int64)


def _path_rows(walk: Int64Array, tile_rows: int) -> Int32Array:
    """The rows of each node, in tiles, as reading without sharing would have them: `[tiles, 2]`."""
    own, first = walk[:, 4], walk[:, 5]
    tiles = -(-own // tile_rows)
    rank = np.arange(int(tiles.sum())) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    begin = np.repeat(first, tiles) + rank * tile_rows
    return np.stack([begin, np.minimum(begin + tile_rows, np.repeat(first + own, tiles))], axis=1).astype(np.int32)


class Planner:
    """Plans the steps of one tree, and carries a plan over where only lengths grew."""

    def __init__(self, tree: RadixTree, *, mode: PlanMode = "auto", cost: CostModel | None = None) -> None:
        self.tree = tree
        self.mode = mode
        self.cost = cost or CostModel()
        self._last: Plan | None = None
        self._version = -1
        self._node_ids = np.empty(0, np.int32)
        self._row_positions = np.empty(0, np.int32)

    @property
    def last(self) -> Plan | None:
        """The plan of the step before, if any."""
        return self._last

    def plan(self, node_ids: Int32Array, row_positions: Int32Array) -> Plan:
        """Plan rows that stand at `row_positions` `[rows]` in the tree nodes with these ids, `node_ids` `[rows]`."""
        if self._last is not None and self._only_grew(node_ids, row_positions):
            self._last = self._last.advance()
        else:
            forest, row_nodes = active_forest(self.tree, node_ids)
            self._last = plan(forest, row_nodes, row_positions, mode=self.mode, cost=self.cost)
        self._version = self.tree.version
        self._node_ids, self._row_positions = node_ids, row_positions
        return self._last

    def _only_grew(self, node_ids: Int32Array, row_positions: Int32Array) -> bool:
        """Whether each row is its leaf's last token, in the same leaf as before and one token further."""
        assert self._last is not None
        if self._version != self.tree.version or node_ids.size != self._node_ids.size:
            return False
        if self._last.growing.size != node_ids.size:
            return False
        columns = self.tree.columns
        ends = columns.start[node_ids] + columns.scheduled[node_ids]
        return (
            np.array_equal(node_ids, self._node_ids)
            and np.array_equal(row_positions, self._row_positions + 1)
            and np.array_equal(row_positions, ends - 1)
        )


def active_forest(tree: RadixTree, node_ids: Int32Array) -> tuple[Forest, Int32Array]:
    """The nodes on the paths of `node_ids`, renumbered with parents first, and each row's new number."""
    columns = tree.columns
    ids = np.sort(np.array(tree.with_ancestors(node_ids.tolist()), np.int64))
    # Roots hold no token, so a root's children start where it does.
    depth_key = 2 * columns.start[ids].astype(np.int64) + (columns.parent[ids] >= 0)
    order = np.argsort(depth_key, kind="stable")
    local = np.empty(ids.size, np.int32)
    local[order] = np.arange(ids.size, dtype=np.int32)
    active = ids[order]
    above = columns.parent[active]
    parents = np.where(above >= 0, local[np.searchsorted(ids, above)], np.int32(-1))
    scheduled = columns.scheduled[active]
    offsets, starts, lengths = _extents(tree, active, scheduled)
    rooms = columns.reserved[active]
    forest = Forest(parents, columns.start[active], scheduled, offsets, starts, lengths, rooms)
    return forest, local[np.searchsorted(ids, node_ids)]


def _extents(tree: RadixTree, active: Int64Array, scheduled: Int32Array) -> tuple[Int64Array, Int64Array, Int32Array]:
    """The extents of the scheduled tokens of `active`, as `Forest` holds them; no reserved tails."""
    counts = np.where(scheduled > 0, tree.columns.num_extents[active], 0)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    starts = np.repeat(tree.columns.first_slot[active], counts)
    lengths = np.repeat(scheduled, counts)
    several = np.flatnonzero(counts > 1)
    if several.size:
        pairs = np.concatenate([tree.node(i).extent_array() for i in active[several].tolist()])
        place = np.repeat(counts > 1, counts)
        before = np.cumsum(pairs[:, 1]) - pairs[:, 1]
        first = np.repeat(np.cumsum(counts[several]) - counts[several], counts[several])
        starts[place] = pairs[:, 0]
        lengths[place] = np.clip(lengths[place] - (before - before[first]), 0, pairs[:, 1])
    return offsets, starts, lengths
