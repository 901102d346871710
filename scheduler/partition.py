"""Where to cut the paths of a tree: the cheapest partition into units, by dynamic programming.

Nodes come in preorder here, so that a subtree is one range of nodes and one range of rows. Going down a path, a node
is either *cut*: a unit reads its keys, and those of the pending nodes above it, for all rows at or below it; or
*folded*: it becomes pending too, and every unit below reads it. At the bottom, a *run* of consecutive siblings' whole
subtrees (with the parent's own rows as the first of them) may share one tile, each row under a mask.

`best[v, j]` is the least that all at or below `v` can cost with `j` nodes pending above it. A node's children are a
sequence that is parted into runs and single children; the end of the best run is a minimum over a sliding window, so
that a node costs its children times the tile classes, for each `j`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core.compiled import compiled

FOLDED, CUT, MIXED = 0, 1, 2

MAX_STATES = 16_000
"""Of `best`: bounds the pending nodes, and with them the time, where a tree is deep."""

# What `fill_segments` counts.
UNITS, SEGMENTS, PIECE, LEFT, BEGUN, KEYS, MIXED_KEYS = range(7)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


# Columns of `Paths.nodes`.
PARENT, START, LENGTH, FIRST_EXTENT, STOP_EXTENT, ROOM = range(6)


class Paths(NamedTuple):
    """The rows' paths: the forest under one root above all, so that rows of several trees are siblings like any others,
    and its depth-first walk, as `preorder` gives it.
    """

    nodes: Ints
    """`[nodes, 6]`: parent, first position, keys, first extent and the one behind the last, room to grow"""
    extents: Ints
    """`[extents, 2]`: first slot, keys"""
    lowest: Ints
    walk: Ints
    keys: Ints
    order: Ints
    positions: Ints
    """`[rows]`, in the walk's order"""


@compiled
def preorder(
    parents: Ints, row_nodes: Ints, row_positions: Ints, lengths: Ints, short: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """The depth-first walk over the nodes at or below which rows stand.

    parents `[nodes]` come before their children; node 0 is the only root. A node without rows of its own and with one
    child is counted as part of that child. Rows of a node without keys count for the nearest node above that has
    some. Returns `lowest [n]`: the node at each place, the lowest where several are counted as one; `walk [n, 7]`: its
    parent's place (-1 at the root), depth, places and rows at or below it, own rows, first row, and how many nodes it
    stands for; `keys [n, 2]`: the keys of these, and how many of them `short` [nodes] counts; `order [rows]`: which row
    comes at each place, those of one node by position.
    """
    count = parents.size
    home = np.zeros(count, np.int64)
    own = np.zeros(count, np.int64)
    for node in range(1, count):
        home[node] = node if lengths[node] > 0 else home[parents[node]]
    for row in range(row_nodes.size):
        own[home[row_nodes[row]]] += 1
    below, heirs = own.copy(), np.zeros(count, np.int64)
    for node in range(count - 1, 0, -1):
        below[parents[node]] += below[node]
        heirs[parents[node]] += below[node] > 0
    above, stands_for = np.full(count, -1, np.int64), np.ones(count, np.int64)
    keys = np.stack((lengths, short), axis=1)
    for node in range(1, count):
        parent = parents[node]
        above[node] = parent
        if parent and own[parent] == 0 and heirs[parent] == 1:
            above[node] = above[parent]
            stands_for[node] += stands_for[parent]
            keys[node] += keys[parent]
    size = np.zeros(count, np.int64)
    for node in range(count - 1, -1, -1):
        joined = node > 0 and own[node] == 0 and heirs[node] == 1
        size[node] = 0 if below[node] == 0 or joined else size[node] + 1
        if above[node] >= 0:
            size[above[node]] += size[node]
    lowest = np.empty(size[0], np.int64)
    walk = np.zeros((size[0], 7), np.int64)
    walk_keys = np.empty((size[0], 2), np.int64)
    place = np.full(count, -1, np.int64)
    next_place, next_row = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for node in range(count):
        if size[node] == 0:
            continue
        parent = above[node]
        at = next_place[parent]
        place[node], lowest[at], walk_keys[at] = at, node, keys[node]
        walk[at, 0] = place[parent] if parent >= 0 else -1
        walk[at, 1] = walk[walk[at, 0], 1] + 1 if parent >= 0 else 0
        walk[at, 2], walk[at, 3], walk[at, 4] = size[node], below[node], own[node]
        walk[at, 5], walk[at, 6] = next_row[parent], stands_for[node]
        next_place[parent] += size[node]
        next_row[parent] += below[node]
        next_place[node] = at + 1
        next_row[node] = walk[at, 5] + own[node]
    return lowest, walk, walk_keys, order_rows(row_nodes, row_positions, home, place, walk)


@compiled
def order_rows(row_nodes: Ints, row_positions: Ints, home: Ints, place: Ints, walk: Ints) -> Ints:
    """Rows by node, those of one node by position."""
    order = np.empty(row_nodes.size, np.int64)
    taken = np.zeros(walk.shape[0], np.int64)
    for row in range(row_nodes.size):
        at = place[home[row_nodes[row]]]
        order[walk[at, 5] + taken[at]] = row
        taken[at] += 1
    for at in range(walk.shape[0]):
        first, own = walk[at, 5], walk[at, 4]
        sorted_already = True
        for i in range(first + 1, first + own):
            if row_positions[order[i]] < row_positions[order[i - 1]]:
                sorted_already = False
        if not sorted_already:
            mine = order[first : first + own].copy()
            order[first : first + own] = mine[np.argsort(row_positions[mine], kind="mergesort")]
    return order


@compiled
def tile_cost(rows: int, keys: int, short: int, tile_rows: Ints, prices: Floats) -> tuple[float, int]:
    """The cheapest way to tile `rows` rows against `keys` keys, `short` of which are charged as mixed: its cost, and
    the rows of a full tile.
    """
    least, chosen = np.inf, 0
    for kind in range(tile_rows.size):
        one = prices[0, kind] + (keys - short) * prices[1, kind] + short * prices[2, kind]
        if rows <= tile_rows[kind]:
            if one < least:
                least, chosen = one, tile_rows[kind]
            continue
        full, rest = rows // tile_rows[kind], rows % tile_rows[kind]
        cost = full * one
        if rest:
            least_rest = np.inf
            for other in range(tile_rows.size):
                if tile_rows[other] >= rest:
                    last = prices[0, other] + (keys - short) * prices[1, other] + short * prices[2, other]
                    least_rest = min(least_rest, last)
            cost += least_rest
        if cost < least:
            least, chosen = cost, tile_rows[kind]
    return least, chosen


@compiled
def partition(
    walk: Ints,
    keys: Ints,
    may_cut: Ints,
    mix: bool,
    tile_rows: Ints,
    prices: Floats,
    partial: float,
    most_pending: int,
) -> tuple[Floats, Ints, Ints]:
    """The table of least costs, and how they come about.

    walk and keys as `preorder` gives them; may_cut `[n]`: 0 never, 1 where it pays; tile_rows `[classes]` and prices
    `[3, classes]` as `CostModel.columns`; partial: of one row, all of its heads; most_pending: nodes folded one below
    the other.

    Returns `best [n, most_pending + 1]`, inf where a state can't be; `cuts`, the same shape: 1 where the node is cut;
    `runs [n, most_pending + 1, 2]`: with so many nodes pending below the parent, the place behind the run that begins
    with this node's subtree (0), and with this node's own rows (1); -1 for no run.
    """
    count = walk.shape[0]
    best = np.full((count, most_pending + 1), np.inf)
    cuts = np.zeros((count, most_pending + 1), np.int64)
    runs = np.full((count, most_pending + 1, 2), -1, np.int64)
    tokens = keys[:, 0].copy()
    for node in range(count - 1, 0, -1):
        if walk[node, 0] >= 0:
            tokens[walk[node, 0]] += tokens[node]
    folded = np.empty(most_pending + 2)
    alone, least = np.empty((2, count + 2))
    ends, rows, below_keys = np.empty((3, count + 2), np.int64)
    queue = np.empty((tile_rows.size, count + 2), np.int64)
    marks = np.empty((2, tile_rows.size), np.int64)
    for node in range(count - 1, -1, -1):
        parent, depth, own, below = walk[node, 0], walk[node, 1], walk[node, 4], walk[node, 3]
        if walk[node, 2] == 1:
            pending, short, above = keys[node, 0], keys[node, 1], parent
            for j in range(min(depth, most_pending) + 1):
                price = 0.0 if j == depth else partial
                best[node, j] = tile_cost(own, pending, short, tile_rows, prices)[0] + own * price
                cuts[node, j] = j == most_pending
                pending, short = pending + keys[above, 0], short + keys[above, 1]
                above = walk[above, 0]
            continue
        pending = short = 0
        above = node
        for j in range(min(depth + 1, most_pending) + 1):
            if j:
                pending, short = pending + keys[above, 0], short + keys[above, 1]
                above = walk[above, 0]
            price = 0.0 if j == depth + 1 else partial
            folded[j] = _sequence(
                node, j, pending, short, price, walk, tokens, best, runs, mix, tile_rows, prices, alone, ends, rows,
                below_keys, least, queue, marks,
            )  # fmt: skip
        pending = short = 0
        above = parent
        for j in range(min(depth, most_pending) + 1):
            if j:
                pending, short = pending + keys[above, 0], short + keys[above, 1]
                above = walk[above, 0]
            read, short_read = pending + keys[node, 0], short + keys[node, 1]
            fold = folded[j + 1] if j < most_pending else np.inf
            cut = np.inf
            if read > 0 and (may_cut[node] or j == most_pending):
                pieces = below - own if j == depth else below
                cut = tile_cost(below, read, short_read, tile_rows, prices)[0] + pieces * partial + folded[0]
            elif fold == np.inf:
                fold = folded[min(j + 1, most_pending)]
            cuts[node, j] = 1 if cut < fold else 0
            best[node, j] = min(cut, fold)
    return best, cuts, runs


@compiled
def _sequence(
    node: int,
    j: int,
    pending: int,
    short: int,
    price: float,
    walk: Ints,
    tokens: Ints,
    best: Floats,
    runs: Ints,
    mix: bool,
    tile_rows: Ints,
    prices: Floats,
    alone: Floats,
    ends: Ints,
    rows: Ints,
    keys: Ints,
    least: Floats,
    queue: Ints,
    marks: Ints,
) -> float:
    """The least cost of `node`'s own rows (unless j is 0: then it was cut) and of its children, with `j` nodes of
    `pending` keys, `short` of them in short extents, above them; writes where runs end.
    """
    count = 0
    rows[0] = keys[0] = 0
    if j and walk[node, 4]:
        cost = tile_cost(walk[node, 4], pending, short, tile_rows, prices)[0]
        alone[0], ends[0] = cost + walk[node, 4] * price, node + 1
        rows[1], keys[1] = walk[node, 4], 0
        count = 1
    child = node + 1
    while child < node + walk[node, 2]:
        alone[count], ends[count] = best[child, j], child + walk[child, 2]
        rows[count + 1], keys[count + 1] = rows[count] + walk[child, 3], keys[count] + tokens[child]
        count += 1
        child += walk[child, 2]
    least[count] = 0.0
    kinds = tile_rows.size if mix else 0
    for kind in range(kinds):
        marks[0, kind] = marks[1, kind] = 0
    for i in range(count - 1, -1, -1):
        low, end = alone[i] + least[i + 1], -1
        for kind in range(kinds):
            head, tail = marks[0, kind], marks[1, kind]
            value = prices[2, kind] * keys[i + 1] + price * rows[i + 1] + least[i + 1]
            while tail > head:
                last = queue[kind, tail - 1]
                if prices[2, kind] * keys[last] + price * rows[last] + least[last] <= value:
                    break
                tail -= 1
            queue[kind, tail] = i + 1
            tail += 1
            while head < tail and rows[queue[kind, head]] - rows[i] > tile_rows[kind]:
                head += 1
            marks[0, kind], marks[1, kind] = head, tail
            if head == tail:
                continue
            stop = queue[kind, head]
            cost = prices[0, kind] + prices[1, kind] * (pending - short)
            cost += prices[2, kind] * (short + keys[stop] - keys[i])
            cost += price * (rows[stop] - rows[i]) + least[stop]
            if cost < low or (cost == low and end < 0):
                low, end = cost, ends[stop - 1]
        least[i] = low
        first = ends[i - 1] if i else node + 1
        if i == 0 and j and walk[node, 4]:
            runs[node, j, 1] = end
        else:
            runs[first, j, 0] = end
    total: float = least[0]
    return total


@compiled
def collect(walk: Ints, keys: Ints, cuts: Ints, runs: Ints, tile_rows: Ints, prices: Floats) -> tuple[Ints, Ints]:
    """The units of the partition, in order of rows, ancestors first: `[units, 9]`. A `cuts` of one column holds
    however many nodes are pending.

    First row and the row behind the last; the lowest pending node and how many are pending; the first node of the
    unit's own and the one behind the last; its rank, ascending on every row's path; its keys, and how many of them are
    charged as mixed. And, `[n, 2]` for each node, what became of it (FOLDED, CUT or MIXED) and how many units read it.
    """
    fates = np.zeros((walk.shape[0], 2), np.int64)
    count, columns = walk.shape[0], cuts.shape[1]
    most_pending = columns - 1 if columns > 1 else count
    pending = np.full(count, -1, np.int64)
    units = np.empty((count + 64, 9), np.int64)
    made = 0
    node = 0
    while node < count:
        if walk[node, 0] < 0:
            pending[node] = 0
        j = pending[node]
        if j < 0:
            node += 1
            continue
        first, own, end, depth = walk[node, 5], walk[node, 4], node + walk[node, 2], walk[node, 1]
        child, below = node + 1, 0
        if cuts[node, min(j, columns - 1)]:
            fates[node, 0] = CUT
            read, short = _keys_above(node, j + 1, walk, keys)
            tile = tile_cost(walk[node, 3], read, short, tile_rows, prices)[1]
            units, made = _add(
                units, made, first, walk[node, 3], tile, walk[node, 0], j, node, node + 1, depth, read, short
            )
        else:
            below = min(j + 1, most_pending)
            stop = runs[node, min(below, columns - 1), 1]
            if own and stop < 0:
                read, short = _keys_above(node, below, walk, keys)
                tile = tile_cost(own, read, short, tile_rows, prices)[1]
                units, made = _add(units, made, first, own, tile, node, below, child, child, depth + 1, read, short)
            elif own:
                units, made = _add_run(units, made, first, node, below, child, stop, depth + 1, walk, keys)
                child = stop
        while child < end:
            stop = runs[child, min(below, columns - 1), 0]
            if stop < 0:
                pending[child] = below
                child += walk[child, 2]
                continue
            first = walk[child, 5]
            units, made = _add_run(units, made, first, node, below, child, stop, depth + 1, walk, keys)
            child = stop
        node += 1
    _count_readers(units[:made], walk, fates)
    return units[:made], fates


@compiled
def _count_readers(units: Ints, walk: Ints, fates: Ints) -> None:
    for unit in range(units.shape[0]):
        node = units[unit, 2]
        for _ in range(units[unit, 3]):
            fates[node, 1] += 1
            node = walk[node, 0]
        for own in range(units[unit, 4], units[unit, 5]):
            fates[own, 1] += 1
            if fates[own, 0] != CUT:
                fates[own, 0] = MIXED


@compiled
def _keys_above(node: int, count: int, walk: Ints, keys: Ints) -> tuple[int, int]:
    """Keys of `node` and the nodes above it, `count` in all, and how many of them lie in short extents."""
    read = short = 0
    for _ in range(count):
        read, short = read + keys[node, 0], short + keys[node, 1]
        node = walk[node, 0]
    return read, short


@compiled
def _add(
    units: Ints, made: int, first: int, rows: int, tile: int, above: int, j: int, node: int, end: int, rank: int,
    keys: int, mixed: int,
) -> tuple[Ints, int]:  # fmt: skip
    """Units of `rows` rows in tiles of at most `tile`."""
    stop = first + rows
    while first < stop:
        if made == len(units):
            grown = np.empty((2 * made, 9), np.int64)
            grown[:made] = units
            units = grown
        units[made, 0], units[made, 1] = first, min(first + tile, stop)
        units[made, 2], units[made, 3], units[made, 4], units[made, 5] = above, j, node, end
        units[made, 6], units[made, 7], units[made, 8] = rank, keys, mixed
        made += 1
        first += tile
    return units, made


@compiled
def _add_run(
    units: Ints, made: int, first: int, above: int, j: int, node: int, end: int, rank: int, walk: Ints, keys: Ints
) -> tuple[Ints, int]:
    """One unit: rows from `first` to the end of the last subtree before `end`."""
    stop = first
    last = node
    while last < end:
        stop = walk[last, 5] + walk[last, 3]
        last += walk[last, 2]
    if last == node:
        stop = first + walk[above, 4]
    read, mixed = _keys_above(above, j, walk, keys)
    inner = keys[node:end, 0].sum()
    rows = stop - first
    return _add(units, made, first, rows, rows, above, j, node, end, rank, read + inner, mixed + inner)


@compiled
def highest_positions(walk: Ints, positions: Ints) -> Ints:
    """Of the rows at or below each node, `[n]`; positions `[rows]`, in the walk's order."""
    highest = np.full(walk.shape[0], -1, np.int64)
    for at in range(walk.shape[0] - 1, -1, -1):
        if walk[at, 4]:
            highest[at] = max(highest[at], positions[walk[at, 5] + walk[at, 4] - 1])
        if walk[at, 0] >= 0:
            highest[walk[at, 0]] = max(highest[walk[at, 0]], highest[at])
    return highest


@compiled
def fill_segments(
    units: Ints, limits: Ints, nodes: Ints, extents: Ints, lowest: Ints, walk: Ints, positions: Ints, least_run: int,
    weight: int, unit_table: Ints, segment_table: Ints,
) -> tuple[int, int]:  # fmt: skip
    """The segments of every unit, root first, and the units anew, those with a limit split along their keys.

    units `[units, 9]` as `collect` gives them; limits `[units]`: keys of one piece at most, a mixed one counted
    `weight` times, 0 for no limit; an extent of fewer than `least_run` keys counts as mixed; the rest as in `Paths`.
    Fills `unit_table [pieces, 8]`: first row, row behind the last, first segment and the one behind the last, rank,
    piece, keys, mixed keys; and `segment_table [segments, 7]`: first slot, keys, first position, the rows that see it
    (from, to), whether it grows, room. Returns how many units and segments there are, whether or not the tables hold
    them all.
    """
    highest = highest_positions(walk, positions)
    chain = np.empty(walk.shape[0], np.int64)
    state = np.zeros(7, np.int64)
    for unit in range(units.shape[0]):
        first_row, stop_row, pending = units[unit, 0], units[unit, 1], units[unit, 3]
        newest = positions[first_row:stop_row].max()
        limit = limits[unit] if limits[unit] else np.iinfo(np.int64).max
        state[PIECE], state[LEFT] = 0, limit
        at = units[unit, 2]
        for member in range(pending - 1, -1, -1):
            chain[member] = at
            at = walk[at, 0]
        for member in range(pending):
            _read_node(
                chain[member], first_row, stop_row, newest, False, limit, state, units, unit, nodes, extents, lowest,
                walk, least_run, weight, unit_table, segment_table,
            )  # fmt: skip
        for at in range(units[unit, 4], units[unit, 5]):
            low, high = max(first_row, walk[at, 5]), min(stop_row, walk[at, 5] + walk[at, 3])
            masked = low > first_row or high < stop_row
            seen = min(newest, highest[at])
            _read_node(
                at, low, high, seen, masked, limit, state, units, unit, nodes, extents, lowest, walk, least_run,
                weight, unit_table, segment_table,
            )  # fmt: skip
        _close(state, units, unit, unit_table)
    return state[UNITS], state[SEGMENTS]


@compiled
def _read_node(
    at: int, low: int, high: int, newest: int, masked: bool, limit: int, state: Ints, units: Ints, unit: int,
    nodes: Ints, extents: Ints, lowest: Ints, walk: Ints, least_run: int, weight: int, unit_table: Ints,
    segment_table: Ints,
) -> None:  # fmt: skip
    """The segments of all nodes that stand at place `at`, up to position `newest`, for the rows `[low, high)`."""
    alone = walk[at, 3] == 1 and walk[at, 4] == 1
    for step in range(walk[at, 6] - 1, -1, -1):
        node = lowest[at]
        for _ in range(step):
            node = nodes[node, PARENT]
        position, end = nodes[node, START], nodes[node, START] + nodes[node, LENGTH]
        for extent in range(nodes[node, FIRST_EXTENT], nodes[node, STOP_EXTENT]):
            slot, length = extents[extent, 0], min(extents[extent, 1], newest - position + 1)
            short = masked or extents[extent, 1] < least_run
            each = weight if short else 1
            while length > 0:
                if state[LEFT] < each:
                    _close(state, units, unit, unit_table)
                    state[PIECE], state[LEFT] = state[PIECE] + 1, limit
                part = min(length, state[LEFT] // each)
                made = state[SEGMENTS]
                if made < len(segment_table):
                    grows = alone and step == 0 and position + part == end
                    segment_table[made, 0], segment_table[made, 1], segment_table[made, 2] = slot, part, position
                    segment_table[made, 3], segment_table[made, 4], segment_table[made, 5] = low, high, grows
                    segment_table[made, 6] = nodes[node, ROOM] if grows else 0
                state[SEGMENTS] += 1
                state[KEYS] += part
                state[MIXED_KEYS] += part if short else 0
                state[LEFT] -= part * each
                slot, position, length = slot + part, position + part, length - part


@compiled
def _close(state: Ints, units: Ints, unit: int, unit_table: Ints) -> None:
    """End the unit, or the piece of it, whose segments were read last."""
    made = state[UNITS]
    if made < len(unit_table):
        unit_table[made, 0], unit_table[made, 1] = units[unit, 0], units[unit, 1]
        unit_table[made, 2], unit_table[made, 3] = state[BEGUN], state[SEGMENTS]
        unit_table[made, 4], unit_table[made, 5] = units[unit, 6], state[PIECE]
        unit_table[made, 6], unit_table[made, 7] = state[KEYS], state[MIXED_KEYS]
    state[UNITS] += 1
    state[BEGUN] = state[SEGMENTS]
    state[KEYS] = state[MIXED_KEYS] = 0
