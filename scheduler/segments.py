"""Segments of a plan: the runs of slots that each unit reads."""

from typing import NamedTuple

import numpy as np

from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.scheduler.forest import Paths
from radixgen.scheduler.tables import (
    E_KEYS,
    E_POSITION,
    E_SLOT,
    FIRST_EXTENT,
    P_FIRST_ROW,
    P_FIRST_SEGMENT,
    P_KEYS,
    P_MIXED,
    P_PIECE,
    P_RANK,
    P_STOP_ROW,
    P_STOP_SEGMENT,
    PARENT,
    ROOM,
    S_FIRST_ROW,
    S_GROWS,
    S_KEYS,
    S_POSITION,
    S_ROOM,
    S_SLOT,
    S_STOP_ROW,
    STOP_EXTENT,
    U_FIRST_NODE,
    U_FIRST_ROW,
    U_LOWEST,
    U_PENDING,
    U_RANK,
    U_STOP_NODE,
    U_STOP_ROW,
    W_FIRST_ROW,
    W_MERGED,
    W_OWN_ROWS,
    W_PARENT,
    W_ROWS,
)


class Layout(NamedTuple):
    """Units and segments of a plan, named as in `Plan`."""

    unit_rows: Int32Array
    unit_segments: Int32Array
    unit_rank: Int32Array
    keys: Int64Array
    """`[units]`"""
    mixed: Int64Array
    """`[units]`: number of keys charged as mixed."""
    segment_starts: Int64Array
    segment_lengths: Int32Array
    segment_positions: Int32Array
    segment_rows: Int32Array
    segment_room: Int32Array
    growing: Int64Array


def lay_out(paths: Paths, units: Int64Array, limits: Int64Array, least_run: int, weight: int) -> Layout:
    """Split units along their keys, and return the pieces with their segments, root first.

    units `[units, 9]` as returned by `collect`. limits `[units]`: maximum keys per piece, 0 for no limit. A key
    in an extent shorter than `least_run` is mixed; towards the limit it counts as `weight` keys.
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
def _units(table: Int64Array) -> tuple[Int32Array, Int32Array, Int32Array, Int64Array, Int64Array]:
    count = len(table)
    rows, segments, rank = np.empty((count, 2), np.int32), np.empty((count, 2), np.int32), np.empty(count, np.int32)
    keys, mixed = np.empty((2, count), np.int64)
    pieces = 1
    for unit in range(count):
        pieces = max(pieces, table[unit, P_PIECE] + 1)
    for unit in range(count):
        rows[unit, 0], rows[unit, 1] = table[unit, P_FIRST_ROW], table[unit, P_STOP_ROW]
        segments[unit, 0], segments[unit, 1] = table[unit, P_FIRST_SEGMENT], table[unit, P_STOP_SEGMENT]
        rank[unit] = table[unit, P_RANK] * pieces + table[unit, P_PIECE]
        keys[unit], mixed[unit] = table[unit, P_KEYS], table[unit, P_MIXED]
    return rows, segments, rank, keys, mixed


@compiled
def _segments(table: Int64Array) -> tuple[Int64Array, Int32Array, Int32Array, Int32Array, Int32Array, Int64Array]:
    count, grow = len(table), 0
    starts, growing = np.empty((2, count), np.int64)
    lengths, positions, room = np.empty((3, count), np.int32)
    rows = np.empty((count, 2), np.int32)
    for segment in range(count):
        starts[segment], lengths[segment] = table[segment, S_SLOT], table[segment, S_KEYS]
        positions[segment], room[segment] = table[segment, S_POSITION], table[segment, S_ROOM]
        rows[segment, 0], rows[segment, 1] = table[segment, S_FIRST_ROW], table[segment, S_STOP_ROW]
        growing[grow] = segment
        grow += table[segment, S_GROWS]
    return starts, lengths, positions, rows, room, growing[:grow]


@compiled
def path_rows(walk: Int64Array, tile_rows: int) -> Int32Array:
    """Return the rows of each node in tiles, as attention without sharing would have them: `[tiles, 2]`."""
    count = 0
    for at in range(len(walk)):
        count += -(-walk[at, W_OWN_ROWS] // tile_rows)
    rows = np.empty((count, 2), np.int32)
    made = 0
    for at in range(len(walk)):
        first, stop = walk[at, W_FIRST_ROW], walk[at, W_FIRST_ROW] + walk[at, W_OWN_ROWS]
        while first < stop:
            rows[made, 0], rows[made, 1] = first, min(first + tile_rows, stop)
            first += tile_rows
            made += 1
    return rows


@compiled
def _fill(
    units: Int64Array, limits: Int64Array, nodes: Int64Array, extents: Int64Array, lowest: Int64Array,
    walk: Int64Array, positions: Int64Array, least_run: int, weight: int, unit_table: Int64Array,
    segment_table: Int64Array,
) -> tuple[int, int]:  # fmt: skip
    """As `lay_out`; other arguments as in `Paths`.

    Fills `unit_table [pieces, 8]`, the columns `P_FIRST_ROW` to `P_MIXED`, and `segment_table [segments, 7]`, the
    columns `S_SLOT` to `S_ROOM`. Returns the number of units and segments, even if the tables are too small for all of
    them.
    """
    highest = _highest_positions(walk, positions)
    members = np.empty(walk.shape[0], np.int64)
    made_units = made = 0
    for unit in range(units.shape[0]):
        first_row, stop_row = units[unit, U_FIRST_ROW], units[unit, U_STOP_ROW]
        pending, rank = units[unit, U_PENDING], units[unit, U_RANK]
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
                low, high = max(low, walk[at, W_FIRST_ROW]), min(high, walk[at, W_FIRST_ROW] + walk[at, W_ROWS])
                seen = min(newest, highest[at])
            masked, alone = high - low < stop_row - first_row, walk[at, W_ROWS] == 1 and walk[at, W_OWN_ROWS] == 1
            for step in range(walk[at, W_MERGED] - 1, -1, -1):
                node = lowest[at]
                for _ in range(step):
                    node = nodes[node, PARENT]
                last = nodes[node, STOP_EXTENT] - 1 if alone and step == 0 and nodes[node, ROOM] >= 0 else -1
                while last >= 0 and extents[last, E_KEYS] == 0:
                    last -= 1
                for extent in range(nodes[node, FIRST_EXTENT], nodes[node, STOP_EXTENT]):
                    slot, position = extents[extent, E_SLOT], extents[extent, E_POSITION]
                    length, end = min(extents[extent, E_KEYS], seen - position + 1), position + extents[extent, E_KEYS]
                    short = masked or extents[extent, E_KEYS] < least_run
                    each = weight if short else 1
                    while length > 0:
                        if left < each:
                            done = first_row, stop_row, begun, made, rank, piece, keys, mixed
                            made_units = _write(done, unit_table, made_units)
                            piece, left, begun, keys, mixed = piece + 1, limit, made, 0, 0
                        part = length if length * each <= left else left // each
                        grows = extent == last and position + part == end
                        room = nodes[node, ROOM] if grows else 0
                        made = _write((slot, part, position, low, high, int(grows), room), segment_table, made)
                        keys, mixed, left = keys + part, mixed + (part if short else 0), left - part * each
                        slot, position, length = slot + part, position + part, length - part
        done = first_row, stop_row, begun, made, rank, piece, keys, mixed
        made_units = _write(done, unit_table, made_units)
    return made_units, made


@inlined
def _members(unit: int, units: Int64Array, walk: Int64Array, members: Int64Array) -> int:
    """Collect the nodes that a unit reads, root first: those pending above it, then its own. Returns their number."""
    at, pending = units[unit, U_LOWEST], units[unit, U_PENDING]
    for member in range(pending - 1, -1, -1):
        members[member] = at
        at = walk[at, W_PARENT]
    count: int = pending
    for at in range(units[unit, U_FIRST_NODE], units[unit, U_STOP_NODE]):
        members[count] = at
        count += 1
    return count


@inlined
def _write(row: tuple[int, ...], table: Int64Array, at: int) -> int:
    """Write a row if the table has room for it. Returns the next index."""
    if at < len(table):
        for column, value in enumerate(row):
            table[at, column] = value
    return at + 1


@compiled
def _highest_positions(walk: Int64Array, positions: Int64Array) -> Int64Array:
    """Return the highest position at or below each node, `[n]`; positions `[rows]`, in the walk's order."""
    highest = np.full(walk.shape[0], -1, np.int64)
    for at in range(walk.shape[0] - 1, -1, -1):
        if walk[at, W_OWN_ROWS]:
            highest[at] = max(highest[at], positions[walk[at, W_FIRST_ROW] + walk[at, W_OWN_ROWS] - 1])
        if walk[at, W_PARENT] >= 0:
            highest[walk[at, W_PARENT]] = max(highest[walk[at, W_PARENT]], highest[at])
    return highest
