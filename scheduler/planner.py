"""From active nodes and their rows to a `Plan`: depth-first rows, units, segments.

All of it is array work: the only Python loops run over the levels of the tree.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import RadixTree
from radixgen.core import NodeSummary, Plan
from radixgen.core.plan import Int32Array, Int64Array, reduce_ranges

PlanMode = Literal["auto", "unshared", "naive"]
PLAN_MODES: tuple[PlanMode, ...] = ("auto", "unshared", "naive")


@dataclass(frozen=True, slots=True)
class CostModel:
    """What attention costs, in units of one key read by one unit. Only ratios matter.

    The defaults suit PyTorch on a CPU at head_dim 64: a unit costs an operator's dispatch, a partial row
    costs its write, read and merge.
    """

    unit: float = 64.0
    partial_row: float = 4.0
    tile_rows: int = 128
    """A unit's rows at the most; wider ones become several units that read the same keys."""


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
    node's range. Nodes below which no row stands are left out. `mode="unshared"` gives every node's own rows
    one unit with their whole path (no read is shared); `"naive"` makes every node a unit of its own.
    """
    cost = cost or CostModel()
    row_order = np.lexsort((row_positions, row_nodes))
    own = np.bincount(row_nodes, minlength=forest.parents.size).astype(np.int32)
    walk = _Walk(forest.parents, own)
    row_order, positions = walk.order_rows(row_order, row_nodes, row_positions)
    choice = _choose(forest, walk, mode, cost)
    heads = _heads(walk, choice.cut, cost.tile_rows)
    units, segments = _assemble(forest, walk, choice.cut, heads, positions)
    covered = np.zeros(positions.size + 1, np.int32)
    np.add.at(covered, units.rows[:, 0], 1)
    np.add.at(covered, units.rows[:, 1], -1)
    return Plan(
        row_positions=positions,
        row_order=row_order,
        row_extra=np.maximum(np.cumsum(covered[:-1], dtype=np.int32) - 1, 0),
        unit_rows=units.rows,
        unit_segments=units.segments,
        unit_rank=units.rank,
        segment_starts=segments.starts,
        segment_lengths=segments.lengths,
        segment_positions=segments.positions,
        segment_rows=segments.rows,
        growing=segments.growing,
        path_rows=_heads(walk, np.zeros_like(choice.cut), cost.tile_rows)[1].astype(np.int32),
        nodes=choice,
    )


class Planner:
    """Plans the steps of one tree, and carries a plan over where only lengths grew."""

    def __init__(self, tree: RadixTree, *, mode: PlanMode = "auto", cost: CostModel | None = None) -> None:
        self.tree = tree
        self.mode = mode
        self.cost = cost or CostModel()
        self._last: Plan | None = None
        self._version = -1
        self._row_ids = np.empty(0, np.int32)
        self._row_positions = np.empty(0, np.int32)

    @property
    def last(self) -> Plan | None:
        """The plan of the step before, if any."""
        return self._last

    def plan(self, row_ids: Int32Array, row_positions: Int32Array) -> Plan:
        """Plan rows that stand at `row_positions` `[rows]` in the tree nodes `row_ids` `[rows]`."""
        if self._last is not None and self._only_grew(row_ids, row_positions):
            self._last = self._last.advance()
        else:
            forest, row_nodes = active_forest(self.tree, row_ids)
            self._last = plan(forest, row_nodes, row_positions, mode=self.mode, cost=self.cost)
        self._version = self.tree.version
        self._row_ids, self._row_positions = row_ids, row_positions
        return self._last

    def _only_grew(self, row_ids: Int32Array, row_positions: Int32Array) -> bool:
        """Whether each row is its leaf's last token, in the same leaf as before and one token further."""
        assert self._last is not None
        if self._version != self.tree.version or row_ids.size != self._row_ids.size:
            return False
        if self._last.growing.size != row_ids.size:
            return False
        columns = self.tree.columns
        ends = columns.start[row_ids] + columns.scheduled[row_ids]
        return (
            np.array_equal(row_ids, self._row_ids)
            and np.array_equal(row_positions, self._row_positions + 1)
            and np.array_equal(row_positions, ends - 1)
        )


def active_forest(tree: RadixTree, row_ids: Int32Array) -> tuple[Forest, Int32Array]:
    """The nodes on the paths of `row_ids`, renumbered with parents first, and each row's new number."""
    columns = tree.columns
    ids = np.unique(row_ids)
    seen = [ids]
    known = np.zeros(columns.parent.size, np.bool_)
    known[ids] = True
    while ids.size:
        above = columns.parent[ids]
        above = above[above >= 0]
        ids = np.unique(above[~known[above]])
        known[ids] = True
        seen.append(ids)
    active = np.concatenate(seen)
    # Roots hold no token, so a root's children start where it does.
    active = active[np.lexsort((columns.parent[active] >= 0, columns.start[active]))]
    local = np.full(columns.parent.size + 1, -1, np.int32)
    local[active] = np.arange(active.size, dtype=np.int32)
    parents = local[columns.parent[active]]
    scheduled = columns.scheduled[active]
    counts = np.where(scheduled > 0, np.maximum(columns.num_extents[active], 1), 0)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    starts = np.repeat(columns.first_slot[active], counts)
    lengths = np.repeat(scheduled, counts)
    for index in np.flatnonzero(counts > 1).tolist():
        left = int(scheduled[index])
        for place, extent in enumerate(tree.node(int(active[index])).extents, int(offsets[index])):
            starts[place] = extent.start
            lengths[place] = min(extent.length, left)
            left -= int(lengths[place])
    forest = Forest(parents, columns.start[active], scheduled, offsets, starts, lengths)
    return forest, local[row_ids]


class _Walk:
    """The depth-first walk: how deep each node is, and which rows `[first, stop)` stand at it or below."""

    def __init__(self, parents: Int32Array, own: Int32Array) -> None:
        self.parents = parents
        self.own = own
        self.depths = _depths(parents)
        order = np.lexsort((parents, self.depths))
        bounds = np.searchsorted(self.depths[order], np.arange(self.depths.max(initial=0) + 2))
        self.levels = [
            order[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True) if high > low
        ]
        self.below = own.astype(np.int64)
        for level in reversed(self.levels[1:]):
            np.add.at(self.below, parents[level], self.below[level])
        self.first = np.zeros(parents.size, np.int64)
        for level in self.levels:
            self._place(level)
        self.stop = self.first + self.below

    def _place(self, level: Int64Array) -> None:
        """Siblings stand together in `level`: each begins where the one before it ends."""
        above = self.parents[level]
        before = np.cumsum(self.below[level]) - self.below[level]
        if above[0] < 0:
            self.first[level] = before
            return
        eldest = np.searchsorted(above, above)
        self.first[level] = self.first[above] + self.own[above] + before - before[eldest]

    def order_rows(
        self, by_node: Int64Array, row_nodes: Int32Array, row_positions: Int32Array
    ) -> tuple[Int64Array, Int32Array]:
        """Depth-first order of rows that `by_node` sorts by node and position."""
        nodes = row_nodes[by_node]
        rank = np.arange(nodes.size) - np.searchsorted(nodes, nodes)
        order = np.empty_like(by_node)
        order[self.first[nodes] + rank] = by_node
        return order, row_positions[order].astype(np.int32)


def _depths(parents: Int32Array) -> Int32Array:
    """Distance to the root by pointer jumping: log2(depth) array operations."""
    depths = (parents >= 0).astype(np.int32)
    jump = np.where(parents >= 0, parents, np.arange(parents.size))
    while True:
        further = depths[jump]
        if not further.any():
            return depths
        depths = depths + further
        jump = jump[jump]


def _tiles(rows: NDArray[np.int64], tile_rows: int) -> NDArray[np.int64]:
    return -(-rows // tile_rows)


def _choose(forest: Forest, walk: _Walk, mode: PlanMode, cost: CostModel) -> NodeSummary:
    """Fold or cut each node, from the leaves up.

    A folded node is read once by every unit below it; a cut one once by itself (once a tile), at the price
    of a unit and of a partial for each row below. Fold where that is no dearer.
    """
    size = walk.parents.size
    tiles = _tiles(walk.below, cost.tile_rows)
    readers = _tiles(walk.own.astype(np.int64), cost.tile_rows)
    fold_cost = np.zeros(size)
    cut_cost = cost.unit * tiles + cost.partial_row * walk.below
    cut = np.zeros(size, np.bool_)
    for level in reversed(walk.levels):
        again = np.maximum(readers[level] - tiles[level], 0)
        fold_cost[level] = again * forest.lengths[level]
        if mode == "auto":
            cut[level] = fold_cost[level] > cut_cost[level]
        elif mode == "naive":
            cut[level] = (forest.lengths[level] > 0) & (walk.below[level] > walk.own[level])
        above = walk.parents[level]
        if above[0] >= 0:
            np.add.at(readers, above, np.where(cut[level], tiles[level], readers[level]))
    return NodeSummary(
        depths=walk.depths,
        lengths=forest.lengths,
        rows=walk.below.astype(np.int32),
        cut=cut,
        fold_cost=fold_cost,
        cut_cost=cut_cost,
    )


def _heads(walk: _Walk, cut: NDArray[np.bool_], tile_rows: int) -> tuple[Int64Array, NDArray[np.int64]]:
    """The unit tiles: `nodes` `[units]` that head them and their rows `[units, 2]`, in order of rows."""
    count = np.where(cut, walk.below, walk.own.astype(np.int64))
    tiles = _tiles(count, tile_rows)
    nodes = np.repeat(np.arange(count.size), tiles)
    rank = np.arange(nodes.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    first = walk.first[nodes] + rank * tile_rows
    stop = np.minimum(first + tile_rows, (walk.first + count)[nodes])
    order = np.lexsort((walk.depths[nodes], first))
    return nodes[order], np.stack([first, stop], axis=1)[order]


@dataclass(frozen=True, slots=True)
class _Units:
    rows: Int32Array
    segments: Int32Array
    rank: Int32Array


@dataclass(frozen=True, slots=True)
class _Segments:
    starts: Int64Array
    lengths: Int32Array
    positions: Int32Array
    rows: Int32Array
    growing: Int64Array


def _assemble(
    forest: Forest,
    walk: _Walk,
    cut: NDArray[np.bool_],
    heads: tuple[Int64Array, NDArray[np.int64]],
    positions: Int32Array,
) -> tuple[_Units, _Segments]:
    """Give each unit its head's extents and those of the folded nodes above it, root first."""
    nodes, rows = heads
    count = nodes.size
    folded_above = np.where((walk.parents >= 0) & ~cut[np.maximum(walk.parents, 0)], walk.parents, -1)
    unit_of, node_of = [np.arange(count)], [nodes]
    while True:
        above = folded_above[node_of[-1]]
        more = above >= 0
        if not more.any():
            break
        unit_of.append(unit_of[-1][more])
        node_of.append(above[more])
    units = np.concatenate(unit_of)
    members = np.concatenate(node_of)
    order = np.lexsort((walk.depths[members], units))
    units, members = units[order], members[order]

    extents = forest.extent_offsets[members + 1] - forest.extent_offsets[members]
    segment_units = np.repeat(units, extents)
    segment_nodes = np.repeat(members, extents)
    begin = np.cumsum(extents) - extents
    place = np.arange(segment_units.size) - np.repeat(begin - forest.extent_offsets[members], extents)
    starts = forest.extent_starts[place]
    lengths = forest.extent_lengths[place]
    inside = np.cumsum(forest.extent_lengths) - forest.extent_lengths
    node_begin = np.concatenate([inside, [0]])[forest.extent_offsets[segment_nodes]]
    first_positions = forest.starts[segment_nodes] + (inside[place] - node_begin)

    highest = reduce_ranges(np.maximum, positions, rows)
    lengths = np.minimum(lengths, highest[segment_units] - first_positions + 1)
    kept = lengths > 0
    segment_units, segment_nodes = segment_units[kept], segment_nodes[kept]
    starts, lengths, first_positions = starts[kept], lengths[kept], first_positions[kept]
    bounds = np.searchsorted(segment_units, np.arange(count + 1))

    single_row = (walk.own == 1) & (walk.below == 1)
    last = first_positions + lengths == (forest.starts + forest.lengths)[segment_nodes]
    own_unit = nodes[segment_units] == segment_nodes
    growing = np.flatnonzero(single_row[segment_nodes] & last & own_unit)
    rank = _rank(walk, cut)[nodes]
    return (
        _Units(
            rows=rows.astype(np.int32),
            segments=np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int32),
            rank=rank.astype(np.int32),
        ),
        _Segments(
            starts=starts,
            lengths=lengths.astype(np.int32),
            positions=first_positions.astype(np.int32),
            rows=rows[segment_units].astype(np.int32),
            growing=growing,
        ),
    )


def _rank(walk: _Walk, cut: NDArray[np.bool_]) -> Int32Array:
    """How many cut nodes lie above each node."""
    rank = np.zeros(walk.parents.size, np.int32)
    for level in walk.levels[1:]:
        above = walk.parents[level]
        rank[level] = rank[above] + cut[above]
    return rank
