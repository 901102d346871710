"""From active nodes and their rows to a `Plan`: depth-first rows, units, segments.

Array work, but for three plain loops over the active nodes: their ancestors, the rows below each, the choice
of cuts. Nothing runs level by level: depth costs no more than width.
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
    one unit with their whole path (no read is shared); `"naive"` makes every node that has keys, and rows below it, a
    unit of its own.
    """
    cost = cost or CostModel()
    own = np.bincount(row_nodes, minlength=forest.parents.size)
    walk = _Walk(forest.parents, own)
    row_order = walk.order_rows(row_nodes, row_positions)
    positions = row_positions[row_order].astype(np.int32)
    choice = _choose(forest, walk, mode, cost)
    heads = _heads(walk, choice.cut, cost.tile_rows)
    units, segments = _assemble(forest, walk, choice.cut, heads, positions)
    begun = np.bincount(units.rows[:, 0], minlength=positions.size + 1)
    ended = np.bincount(units.rows[:, 1], minlength=positions.size + 1)
    covering = np.cumsum(begun - ended)[:-1]
    return Plan(
        row_positions=positions,
        row_order=row_order,
        row_extra=np.maximum(covering - 1, 0).astype(np.int32),
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
    forest = Forest(parents, columns.start[active], scheduled, offsets, starts, lengths)
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


class _Walk:
    """The depth-first walk: how deep each node is, and the rows `[first, first + below)` at it or below."""

    def __init__(self, parents: Int32Array, own: Int64Array) -> None:
        self.parents = parents
        self.own = own
        self.depths = self.add_above(np.ones(parents.size, np.int64)).astype(np.int32)
        # Index -1 stands above the roots, here and in `_choose`.
        below = [*own.tolist(), 0]
        for node, above in zip(range(parents.size - 1, -1, -1), parents[::-1].tolist(), strict=True):
            below[above] += below[node]
        self.below = np.array(below[:-1], np.int64)
        # A node's rows begin after its parent's own rows and those below its elder siblings.
        family = np.argsort(parents, kind="stable")
        parent = parents[family]
        before = np.cumsum(self.below[family]) - self.below[family]
        elder = np.empty_like(self.below)
        elder[family] = before - before[np.searchsorted(parent, parent)]
        self.first = elder + self.add_above(own + elder)

    def add_above(self, values: Int64Array) -> Int64Array:
        """For each node the sum of `values` over its proper ancestors: log2(depth) array operations."""
        size = self.parents.size
        jump = np.where(self.parents >= 0, self.parents, size)
        total = np.append(values, 0)[jump]
        total, jump = np.append(total, 0), np.append(jump, size)
        while (jump < size).any():
            total += total[jump]
            jump = jump[jump]
        return total[:-1]

    def order_rows(self, row_nodes: Int32Array, row_positions: Int32Array) -> Int64Array:
        """Rows depth-first, those of one node by position: row `i` of the walk is row `order[i]`."""
        order: Int64Array = np.lexsort((row_positions, self.first[row_nodes]))
        return order


def _tiles(rows: NDArray[np.int64], tile_rows: int) -> NDArray[np.int64]:
    return -(-rows // tile_rows)


def _choose(forest: Forest, walk: _Walk, mode: PlanMode, cost: CostModel) -> NodeSummary:
    """Fold or cut each node, from the leaves up.

    A folded node is read once by every unit below it; a cut one once by itself (once a tile), at the price
    of a unit and of a partial for each row below. Going up from the last cut, folding has cost by now

        rent = sum over the nodes since that cut of (units below - tiles of the node) * length

    and the node where it first exceeds the price of a cut is cut: the rule for renting skis or buying them,
    which never pays more than twice too much. In the trees tried (the worst a chain of tiny nodes, where
    weighing each node by itself cost 9.7 times the least) the whole is within 15 % of the least possible.
    A price of infinity never cuts, one of -1 always does.
    """
    tiles = _tiles(walk.below, cost.tile_rows)
    cut_cost = cost.unit * tiles + cost.partial_row * walk.below
    price = np.full(tiles.size, np.inf)
    if mode == "auto":
        price = cut_cost
    elif mode == "naive":
        price[(forest.lengths > 0) & (walk.below > walk.own)] = -1
    cut = np.zeros(tiles.size, np.bool_)
    readers = [*_tiles(walk.own, cost.tile_rows).tolist(), 0]
    rents = [0] * (tiles.size + 1)
    nodes = zip(
        range(tiles.size - 1, -1, -1),
        walk.parents[::-1].tolist(),
        tiles[::-1].tolist(),
        forest.lengths[::-1].tolist(),
        price[::-1].tolist(),
        strict=True,
    )
    for node, above, own_tiles, length, limit in nodes:
        count = readers[node]
        rent = rents[node] + (count - own_tiles) * length
        if rent > limit:
            cut[node] = True
            count, rent = own_tiles, 0
        readers[above] += count
        rents[above] += rent
    fold_cost = (np.array(readers[:-1], np.float64) - tiles) * forest.lengths
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
    count = np.where(cut, walk.below, walk.own)
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
    members = _members(walk, cut, nodes)
    units, segments = _segments(forest, walk, members, heads, positions)
    bounds = np.searchsorted(units, np.arange(nodes.size + 1))
    return (
        _Units(
            rows=rows.astype(np.int32),
            segments=np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int32),
            rank=walk.add_above(cut.astype(np.int64))[nodes].astype(np.int32),
        ),
        segments,
    )


def _members(walk: _Walk, cut: NDArray[np.bool_], heads: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The nodes of every unit `[members]`, and the unit of each: by unit, and in it from the root down."""
    folded_above = np.where((walk.parents >= 0) & ~cut[np.maximum(walk.parents, 0)], walk.parents, -1)
    units, nodes = [np.arange(heads.size)], [heads]
    while True:
        above = folded_above[nodes[-1]]
        more = above >= 0
        if not more.any():
            break
        units.append(units[-1][more])
        nodes.append(above[more])
    # Furthest ancestors first, and a stable sort by unit leaves each unit's nodes in order from the root.
    unit_of = np.concatenate(units[::-1])
    order = np.argsort(unit_of, kind="stable")
    return np.concatenate(nodes[::-1])[order], unit_of[order]


def _segments(
    forest: Forest,
    walk: _Walk,
    members: tuple[Int64Array, Int64Array],
    heads: tuple[Int64Array, NDArray[np.int64]],
    positions: Int32Array,
) -> tuple[Int64Array, _Segments]:
    """The extents of each unit's nodes, up to the unit's highest position; and the unit of each, `[segments]`."""
    member_nodes, member_units = members
    head_nodes, rows = heads
    counts = forest.extent_offsets[member_nodes + 1] - forest.extent_offsets[member_nodes]
    units, nodes = np.repeat(member_units, counts), np.repeat(member_nodes, counts)
    before = np.cumsum(counts) - counts
    extents = np.arange(units.size) - np.repeat(before - forest.extent_offsets[member_nodes], counts)

    ends = np.append(np.cumsum(forest.extent_lengths), 0)
    begins = ends[:-1] - forest.extent_lengths  # of the extents, were all of the forest laid end to end
    node_begins = np.append(begins, 0)[forest.extent_offsets[nodes]]
    first = forest.starts[nodes] + begins[extents] - node_begins
    highest = reduce_ranges(np.maximum, positions, rows)
    lengths = np.minimum(forest.extent_lengths[extents], highest[units] - first + 1)

    kept = lengths > 0
    units, nodes, extents, first, lengths = units[kept], nodes[kept], extents[kept], first[kept], lengths[kept]
    lone = (walk.own == 1) & (walk.below == 1)
    last = first + lengths == (forest.starts + forest.lengths)[nodes]
    return units, _Segments(
        starts=forest.extent_starts[extents],
        lengths=lengths.astype(np.int32),
        positions=first.astype(np.int32),
        rows=rows[units].astype(np.int32),
        growing=np.flatnonzero(lone[nodes] & last & (head_nodes[units] == nodes)),
    )
