"""Parts of a plan that are plain attention over runs of keys: all rows see the whole run, or they form its causal
diagonal.

NumPy on the host, once per new plan.
"""

from dataclasses import dataclass, replace
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from radixgen.core import Plan, first_seen
from radixgen.core.plan import Int64Array, reduce_ranges


@dataclass(frozen=True, slots=True)
class VarlenRuns:
    """Runs of consecutive slots with the rows that see them. Arrays are `[runs]`, in order of call and slot."""

    starts: Int64Array
    """First slot."""
    lengths: Int64Array
    """Number of keys."""
    positions: Int64Array
    """Position of the first key."""
    causal: NDArray[np.bool_]
    """Whether the last row sees the last key and each row before it one key less; otherwise all see all."""
    calls: Int64Array
    """Index of the call. Within a call, runs do not overlap, and either all are causal or none is."""
    offsets: Int64Array
    """`[runs + 1]`: start of each run's rows in `rows`, and the end."""
    rows: Int64Array
    """`[partials]`: rows of the plan, ascending within a run."""

    @property
    def sizes(self) -> Int64Array:
        """Rows of each run."""
        return np.diff(self.offsets)

    @property
    def num_calls(self) -> int:
        return int(self.calls.max(initial=-1)) + 1


@dataclass(frozen=True, slots=True)
class RemainingPlan:
    """The rest of a plan: units with their other segments."""

    plan: Plan
    """Has only rows that its units cover, and only the arrays that attention reads."""
    rows: Int64Array
    """`[rows of the remaining plan]`: their indices in the whole plan."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Segments with the rows of their units. Arrays are `[pieces]`."""

    starts: Int64Array
    lengths: Int64Array
    positions: Int64Array
    first: Int64Array
    stop: Int64Array

    def __getitem__(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> "_Pieces":
        return _Pieces(
            self.starts[chosen], self.lengths[chosen], self.positions[chosen], self.first[chosen], self.stop[chosen]
        )


def split(plan: Plan) -> tuple[VarlenRuns, RemainingPlan | None]:
    """Return the runs of a plan, trimmed to its window, if any, and the remaining plan, if any."""
    counts = np.diff(plan.unit_segments, axis=1)[:, 0]
    owners = np.repeat(np.arange(plan.num_units), counts)
    whole, causal = _kinds(plan, owners)
    rows = plan.unit_rows[owners].astype(np.int64)
    pieces = _Pieces(
        plan.segment_starts, plan.segment_lengths.astype(np.int64), plan.segment_positions.astype(np.int64),
        rows[:, 0], rows[:, 1],
    )  # fmt: skip
    left = ~whole & ~causal & (plan.segment_lengths > 0)
    return _order(_join_same(pieces[whole]), _join_chains(pieces[causal], plan)), _rest(plan, owners, left)


def _kinds(plan: Plan, owners: Int64Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which segments all rows of their unit see completely, and which are the diagonal of a unit that is one
    span.
    """
    unit_rows = plan.unit_rows.astype(np.int64)
    lowest = reduce_ranges(np.minimum, plan.row_positions, unit_rows)[owners]
    highest = reduce_ranges(np.maximum, plan.row_positions, unit_rows)[owners]
    follows = np.concatenate([[0], np.cumsum(np.diff(plan.row_positions) == 1)])
    rows = unit_rows[:, 1] - unit_rows[:, 0]
    a_span = (follows[unit_rows[:, 1] - 1] - follows[unit_rows[:, 0]] == rows - 1)[owners]
    first, last = plan.segment_positions, plan.segment_positions + plan.segment_lengths - 1
    clear = (plan.segment_rows == unit_rows[owners]).all(axis=1) & (plan.segment_lengths > 0)
    if plan.window is not None:
        clear &= first >= first_seen(plan.window, highest)
    clear &= plan.unit_blocks[owners] == 0
    whole = clear & (last <= lowest)
    causal = clear & ~whole & a_span & (last == highest) & (first <= lowest)
    # The last tile of a span may have a single row, which sees all keys; it still belongs to the span.
    single = whole & (rows[owners] == 1) & (last == highest)
    causal |= single & np.isin(plan.segment_starts, plan.segment_starts[causal])
    return whole & ~causal, causal


def _join_same(pieces: _Pieces) -> list[tuple[_Pieces, bool]]:
    """Group pieces that read the same keys."""
    order = np.lexsort((pieces.first, pieces.lengths, pieces.starts))
    pieces = pieces[order]
    joined = (np.diff(pieces.starts) == 0) & (np.diff(pieces.lengths) == 0)
    return [(group, False) for group in _groups(pieces, joined)]


def _join_chains(pieces: _Pieces, plan: Plan) -> list[tuple[_Pieces, bool]]:
    """Group diagonals that continue each other: the tiles of one span."""
    order = np.lexsort((pieces.first, pieces.starts))
    pieces = pieces[order]
    follows = plan.row_positions[pieces.first[1:]] == plan.row_positions[pieces.stop[:-1] - 1] + 1
    return [(group, True) for group in _groups(pieces, (np.diff(pieces.starts) == 0) & follows)]


def _groups(pieces: _Pieces, joined: NDArray[np.bool_]) -> list[_Pieces]:
    """Group pieces; `joined[i]`: piece `i + 1` belongs to the group of piece `i`."""
    if not pieces.starts.size:
        return []
    bounds = np.concatenate([[0], np.flatnonzero(~joined) + 1, [pieces.starts.size]]).tolist()
    return [pieces[np.arange(a, b)] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _order(same: list[tuple[_Pieces, bool]], chains: list[tuple[_Pieces, bool]]) -> VarlenRuns:
    """Make runs of groups, in as few calls as possible without overlap."""
    entries: list[tuple[int, _Pieces, bool]] = []
    num_calls = 0
    for groups in (same, chains):
        calls = _calls([(int(group.starts[0]), int(group.lengths[-1])) for group, _ in groups])
        entries += [(num_calls + call, group, causal) for call, (group, causal) in zip(calls, groups, strict=True)]
        num_calls += max(calls, default=-1) + 1
    entries.sort(key=lambda entry: (entry[0], int(entry[1].starts[0])))
    rows = [np.concatenate([np.arange(a, b) for a, b in zip(g.first, g.stop, strict=True)]) for _, g, _ in entries]
    return VarlenRuns(
        starts=np.array([group.starts[0] for _, group, _ in entries], np.int64),
        lengths=np.array([group.lengths[-1] for _, group, _ in entries], np.int64),
        positions=np.array([group.positions[0] for _, group, _ in entries], np.int64),
        causal=np.array([causal for _, _, causal in entries], np.bool_),
        calls=np.array([call for call, _, _ in entries], np.int64),
        offsets=np.cumsum([0, *(part.size for part in rows)]),
        rows=np.concatenate([np.empty(0, np.int64), *rows]),
    )


def _calls(runs: list[tuple[int, int]]) -> list[int]:
    """Assign a call to each run `(start, length)`, ascending by start: the first that is free, or a new one."""
    calls: list[int] = []
    busy: list[tuple[int, int]] = []
    for start, length in runs:
        call = heappop(busy)[1] if busy and busy[0][0] <= start else len(busy)
        heappush(busy, (start + length, call))
        calls.append(call)
    return calls


def _rest(plan: Plan, owners: Int64Array, left: NDArray[np.bool_]) -> RemainingPlan | None:
    """Return the units with segments `left`, with only those."""
    if not left.any():
        return None
    counts = np.bincount(owners[left], minlength=plan.num_units)
    units = np.flatnonzero(counts)
    ends = np.cumsum(counts[units])
    begun = np.bincount(plan.unit_rows[units, 0], minlength=plan.num_rows + 1)
    ended = np.bincount(plan.unit_rows[units, 1], minlength=plan.num_rows + 1)
    covered = np.cumsum(begun - ended)[:-1]
    rows = np.flatnonzero(covered)
    place = np.concatenate([[0], np.cumsum(covered > 0)])
    made = replace(
        plan,
        row_positions=plan.row_positions[rows],
        row_order=np.arange(rows.size),
        row_extra=(covered[rows] - 1).astype(np.int32),
        unit_rows=place[plan.unit_rows[units]].astype(np.int32),
        unit_segments=np.stack([ends - counts[units], ends], axis=1).astype(np.int32),
        unit_rank=plan.unit_rank[units],
        unit_cost=plan.unit_cost[units],
        unit_blocks=plan.unit_blocks[units],
        segment_starts=plan.segment_starts[left],
        segment_lengths=plan.segment_lengths[left],
        segment_positions=plan.segment_positions[left],
        segment_rows=place[plan.segment_rows[left]].astype(np.int32),
        segment_room=plan.segment_room[left],
        growing=np.empty(0, np.int64),
        path_rows=np.empty((0, 2), np.int32),
        _windowed={},
    )
    return RemainingPlan(made, rows)
