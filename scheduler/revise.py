"""A plan for the same leaves a step later, where some of them have ended and some have gone on to a new extent."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import Columns
from radixgen.core import Plan
from radixgen.core.compiled import compiled
from radixgen.core.plan import Int32Array, Int64Array

Bools = NDArray[np.bool_]


class Followed(NamedTuple):
    """What became of the rows of a step before; arrays are `[rows]`, in their order."""

    kept: Bools
    """Whether the row went on by one token in the same leaf."""
    slots: Int64Array
    """The slot of its new token where that begins an extent, else -1."""
    rooms: Int32Array
    """By how many keys its last extent can grow further."""
    num_extended: int


@compiled
def _follow(
    old_ids: Int32Array, old_positions: Int32Array, ids: Int32Array, positions: Int32Array, start: Int32Array,
    scheduled: Int32Array, reserved: Int32Array, extended: Int64Array, extension: Int64Array, version: int,
) -> tuple[bool, Bools, Int64Array, Int32Array, int]:  # fmt: skip
    kept, slots = np.zeros(old_ids.size, np.bool_), np.full(old_ids.size, -1)
    rooms = np.zeros(old_ids.size, np.int32)
    found = num_extended = 0
    for row in range(old_ids.size):
        if found == ids.size or old_ids[row] != ids[found]:
            continue
        node, position = ids[found], positions[found]
        if position != old_positions[row] + 1 or position != start[node] + scheduled[node] - 1:
            break
        kept[row], rooms[row] = True, reserved[node]
        if extended[node] > version:
            slots[row] = extension[node]
            num_extended += 1
        found += 1
    return found == ids.size, kept, slots, rooms, num_extended


def follow(
    columns: Columns,
    version: int,
    old_ids: Int32Array,
    old_positions: Int32Array,
    ids: Int32Array,
    positions: Int32Array,
) -> Followed | None:
    """What became of rows in the leaves `old_ids` at `old_positions` since the tree's `version`: `ids` `[n]` and
    `positions` are those of the step to come. None where these are not some of the leaves, in their order, each with
    its row on its last token, one further than before.
    """
    follows, kept, slots, rooms, num_extended = _follow(
        old_ids, old_positions, ids, positions, columns.start, columns.scheduled, columns.reserved, columns.extended,
        columns.extension, version,
    )  # fmt: skip
    return Followed(kept, slots, rooms, num_extended) if follows else None


@compiled
def _shift(stays: Bools) -> Int64Array:
    """How many rows stay before each one, and in all: `[rows + 1]`."""
    before = np.zeros(stays.size + 1, np.int64)
    for row in range(stays.size):
        before[row + 1] = before[row] + stays[row]
    return before


@compiled
def _remap(ranges: Int32Array, before: Int64Array) -> tuple[Int32Array, Int64Array]:
    """The ranges of rows `[n, 2]` that still hold some, by their new numbers, and which these are."""
    rows, which = np.empty_like(ranges), np.empty(len(ranges), np.int64)
    made = 0
    for index in range(len(ranges)):
        low, high = before[ranges[index, 0]], before[ranges[index, 1]]
        if low < high:
            rows[made, 0], rows[made, 1], which[made] = low, high, index
            made += 1
    return rows[:made], which[:made]


@compiled
def _segments(
    before: Int64Array, slots: Int64Array, rooms: Int32Array, positions: Int32Array, units: Int64Array,
    unit_segments: Int32Array, starts: Int64Array, lengths: Int32Array, firsts: Int32Array, readers: Int32Array,
    growing: Bools,
) -> tuple[Int32Array, Int64Array, Int32Array, Int32Array, Int32Array, Int32Array, Int64Array]:  # fmt: skip
    """The segments of `units` that still have readers, those that grow by one key more or with one behind them.

    Returns each unit's range, starts, lengths, first positions, readers, rooms, and which of them grow.
    """
    most = starts.size + positions.size
    ranges, grown = np.empty((units.size, 2), np.int32), np.empty(positions.size, np.int64)
    to_start, to_length, to_first = np.empty(most, np.int64), np.empty(most, np.int32), np.empty(most, np.int32)
    to_readers, to_room = np.empty((most, 2), np.int32), np.zeros(most, np.int32)
    made = grows = 0
    for place in range(units.size):
        ranges[place, 0] = made
        for old in range(unit_segments[units[place], 0], unit_segments[units[place], 1]):
            row = readers[old, 0]
            low, high = before[row], before[readers[old, 1]]
            if low == high:
                continue
            to_start[made], to_length[made], to_first[made] = starts[old], lengths[old], firsts[old]
            to_readers[made, 0], to_readers[made, 1] = low, high
            if growing[old]:
                if slots[row] < 0:
                    to_length[made] += 1
                else:
                    made += 1
                    to_start[made], to_length[made], to_first[made] = slots[row], 1, positions[row] + 1
                    to_readers[made, 0], to_readers[made, 1] = low, high
                to_room[made], grown[grows] = rooms[row], made
                grows += 1
            made += 1
        ranges[place, 1] = made
    return ranges, to_start[:made], to_length[:made], to_first[:made], to_readers[:made], to_room[:made], grown[:grows]


def revise(plan: Plan, followed: Followed) -> Plan:
    """The rows that were kept, each the last token of its own leaf, go on by one.

    Units left without rows are dropped, the others read what they read before: a revised plan is exact, and about as
    good as the one before it.
    """
    kept, slots, rooms, _ = followed
    order = plan.row_order
    stays = kept[order]
    before = _shift(stays)
    unit_rows, units = _remap(plan.unit_rows, before)
    grows = np.zeros(plan.segment_starts.size, np.bool_)
    grows[plan.growing] = True
    unit_segments, starts, lengths, positions, readers, room, growing = _segments(
        before, slots[order], rooms[order], plan.row_positions, units, plan.unit_segments, plan.segment_starts,
        plan.segment_lengths, plan.segment_positions, plan.segment_rows, grows,
    )  # fmt: skip
    return replace(
        plan,
        row_positions=plan.row_positions[stays] + np.int32(1),
        row_order=_shift(kept)[order[stays]],
        row_extra=plan.row_extra[stays],
        unit_rows=unit_rows,
        unit_segments=unit_segments,
        unit_rank=plan.unit_rank[units],
        unit_cost=plan.unit_cost[units],
        segment_starts=starts,
        segment_lengths=lengths,
        segment_positions=positions,
        segment_rows=readers,
        segment_room=room,
        growing=growing,
        path_rows=_remap(plan.path_rows, before)[0],
        age=0,
        _origin=None,
        _windowed={},
    )
