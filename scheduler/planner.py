"""From active nodes and their rows to a `Plan`: depth-first rows, units, segments.

The loops over nodes are compiled (`radixgen.scheduler.partition`); around them is array work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from radixgen.cache import RadixTree
from radixgen.core import NodeSummary, Plan
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.scheduler.balance import Balance, balance, partial_rows, units_over
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.partition import (
    FIRST_EXTENT,
    LENGTH,
    MAX_STATES,
    PARENT,
    ROOM,
    START,
    STOP_EXTENT,
    Paths,
    collect,
    fill_segments,
    partition,
    preorder,
)
from radixgen.scheduler.revise import Followed, follow, revise

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
    cost: CostModel | Sequence[CostModel] | None = None,
) -> Plan:
    """The plan of one step.

    `row_nodes` `[rows]` names each row's node in `forest`; `row_positions` `[rows]` its position inside that
    node's range. Nodes below which no row stands are left out. `mode="auto"` is the cheapest that `cost` knows (of
    several cost models, one for each way to launch, the one under which it is cheapest); `"unshared"` gives every
    node's own rows one unit with their whole path (no read is shared); `"prefix"` shares only what all rows of a root
    have in common; `"naive"` makes every node that has keys, and rows below it, a unit of its own.
    """
    costs = [cost] if isinstance(cost, CostModel) else cost or [CostModel()]
    paths = walk_paths(forest, row_nodes, row_positions, max(one.least_run for one in costs))
    return _fill(paths, _choose(paths, mode, costs))


def walk_paths(forest: Forest, row_nodes: Int32Array, row_positions: Int32Array, least_run: int = 0) -> Paths:
    """The paths of rows at `row_positions` `[rows]` in the nodes `row_nodes` `[rows]` of `forest`; keys in extents of
    fewer than `least_run` are counted apart.
    """
    nodes = np.zeros((forest.parents.size + 1, 6), np.int64)
    nodes[0, PARENT] = -1
    nodes[1:, PARENT] = forest.parents + 1
    nodes[1:, START], nodes[1:, LENGTH] = forest.starts, forest.lengths
    nodes[1:, FIRST_EXTENT], nodes[1:, STOP_EXTENT] = forest.extent_offsets[:-1], forest.extent_offsets[1:]
    if forest.rooms is not None:
        nodes[1:, ROOM] = forest.rooms
    extents = np.stack([forest.extent_starts, forest.extent_lengths], axis=1).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(np.where(extents[:, 1] < least_run, extents[:, 1], 0))])
    short = sums[nodes[:, STOP_EXTENT]] - sums[nodes[:, FIRST_EXTENT]]
    positions = row_positions.astype(np.int64)
    parents, lengths = nodes[:, PARENT].copy(), nodes[:, LENGTH].copy()
    lowest, walk, keys, order = preorder(parents, row_nodes.astype(np.int64) + 1, positions, lengths, short)
    return Paths(nodes, extents, lowest, walk, keys, order, positions[order])


class _Choice(NamedTuple):
    """One way to part the paths into units."""

    cost: CostModel
    units: Int64Array
    fates: Int64Array
    balance: Balance


def _choose(paths: Paths, mode: PlanMode, costs: Sequence[CostModel]) -> _Choice:
    """The shortest of all ways to launch; one whose even share of the work takes longer than the best so far is not
    looked into.
    """
    if mode != "auto":
        return min((_weigh(paths, cost, *_forced(paths, mode)) for cost in costs), key=_time)
    first = [_weigh(paths, cost, *_cheapest(paths, cost, may_cut=True)) for cost in costs]
    best = min(first, key=_time)
    for choice in sorted(first, key=_time):
        if choice.balance.even < best.balance.time:
            best = min(best, _refine(paths, choice), key=_time)
    return best


def _refine(paths: Paths, best: _Choice) -> _Choice:
    """The least cost, found for all of a plan's units together, need not be the shortest time: that depends on how they
    spread over the programs and on the launch that merges. So the simple ways are looked at too where they may win.
    """
    cost = best.cost
    if cost.programs == 1 or best.balance.time <= cost.first_reads(int(paths.keys[:, 0].sum())):
        return best
    for ways in (_cheapest(paths, cost, may_cut=False), *(_forced(paths, other) for other in PLAN_MODES[1:])):
        best = min(best, _weigh(paths, cost, *ways, to_beat=best.balance.time), key=_time)
    return best


def _time(choice: _Choice) -> float:
    return choice.balance.time


def _weigh(paths: Paths, cost: CostModel, cuts: Int64Array, runs: Int64Array, to_beat: float = np.inf) -> _Choice:
    units, fates = collect(paths.walk, paths.keys, cuts, runs, *cost.columns())
    unique = int(paths.keys[:, 0].sum())
    return _Choice(cost, units, fates, balance(units, paths.order.size, unique, cost, to_beat))


def _cheapest(paths: Paths, cost: CostModel, *, may_cut: bool) -> tuple[Int64Array, Int64Array]:
    """Which nodes are cut and where runs end, as `collect` takes them."""
    walk = paths.walk
    most_pending = int(min(walk[:, 1].max(initial=0) + 1, max(4, MAX_STATES // max(len(walk), 1))))
    allowed = np.full(len(walk), int(may_cut), np.int64)
    price = cost.partial * cost.group
    _, cuts, runs = partition(walk, paths.keys, allowed, cost.mix, *cost.columns(), price, most_pending)
    return cuts, runs


def _forced(paths: Paths, mode: PlanMode) -> tuple[Int64Array, Int64Array]:
    walk, keys = paths.walk, paths.keys[:, 0]
    cut = np.zeros((len(walk), 1), np.int64)
    branching = (keys > 0) & (walk[:, 3] > walk[:, 4])
    if mode == "naive":
        cut[:, 0] = branching
    elif mode == "prefix":
        cut[:, 0] = branching & (walk[:, 1] == 1)
    return cut, np.full((len(walk), 1, 2), -1, np.int64)


def _fill(paths: Paths, choice: _Choice) -> Plan:
    """The plan's arrays."""
    cost, walk, positions = choice.cost, paths.walk, paths.positions
    layout = (
        choice.units, choice.balance.limits, paths.nodes, paths.extents, paths.lowest, walk, positions, cost.least_run,
        cost.mixed_weight,
    )  # fmt: skip
    num_units, num_segments = 2 * len(choice.units), 2 * (len(choice.units) + len(paths.extents))
    table, segments = np.empty((0, 8), np.int64), np.empty((0, 7), np.int64)
    while num_units > len(table) or num_segments > len(segments):
        table, segments = np.empty((num_units, 8), np.int64), np.empty((num_segments, 7), np.int64)
        num_units, num_segments = fill_segments(*layout, table, segments)
    table, segments = table[:num_units], segments[:num_segments]
    over = units_over(table[:, :2], positions.size)
    rows, partials = table[:, 1] - table[:, 0], partial_rows(table[:, :2], over)
    return Plan(
        row_positions=positions.astype(np.int32),
        row_order=paths.order,
        row_extra=(over - 1).astype(np.int32),
        unit_rows=table[:, :2].astype(np.int32),
        unit_segments=table[:, 2:4].astype(np.int32),
        unit_rank=(table[:, 4] * (table[:, 5].max(initial=0) + 1) + table[:, 5]).astype(np.int32),
        unit_cost=cost.unit_costs(rows, table[:, 6], table[:, 7]) + cost.partial * cost.group * partials,
        tile_rows=cost.tiles[-1].rows,
        predicted=choice.balance.time,
        segment_starts=segments[:, 0].copy(),
        segment_lengths=segments[:, 1].astype(np.int32),
        segment_positions=segments[:, 2].astype(np.int32),
        segment_rows=segments[:, 3:5].astype(np.int32),
        segment_room=segments[:, 6].astype(np.int32),
        growing=np.flatnonzero(segments[:, 5]),
        path_rows=_path_rows(walk, int(cost.columns()[0].max())),
        nodes=NodeSummary(
            depths=(walk[1:, 1] - 1).astype(np.int32),
            lengths=paths.keys[1:, 0].astype(np.int32),
            rows=walk[1:, 3].astype(np.int32),
            fates=choice.fates[1:, 0].astype(np.int8),
            readers=choice.fates[1:, 1].astype(np.int32),
        ),
    )


def _path_rows(walk: Int64Array, tile_rows: int) -> Int32Array:
    """The rows of each node, in tiles, as reading without sharing would have them: `[tiles, 2]`."""
    own, first = walk[:, 4], walk[:, 5]
    tiles = -(-own // tile_rows)
    rank = np.arange(int(tiles.sum())) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    begin = np.repeat(first, tiles) + rank * tile_rows
    return np.stack([begin, np.minimum(begin + tile_rows, np.repeat(first + own, tiles))], axis=1).astype(np.int32)


class Planner:
    """Plans the steps of one tree.

    Where the leaves of the step before, or some of them, have grown by a token each, its plan is carried over or
    revised; it is made anew once much has changed.

    The first one on a machine takes some seconds to make: it compiles what plans are made with.
    """

    def __init__(
        self, tree: RadixTree, *, mode: PlanMode = "auto", cost: CostModel | Sequence[CostModel] | None = None
    ) -> None:
        self.tree = tree
        self.mode = mode
        self.cost = cost or CostModel()
        self._last: Plan | None = None
        self._built: _Built | None = None
        self._version = -1
        self._node_ids = np.empty(0, np.int32)
        self._row_positions = np.empty(0, np.int32)
        self._plan_anything()

    def _plan_anything(self) -> None:
        """So that everything is compiled before the first request waits for it."""
        ids, ones = np.arange(2, dtype=np.int32), np.ones(2, np.int32)
        forest = Forest(ids - 1, ids, ones, np.arange(3), np.arange(2), ones)
        made = plan(forest, ids, ids, mode=self.mode, cost=self.cost)
        follow(self.tree.columns, 0, ids, ids, ids, ids)
        revise(made, Followed(ids >= 0, np.full(2, -1), ones, 0))

    @property
    def last(self) -> Plan | None:
        """The plan of the step before, if any."""
        return self._last

    def plan(self, node_ids: Int32Array, row_positions: Int32Array) -> Plan:
        """Plan rows that stand at `row_positions` `[rows]` in the tree nodes with these ids, `node_ids` `[rows]`."""
        found = self._carry(node_ids, row_positions)
        if found is None:
            forest, row_nodes, active = active_forest(self.tree, node_ids)
            found = plan(forest, row_nodes, row_positions, mode=self.mode, cost=self.cost)
            self._built = _Built(found, active)
        self._last = found
        self._version = self.tree.version
        self._node_ids, self._row_positions = node_ids, row_positions
        return found

    def _carry(self, node_ids: Int32Array, row_positions: Int32Array) -> Plan | None:
        """The last plan, advanced or revised; None where one must be made anew."""
        last, built, columns = self._last, self._built, self.tree.columns
        if last is None or built is None or last.growing.size != self._node_ids.size:
            return None
        if (columns.changed[built.nodes] > self._version).any():
            return None
        followed = follow(columns, self._version, self._node_ids, self._row_positions, node_ids, row_positions)
        if followed is None:
            return None
        built.steps += 1
        if last.slack and node_ids.size == last.num_rows and not followed.num_extended:
            return last.advance()
        return None if built.outgrown(node_ids.size) else revise(last, followed)


class _Built:
    """What the last plan that was made anew was made for."""

    def __init__(self, made: Plan, nodes: Int64Array) -> None:
        self.nodes = nodes
        """Ids of all that it reads"""
        self.steps = 0
        """For which it was advanced or revised"""
        self._rows = made.num_rows
        self._most_steps = _FEW_STEPS + made.kv_tokens_read // (8 * made.num_rows)

    def outgrown(self, rows: int) -> bool:
        """Whether an eighth of the rows have ended, or lengths have grown by an eighth: another plan may be better."""
        return 8 * rows < 7 * self._rows or self.steps > self._most_steps


_FEW_STEPS = 16
"""After which no plan counts as outgrown, however short."""


def active_forest(tree: RadixTree, node_ids: Int32Array) -> tuple[Forest, Int32Array, Int64Array]:
    """The nodes on the paths of `node_ids`, renumbered with parents first; each row's new number; the ids of all."""
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
    return forest, local[np.searchsorted(ids, node_ids)], ids


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
