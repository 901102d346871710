"""From units to the arrays of a plan: which runs of slots each unit reads."""

from typing import NamedTuple

import numpy as np

from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.scheduler.partition import FIRST_EXTENT, LENGTH, PARENT, ROOM, START, STOP_EXTENT, Ints, Paths


class Layout(NamedTuple):
    """Units and segments of a plan, the names as there."""

    unit_rows: Int32Array
    unit_segments: Int32Array
    unit_rank: Int32Array
    keys: Int64Array
    """`[units]`"""
    mixed: Int64Array
    """`[units]`: how many of the keys are charged as mixed"""
    segment_starts: Int64Array
    segment_lengths: Int32Array
    segment_positions: Int32Array
    segment_rows: Int32Array
    segment_room: Int32Array
    growing: Int64Array


def lay_out(paths: Paths, units: Int64Array, limits: Int64Array, least_run: int, weight: int) -> Layout:
    """The segments of every unit, root first, and the units anew, those with a limit split along their keys.

    units `[units, 9]` as `collect` gives them; limits `[units]`: keys of one piece at most, a mixed one counted
    `weight` times, 0 for no limit; an extent of fewer than `least_run` keys counts as mixed.
    """
    num_units, num_segments = 2 * len(units), 2 * (len(units) + len(paths.extents))
    unit_table, segment_table = np.empty((0, 8), np.int64), np.empty((0, 7), np.int64)
    while num_units > len(unit_table) or num_segments > len(segment_table):
        unit_table, segment_table = np.empty((num_units, 8), np.int64), np.empty((num_segments, 7), np.int64)
        num_units, num_segments = _fill(
            units, limits, paths.nodes, paths.extents, paths.lowest, paths.walk, paths.positions, least_run, weight,
            unit_table, segment_table,
        )  # fmt: skip
    laid = _units(unit_table[:num_units]) + _segments(segment_table[:num_segments])
    return Layout(*laid)


@compiled
def _units(table: Ints) -> tuple[Int32Array, Int32Array, Int32Array, Int64Array, Int64Array]:
    count = len(table)
    rows, segments, rank = np.empty((count, 2), np.int32), np.empty((count, 2), np.int32), np.empty(count, np.int32)
    keys, mixed = np.empty((2, count), np.int64)
    pieces = 1
    for unit in range(count):
        pieces = max(pieces, table[unit, 5] + 1)
    for unit in range(count):
        rows[unit, 0], rows[unit, 1] = table[unit, 0], table[unit, 1]
        segments[unit, 0], segments[unit, 1] = table[unit, 2], table[unit, 3]
        rank[unit] = table[unit, 4] * pieces + table[unit, 5]
        keys[unit], mixed[unit] = table[unit, 6], table[unit, 7]
    return rows, segments, rank, keys, mixed


@compiled
def _segments(table: Ints) -> tuple[Int64Array, Int32Array, Int32Array, Int32Array, Int32Array, Int64Array]:
    count, grow = len(table), 0
    starts, growing = np.empty((2, count), np.int64)
    lengths, positions, room = np.empty((3, count), np.int32)
    rows = np.empty((count, 2), np.int32)
    for segment in range(count):
        starts[segment], lengths[segment], positions[segment] = table[segment, 0], table[segment, 1], table[segment, 2]
        rows[segment, 0], rows[segment, 1], room[segment] = table[segment, 3], table[segment, 4], table[segment, 6]
        growing[grow] = segment
        grow += table[segment, 5]
    return starts, lengths, positions, rows, room, growing[:grow]


@compiled
def path_rows(walk: Ints, tile_rows: int) -> Int32Array:
    """The rows of each node, in tiles, as reading without sharing would have them: `[tiles, 2]`."""
    count = 0
    for at in range(len(walk)):
        count += -(-walk[at, 4] // tile_rows)
    rows = np.empty((count, 2), np.int32)
    made = 0
    for at in range(len(walk)):
        first, stop = walk[at, 5], walk[at, 5] + walk[at, 4]
        while first < stop:
            rows[made, 0], rows[made, 1] = first, min(first + tile_rows, stop)
            first += tile_rows
            made += 1
    return rows


@compiled
def _fill(
    units: Ints, limits: Ints, nodes: Ints, extents: Ints, lowest: Ints, walk: Ints, positions: Ints, least_run: int,
    weight: int, unit_table: Ints, segment_table: Ints,
) -> tuple[int, int]:  # fmt: skip
    """As `lay_out`; the rest as in `Paths`.

    Fills `unit_table [pieces, 8]`: first row, row behind the last, first segment and the one behind the last, rank,
    piece, keys, mixed keys; and `segment_table [segments, 7]`: first slot, keys, first position, the rows that see it
    (from, to), whether it grows, room. Returns how many units and segments there are, whether or not the tables hold
    them all.
    """
    highest = _highest_positions(walk, positions)
    members = np.empty(walk.shape[0], np.int64)
    made_units = made = 0
    for unit in range(units.shape[0]):
        first_row, stop_row, pending, rank = units[unit, 0], units[unit, 1], units[unit, 3], units[unit, 6]
        newest = -1
        for row in range(first_row, stop_row):
            newest = max(newest, positions[row])
        count = _members(unit, units, walk, members)
        limit = limits[unit] if limits[unit] else np.iinfo(np.int64).max
        piece, left, begun, keys, mixed = 0, limit, made, 0, 0
        for member in range(count):
            at = members[member]
            low, high, seen = first_row, stop_row, newest
            if member >= pending:
                low, high = max(low, walk[at, 5]), min(high, walk[at, 5] + walk[at, 3])
                seen = min(newest, highest[at])
            masked, alone = high - low < stop_row - first_row, walk[at, 3] == 1 and walk[at, 4] == 1
            for step in range(walk[at, 6] - 1, -1, -1):
                node = lowest[at]
                for _ in range(step):
                    node = nodes[node, PARENT]
                position, end = nodes[node, START], nodes[node, START] + nodes[node, LENGTH]
                for extent in range(nodes[node, FIRST_EXTENT], nodes[node, STOP_EXTENT]):
                    slot, length = extents[extent, 0], min(extents[extent, 1], seen - position + 1)
                    short = masked or extents[extent, 1] < least_run
                    each = weight if short else 1
                    while length > 0:
                        if left < each:
                            done = first_row, stop_row, begun, made, rank, piece, keys, mixed
                            made_units = _write(done, unit_table, made_units)
                            piece, left, begun, keys, mixed = piece + 1, limit, made, 0, 0
                        part = length if length * each <= left else left // each
                        grows = alone and step == 0 and position + part == end
                        room = nodes[node, ROOM] if grows else 0
                        made = _write((slot, part, position, low, high, int(grows), room), segment_table, made)
                        keys, mixed, left = keys + part, mixed + (part if short else 0), left - part * each
                        slot, position, length = slot + part, position + part, length - part
        done = first_row, stop_row, begun, made, rank, piece, keys, mixed
        made_units = _write(done, unit_table, made_units)
    return made_units, made


@inlined
def _members(unit: int, units: Ints, walk: Ints, members: Ints) -> int:
    """The nodes that a unit reads, root first: those pending above it, then its own. Returns how many."""
    at, pending = units[unit, 2], units[unit, 3]
    for member in range(pending - 1, -1, -1):
        members[member] = at
        at = walk[at, 0]
    count: int = pending
    for at in range(units[unit, 4], units[unit, 5]):
        members[count] = at
        count += 1
    return count


@inlined
def _write(row: tuple[int, ...], table: Ints, at: int) -> int:
    """Write a row where the table still has one. Returns the place of the next."""
    if at < len(table):
        for column, value in enumerate(row):
            table[at, column] = value
    return at + 1


@compiled
def _highest_positions(walk: Ints, positions: Ints) -> Ints:
    """Of the rows at or below each node, `[n]`; positions `[rows]`, in the walk's order."""
    highest = np.full(walk.shape[0], -1, np.int64)
    for at in range(walk.shape[0] - 1, -1, -1):
        if walk[at, 4]:
            highest[at] = max(highest[at], positions[walk[at, 5] + walk[at, 4] - 1])
        if walk[at, 0] >= 0:
            highest[walk[at, 0]] = max(highest[walk[at, 0]], highest[at])
    return highest
