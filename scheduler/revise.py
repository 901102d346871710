"""Revise a plan for the next step of the same leaves, some of which have ended or moved on to a new extent."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import Columns
from radixgen.core import Plan
from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Float64Array, Int32Array, Int64Array

Bools = NDArray[np.bool_]
_Units = tuple[
    Int32Array, Int32Array, Int32Array, Float64Array, Int64Array, Int32Array, Int32Array, Int32Array, Int32Array,
    Int64Array, Int32Array,
]  # fmt: skip


class RowUpdates(NamedTuple):
    """Changes of the rows of the previous step. Arrays are `[rows]`, in their order."""

    kept: Bools
    """Whether the row advanced by one token in the same leaf."""
    slots: Int64Array
    """Slot of the new token if it begins an extent, else -1."""
    rooms: Int32Array
    """Keys by which the row's last extent can still grow."""
    num_extended: int


class StepRows(NamedTuple):
    """The rows of a step. Arrays are `[rows]`."""

    nodes: Int32Array
    """Node ids."""
    positions: Int32Array
    slots: Int64Array
    """Slot that the row's KV is written to; or where it is cached, if that directly follows the previous row's slot;
    else -1.
    """
    policies: Int32Array
    """Index of the policy that the row reads under."""

    def same(self, other: "StepRows") -> bool:
        """Compare positions first: they differ in most steps."""
        return (
            np.array_equal(self.positions, other.positions)
            and np.array_equal(self.nodes, other.nodes)
            and np.array_equal(self.slots, other.slots)
            and np.array_equal(self.policies, other.policies)
        )


@compiled
def _row_updates(
    old_ids: Int32Array, old_positions: Int32Array, old_slots: Int64Array, ids: Int32Array, positions: Int32Array,
    slots: Int64Array, start: Int32Array, scheduled: Int32Array, reserved: Int32Array, following: Int32Array,
    changed: Int64Array, nodes: Int64Array, version: int,
) -> tuple[bool, Bools, Int64Array, Int32Array, int]:  # fmt: skip
    kept, extension = np.zeros(old_ids.size, np.bool_), np.full(old_ids.size, -1)
    rooms = np.zeros(old_ids.size, np.int32)
    at = num_extended = 0
    for node in nodes:
        if changed[node] > version:
            return False, kept, extension, rooms, 0
    for row in range(old_ids.size):
        if at == ids.size or old_ids[row] != ids[at]:
            continue
        node, position, slot = ids[at], positions[at], slots[at]
        if position != old_positions[row] + 1 or slot < 0 or old_slots[row] < 0:
            break
        kept[row] = True
        rooms[row] = reserved[node] + following[node] + start[node] + scheduled[node] - position - 1
        if slot != old_slots[row] + 1:
            extension[row] = slot
            num_extended += 1
        at += 1
    return at == ids.size, kept, extension, rooms, num_extended


def row_updates(columns: Columns, version: int, nodes: Int64Array, old: StepRows, rows: StepRows) -> RowUpdates | None:
    """Return the changes from the rows `old`, each the last token of a leaf, to `rows` of the next step.

    Returns None unless `rows` are a subsequence of the leaves, each one token further, or if any of `nodes`, all that
    the plan reads, changed in more than length since the tree's `version`.
    """
    follows, kept, slots, rooms, num_extended = _row_updates(
        *old[:3],
        *rows[:3],
        columns.start,
        columns.scheduled,
        columns.reserved,
        columns.following,
        columns.changed,
        nodes,
        version,
    )
    return RowUpdates(kept, slots, rooms, num_extended) if follows else None


@inlined
def _remap(ranges: Int32Array, before: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Return the ranges of rows `[n, 2]` that are not empty in the new numbering, and their indices."""
    rows, which = np.empty_like(ranges), np.empty(len(ranges), np.int32)
    made = 0
    for index in range(len(ranges)):
        low, high = before[ranges[index, 0]], before[ranges[index, 1]]
        if low < high:
            rows[made, 0], rows[made, 1], which[made] = low, high, index
            made += 1
    return rows[:made], which[:made]


@compiled
def _rows(
    kept: Bools, slots: Int64Array, rooms: Int32Array, order: Int64Array, extra: Int32Array, positions: Int32Array
) -> tuple[Int32Array, Int64Array, Int32Array, Int64Array, Int32Array, Int32Array]:
    """Return, in the plan's order: the number of kept rows before each row, and in all, `[rows + 1]`; slots and rooms;
    order, extra and positions of the kept rows.
    """
    size = order.size
    before, shift = np.zeros((2, size + 1), np.int32)
    to_slots, to_order = np.empty((2, size), np.int64)
    to_rooms, to_extra, to_positions = np.empty((3, size), np.int32)
    for row in range(size):
        shift[row + 1] = shift[row] + kept[row]
    for row in range(size):
        old, at = order[row], before[row]
        to_slots[row], to_rooms[row] = slots[old], rooms[old]
        to_order[at], to_extra[at], to_positions[at] = shift[old], extra[row], positions[row] + 1
        before[row + 1] = at + kept[old]
    made = before[size]
    return before, to_slots, to_rooms, to_order[:made], to_extra[:made], to_positions[:made]


@compiled
def _units(
    before: Int32Array, slots: Int64Array, rooms: Int32Array, positions: Int32Array, growing: Int64Array,
    unit_rows: Int32Array, unit_segments: Int32Array, ranks: Int32Array, costs: Float64Array, starts: Int64Array,
    lengths: Int32Array, firsts: Int32Array, readers: Int32Array, path_rows: Int32Array,
) -> _Units:  # fmt: skip
    """Return the units with remaining rows, and their segments with remaining readers. Growing segments get one more
    key, or are followed by a segment of one key.
    """
    rows, units = _remap(unit_rows, before)
    most = starts.size + positions.size
    ranges, to_ranks, to_costs = np.empty_like(rows), np.empty(units.size, np.int32), np.empty(units.size)
    to_start, grown = np.empty(most, np.int64), np.empty(positions.size, np.int64)
    to_length, to_first = np.empty((2, most), np.int32)
    to_readers, to_room = np.empty((most, 2), np.int32), np.zeros(most, np.int32)
    made = grows = grew = 0
    for place in range(units.size):
        unit = units[place]
        ranges[place, 0], to_ranks[place], to_costs[place] = made, ranks[unit], costs[unit]
        for old in range(unit_segments[unit, 0], unit_segments[unit, 1]):
            row = readers[old, 0]
            low, high = before[row], before[readers[old, 1]]
            if low == high:
                continue
            to_start[made], to_length[made], to_first[made] = starts[old], lengths[old], firsts[old]
            to_readers[made, 0], to_readers[made, 1] = low, high
            while grew < growing.size and growing[grew] < old:
                grew += 1
            if grew < growing.size and growing[grew] == old:
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
    return (
        rows, ranges, to_ranks, to_costs, to_start[:made], to_length[:made], to_first[:made], to_readers[:made],
        to_room[:made], grown[:grows], _remap(path_rows, before)[0],
    )  # fmt: skip


def revise(plan: Plan, updates: RowUpdates) -> Plan:
    """Return the plan in which the kept rows, each the last token of its own leaf, have advanced by one token.

    Units without rows are dropped; the others read what they read before. A revised plan is exact, and about as good as
    the original.
    """
    before, slots, rooms, order, extra, positions = _rows(
        updates.kept, updates.slots, updates.rooms, plan.row_order, plan.row_extra, plan.row_positions
    )
    units = _units(
        before, slots, rooms, plan.row_positions, plan.growing, plan.unit_rows, plan.unit_segments, plan.unit_rank,
        plan.unit_cost, plan.segment_starts, plan.segment_lengths, plan.segment_positions, plan.segment_rows,
        plan.path_rows,
    )  # fmt: skip
    unit_rows, unit_segments, ranks, costs, starts, lengths, firsts, readers, room, growing, path_rows = units
    return Plan(
        row_positions=positions,
        row_order=order,
        row_extra=extra,
        unit_rows=unit_rows,
        unit_segments=unit_segments,
        unit_rank=ranks,
        unit_cost=costs,
        tile_rows=plan.tile_rows,
        predicted=plan.predicted,
        segment_starts=starts,
        segment_lengths=lengths,
        segment_positions=firsts,
        segment_rows=readers,
        segment_room=room,
        growing=growing,
        path_rows=path_rows,
        nodes=plan.nodes,
    )
