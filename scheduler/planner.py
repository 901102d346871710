"""Planner: from active nodes and their rows to a `Plan` of depth-first rows, units and segments.

The loops over nodes are compiled (`radixgen.scheduler.partition`); the rest is array code.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from radixgen.cache import RadixTree
from radixgen.core import InvalidRequest, NodeSummary, Plan
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.core.reading import Exact, ReadingPolicy, TopBlocks
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.forest import Forest, Paths, active_forest, walk_paths
from radixgen.scheduler.partition import (
    MAX_STATES,
    collect,
    partition,
    partition_uncut,
    readers,
    unmixed_total,
)
from radixgen.scheduler.reading import Views, keep_views, restrict, row_views
from radixgen.scheduler.revise import RowUpdates, StepRows, revise, row_updates
from radixgen.scheduler.segments import lay_out, path_rows
from radixgen.scheduler.split_units import SplitUnits, coverage, split_units
from radixgen.scheduler.tables import (
    W_DEPTH,
    W_OWN_ROWS,
    W_ROWS,
)
from radixgen.scheduler.top_blocks import add_choosing_units, withhold_blocks

PlanMode = Literal["auto", "unshared", "prefix", "naive"]
PLAN_MODES: tuple[PlanMode, ...] = get_args(PlanMode)

_FEW_STEPS = 16
"""Minimum steps before a plan is rebuilt for its age."""


def check_plan_mode(field: str, mode: str) -> None:
    """Raise `InvalidRequest` unless `mode` is one of `PLAN_MODES`."""
    if mode not in PLAN_MODES:
        raise InvalidRequest(field, mode, f"must be one of {', '.join(PLAN_MODES)}")


def plan(
    forest: Forest,
    row_nodes: Int32Array,
    row_positions: Int32Array,
    *,
    mode: PlanMode = "auto",
    cost: CostModel | Sequence[CostModel] | None = None,
) -> Plan:
    """Make the plan of one step.

    `row_nodes` `[rows]`: each row's node in `forest`; `row_positions` `[rows]`: its position within that node. Nodes
    without rows at or below them are left out.

    `mode`: `"auto"` minimizes the predicted time under `cost` (of several cost models, one per launch configuration,
    under the best); `"unshared"` gives every node's own rows one unit with their whole path, so that no read is shared;
    `"prefix"` shares only what all rows of a root have in common; `"naive"` makes every node with keys and rows below
    it a unit.
    """
    costs = [cost] if isinstance(cost, CostModel) else cost or [CostModel()]
    paths = walk_paths(forest, row_nodes, row_positions, max(model.least_run for model in costs))
    return _fill(paths, _choose(paths, mode, costs))


def plan_reading(
    forest: Forest,
    rows: StepRows,
    policies: Sequence[ReadingPolicy],
    *,
    mode: PlanMode = "auto",
    cost: CostModel | Sequence[CostModel] | None = None,
) -> Plan:
    """As `plan`, for rows that read under `policies`. The nodes of `rows` are those of `forest`."""
    nodes, positions, slots, own = rows
    views = row_views(policies, own, positions)
    if views is not None:
        forest, nodes = restrict(forest, nodes, views)
    withheld = withhold_blocks(forest, nodes, positions, own, policies, slots)
    if withheld is None:
        return plan(forest, nodes, positions, mode=mode, cost=cost)
    made = plan(withheld.forest, withheld.row_nodes, positions, mode=mode, cost=cost)
    return add_choosing_units(made, withheld)


class _Partition(NamedTuple):
    """A partition of the paths into units, in the form that `collect` takes."""

    cost: CostModel
    cuts: Int64Array
    runs: Int64Array
    least: float
    """Lower bound of the time. It excludes partial results if the partition is fixed by the mode."""


class _Candidate(NamedTuple):
    """A partition with its units and predicted time."""

    cost: CostModel
    units: Int64Array
    fates: Int64Array
    split: SplitUnits


def _choose(paths: Paths, mode: PlanMode, costs: Sequence[CostModel]) -> _Candidate:
    """Return the candidate with the shortest time. Partitions whose lower bound exceeds the best time are skipped."""
    if mode != "auto":
        return min((_evaluate(paths, _fixed_partition(paths, cost, mode)) for cost in costs), key=_time)
    ways = sorted((_cheapest_partition(paths, cost) for cost in costs), key=lambda way: way.least)
    best = _evaluate(paths, ways[0])
    for way in ways[1:]:
        best = _faster(paths, way, best)
    for cost in [way.cost for way in ways if way.least < best.split.time]:
        best = _refine(paths, cost, best)
    return best


def _refine(paths: Paths, cost: CostModel, best: _Candidate) -> _Candidate:
    """Also try the simple partitions that may be faster.

    The partition of minimum total cost is not always fastest: the time also depends on how units are spread over
    programs, and on the merge launch.
    """
    if cost.programs == 1 or best.split.time <= cost.reads(paths.num_keys, paths.num_keys):
        return best
    best = _faster(paths, _uncut_partition(paths, cost), best)
    for mode in PLAN_MODES[1:]:
        best = _faster(paths, _fixed_partition(paths, cost, mode), best)
    return best


def _faster(paths: Paths, way: _Partition, best: _Candidate) -> _Candidate:
    if way.least >= best.split.time:
        return best
    return min(best, _evaluate(paths, way, to_beat=best.split.time), key=_time)


def _time(choice: _Candidate) -> float:
    return choice.split.time


def _evaluate(paths: Paths, way: _Partition, to_beat: float = np.inf) -> _Candidate:
    units, fates = collect(paths.walk, paths.keys, way.cuts, way.runs, *way.cost.columns())
    split = split_units(units, paths.order.size, paths.num_keys, way.cost, to_beat)
    return _Candidate(way.cost, units, fates, split)


def _cheapest_partition(paths: Paths, cost: CostModel) -> _Partition:
    walk = paths.walk
    most_pending = int(min(walk[:, W_DEPTH].max(initial=0) + 1, max(4, MAX_STATES // max(len(walk), 1))))
    price = cost.partial * cost.group
    best, cuts, runs = partition(walk, paths.keys, cost.mix, *cost.columns(), price, most_pending)
    return _make_partition(paths, cost, cuts, runs, float(best[:1, 0].sum()))


def _uncut_partition(paths: Paths, cost: CostModel) -> _Partition:
    best, cuts, runs = partition_uncut(paths.walk, paths.keys, cost.mix, *cost.columns())
    return _make_partition(paths, cost, cuts, runs, float(best[:1, 0].sum()))


def _fixed_partition(paths: Paths, cost: CostModel, mode: PlanMode) -> _Partition:
    walk, keys = paths.walk, paths.keys[:, 0]
    cut = np.zeros((len(walk), 1), np.int64)
    branching = (keys > 0) & (walk[:, W_ROWS] > walk[:, W_OWN_ROWS])
    if mode == "naive":
        cut[:, 0] = branching
    elif mode == "prefix":
        cut[:, 0] = branching & (walk[:, W_DEPTH] == 1)
    total = unmixed_total(walk, paths.keys, cut, *cost.columns())
    return _make_partition(paths, cost, cut, np.full((len(walk), 1, 2), -1, np.int64), total)


def _make_partition(paths: Paths, cost: CostModel, cuts: Int64Array, runs: Int64Array, total: float) -> _Partition:
    least = max(total * cost.kv_heads / cost.programs, cost.reads(paths.num_keys, paths.num_keys))
    return _Partition(cost, cuts, runs, least)


def _fill(paths: Paths, choice: _Candidate) -> Plan:
    """Make the plan's arrays."""
    cost, walk = choice.cost, paths.walk
    laid = lay_out(paths, choice.units, choice.split.limits, cost.least_run, cost.mixed_weight)
    over, partials = coverage(laid.unit_rows, paths.positions.size)
    counts, fates = readers(choice.units, walk, choice.fates)
    rows = laid.unit_rows[:, 1] - laid.unit_rows[:, 0]
    costs = cost.unit_costs(rows, laid.keys, laid.mixed)
    return Plan(
        row_positions=paths.positions.astype(np.int32),
        row_order=paths.order,
        row_extra=(over - 1).astype(np.int32),
        unit_rows=laid.unit_rows,
        unit_segments=laid.unit_segments,
        unit_rank=laid.unit_rank,
        unit_cost=costs + cost.partial * cost.group * partials,
        unit_blocks=np.zeros(len(rows), np.int32),
        tile_rows=cost.usable[int(cost.classes(rows).max(initial=0))].rows,
        predicted=choice.split.time,
        segment_starts=laid.segment_starts,
        segment_lengths=laid.segment_lengths,
        segment_positions=laid.segment_positions,
        segment_rows=laid.segment_rows,
        segment_room=laid.segment_room,
        growing=laid.growing,
        path_rows=path_rows(walk, int(cost.columns()[0].max())),
        nodes=NodeSummary(
            depths=(walk[1:, W_DEPTH] - 1).astype(np.int32),
            lengths=paths.keys[1:, 0].astype(np.int32),
            rows=walk[1:, W_ROWS].astype(np.int32),
            fates=fates[1:].astype(np.int8),
            readers=counts[1:].astype(np.int32),
        ),
    )


class Planner:
    """Plans the steps of one tree.

    If leaves of the previous step have grown by one token each, its plan is carried over or revised; it is rebuilt once
    much has changed.

    The first planner on a machine takes seconds to construct, because its functions are compiled.
    """

    def __init__(
        self, tree: RadixTree, *, mode: PlanMode = "auto", cost: CostModel | Sequence[CostModel] | None = None
    ) -> None:
        self.tree = tree
        self.mode = mode
        self.cost = cost
        self.policies: Sequence[ReadingPolicy] = (Exact(),)
        """The policies that rows read under; a step may add some at the end."""
        self._last: Plan | None = None
        self._built: _BuiltPlan | None = None
        self._version = -1
        none = np.empty(0, np.int32)
        self._rows = StepRows(none, none, np.empty(0, np.int64), none)
        self._compile_planner()

    def _compile_planner(self) -> None:
        """Compile everything by a small plan, before the first request needs it."""
        ids, ones = np.arange(2, dtype=np.int32), np.ones(2, np.int32)
        forest = Forest(ids - 1, ids, ones, np.arange(3), np.arange(2), ones)
        active_forest(self.tree, ids[:0], ids[:0])
        made = plan(forest, ids, ids, mode=self.mode, cost=self.cost)
        restrict(forest, ids, Views(ids, np.array([(0, 1), (0, 2)]), np.arange(3), np.arange(2)))
        rows = StepRows(ids, ids, ids.astype(np.int64), ids)
        node, row, length = ids[:1], np.full(1, -1), np.full(1, 4096, np.int32)
        long = Forest(node - np.int32(1), node, length, np.arange(2), np.arange(1), length)
        last = StepRows(node, length - np.int32(1), row, node)
        assert plan_reading(long, last, [TopBlocks()], mode=self.mode, cost=self.cost).selects
        row_updates(self.tree.columns, 0, rows.slots[:0], rows, rows)
        revise(made, RowUpdates(ids >= 0, np.full(2, -1), ones, 0))

    @property
    def last(self) -> Plan | None:
        """The plan of the previous step, if any."""
        return self._last

    def plan(
        self,
        node_ids: Int32Array,
        row_positions: Int32Array,
        row_slots: Int64Array,
        row_policies: Int32Array | None = None,
    ) -> Plan:
        """Plan rows at `row_positions` `[rows]` in the tree nodes `node_ids` `[rows]`, whose KV goes to `row_slots`
        `[rows]`.

        A slot is -1 if the row's KV exists. A leaf need not know its row's token yet, if it has reserved the slot.
        `row_policies` `[rows]`: the policy, of `policies`, that each row reads under. Default: the first, `Exact`.
        """
        rows = StepRows(
            node_ids, row_positions, row_slots, np.zeros_like(node_ids) if row_policies is None else row_policies
        )
        new_plan = self._carry(rows) or self.build_plan(rows)
        self._last, self._rows, self._version = new_plan, rows, self.tree.version
        return new_plan

    def forget(self) -> None:
        """Carry nothing over to the next plan, since the last step may have been interrupted at any point."""
        self._last = self._built = None
        self.tree.columns.place.fill(-1)

    def build_plan(self, rows: StepRows) -> Plan:
        """As `plan`, without using earlier plans."""
        forest, row_nodes, active = active_forest(self.tree, rows.nodes, rows.positions)
        new_plan = plan_reading(forest, rows._replace(nodes=row_nodes), self.policies, mode=self.mode, cost=self.cost)
        self._built = _BuiltPlan(new_plan, active)
        return new_plan

    def _carry(self, rows: StepRows) -> Plan | None:
        """Return the last plan unchanged, advanced or revised; None if it must be rebuilt."""
        last, built, columns = self._last, self._built, self.tree.columns
        if last is None or built is None:
            return None
        if rows.same(self._rows) and columns.changed[built.nodes].max(initial=0) <= self._version:
            return last
        if last.growing.size != last.num_rows:
            return None
        updates = row_updates(columns, self._version, built.nodes, self._rows, rows)
        if updates is not None and (rows.policies.any() or self._rows.policies.any()):
            updates = keep_views(self.policies, self._rows, rows, updates)
        if updates is None:
            return None
        built.steps += 1
        count = rows.nodes.size
        if built.outgrown(count):
            return None
        if last.slack and count == last.num_rows and not updates.num_extended:
            return last.advance()
        return revise(last, updates)


class _BuiltPlan:
    """State of the last plan that was built."""

    def __init__(self, made: Plan, nodes: Int64Array) -> None:
        self.nodes = nodes
        """Ids of all nodes that it reads."""
        self.steps = 0
        """Steps for which it was advanced or revised."""
        self._rows = made.num_rows
        self._most_steps = _FEW_STEPS + made.kv_tokens_read // (8 * made.num_rows)

    def outgrown(self, rows: int) -> bool:
        """Return whether an eighth of the rows have ended, or lengths have grown by an eighth, so that a new plan may
        be better.
        """
        return 8 * rows < 7 * self._rows or self.steps > self._most_steps
