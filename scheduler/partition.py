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

from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Int32Array

FOLDED, CUT, MIXED = 0, 1, 2

MAX_STATES = 16_000
"""Of `best`: bounds the pending nodes, and with them the time, where a tree is deep."""

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
    nodes: Ints, short: Ints, row_nodes: Int32Array, row_positions: Int32Array
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """The depth-first walk over the nodes at or below which rows stand.

    nodes `[nodes, 6]` as in `Paths`, parents before their children; node 0 is the only root, and `row_nodes` counts
    from the one behind it. A node without rows of its own and with one child is counted as part of that child. Rows of
    a node without keys count for the nearest node above that has some.

    Returns `lowest [n]`: the node at each place, the lowest where several are counted as one; `walk [n, 7]`: its
    parent's place (-1 at the root), depth, places and rows at or below it, own rows, first row, and how many nodes it
    stands for; `keys [n, 2]`: the keys of these, and how many of them `short` [nodes] counts; `order [rows]`: which row
    comes at each place, those of one node by position; `positions [rows]`, in that order.
    """
    count = len(nodes)
    home, own = np.zeros((2, count), np.int64)
    parents, lengths = nodes[:, PARENT].copy(), nodes[:, LENGTH].copy()
    for node in range(1, count):
        home[node] = node if lengths[node] > 0 else home[parents[node]]
    for row in range(row_nodes.size):
        own[home[row_nodes[row] + 1]] += 1
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
    order, positions = order_rows(row_nodes, row_positions, home, place, walk)
    return lowest, walk, walk_keys, order, positions


@compiled
def order_rows(
    row_nodes: Int32Array, row_positions: Int32Array, home: Ints, place: Ints, walk: Ints
) -> tuple[Ints, Ints]:
    """Rows by node, those of one node by position, and their positions."""
    order, positions = np.empty((2, row_nodes.size), np.int64)
    taken = np.zeros(walk.shape[0], np.int64)
    for row in range(row_nodes.size):
        at = place[home[row_nodes[row] + 1]]
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
    for at in range(order.size):
        positions[at] = row_positions[order[at]]
    return order, positions


@inlined
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
    mix: bool,
    tile_rows: Ints,
    prices: Floats,
    partial: float,
    most_pending: int,
) -> tuple[Floats, Ints, Ints]:
    """The table of least costs, and how they come about.

    walk and keys as `preorder` gives them; tile_rows `[classes]` and prices `[3, classes]` as `CostModel.columns`;
    partial: of one row, all of its heads; most_pending: nodes folded one below the other.

    Returns `best [n, most_pending + 1]`, inf where a state can't be; `cuts`, the same shape: 1 where the node is cut;
    `runs [n, most_pending + 1, 2]`: with so many nodes pending below the parent, the place behind the run that begins
    with this node's subtree (0), and with this node's own rows (1); -1 for no run.
    """
    count = walk.shape[0]
    best = np.full((count, most_pending + 1), np.inf)
    cuts = np.zeros((count, most_pending + 1), np.int64)
    runs = np.full((count, most_pending + 1, 2), -1, np.int64)
    tokens, folded = _tokens_below(walk, keys), np.empty(most_pending + 2)
    alone, least, ends, rows, below_keys, queue, marks = _scratch(count, tile_rows.size)
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
                node, j, j, pending, short, price, walk, tokens, best, runs, mix, tile_rows, prices, alone, ends, rows,
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
            if read > 0:
                pieces = below - own if j == depth else below
                cut = tile_cost(below, read, short_read, tile_rows, prices)[0] + pieces * partial + folded[0]
            elif fold == np.inf:
                fold = folded[min(j + 1, most_pending)]
            cuts[node, j] = 1 if cut < fold else 0
            best[node, j] = min(cut, fold)
    return best, cuts, runs


@compiled
def partition_uncut(walk: Ints, keys: Ints, mix: bool, tile_rows: Ints, prices: Floats) -> tuple[Floats, Ints, Ints]:
    """As `partition` where no node is cut, so that each row's whole path is pending: one column."""
    count = walk.shape[0]
    best, cuts, runs = np.empty((count, 1)), np.zeros((count, 1), np.int64), np.full((count, 1, 2), -1, np.int64)
    tokens, path = _tokens_below(walk, keys), keys.copy()
    for node in range(1, count):
        path[node, 0] += path[walk[node, 0], 0]
        path[node, 1] += path[walk[node, 0], 1]
    alone, least, ends, rows, below_keys, queue, marks = _scratch(count, tile_rows.size)
    for node in range(count - 1, -1, -1):
        if walk[node, 2] == 1:
            best[node, 0] = tile_cost(walk[node, 4], path[node, 0], path[node, 1], tile_rows, prices)[0]
            continue
        best[node, 0] = _sequence(
            node, 1, 0, path[node, 0], path[node, 1], 0.0, walk, tokens, best, runs, mix, tile_rows, prices, alone,
            ends, rows, below_keys, least, queue, marks,
        )  # fmt: skip
    return best, cuts, runs


@compiled
def unmixed_total(walk: Ints, keys: Ints, cuts: Ints, tile_rows: Ints, prices: Floats) -> float:
    """What the units cost, but for partial results, where the nodes that `cuts` `[n, 1]` says are cut and all others
    folded, each node's own rows apart.
    """
    total, above = 0.0, np.zeros((len(walk), 2), np.int64)
    for node in range(len(walk)):
        parent = max(walk[node, 0], 0)
        read, short = above[parent, 0] + keys[node, 0], above[parent, 1] + keys[node, 1]
        rows = walk[node, 3] if cuts[node, 0] else walk[node, 4]
        if rows:
            total += tile_cost(rows, read, short, tile_rows, prices)[0]
        above[node, 0], above[node, 1] = (0, 0) if cuts[node, 0] else (read, short)
    return total


@inlined
def _tokens_below(walk: Ints, keys: Ints) -> Ints:
    """Keys at or below each node."""
    tokens = keys[:, 0].copy()
    for node in range(len(walk) - 1, 0, -1):
        tokens[walk[node, 0]] += tokens[node]
    return tokens


@inlined
def _scratch(count: int, kinds: int) -> tuple[Floats, Floats, Ints, Ints, Ints, Ints, Ints]:
    """Room for `_sequence` over up to `count` children: alone, least, ends, rows, keys, queue, marks."""
    floats, ints = np.empty((2, count + 2)), np.empty((3, count + 2), np.int64)
    queue, marks = np.empty((kinds, count + 2), np.int64), np.empty((2, kinds), np.int64)
    return floats[0], floats[1], ints[0], ints[1], ints[2], queue, marks


@inlined
def _sequence(
    node: int,
    j: int,
    column: int,
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
    `pending` keys, `short` of them in short extents, above them; of that tells `column` of `best` and `runs`. Writes
    where runs end.
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
        alone[count], ends[count] = best[child, column], child + walk[child, 2]
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
            runs[node, column, 1] = end
        else:
            runs[first, column, 0] = end
    total: float = least[0]
    return total


@compiled
def collect(walk: Ints, keys: Ints, cuts: Ints, runs: Ints, tile_rows: Ints, prices: Floats) -> tuple[Ints, Ints]:
    """The units of the partition, ancestors first: `[units, 9]`. A `cuts` of one column holds
    however many nodes are pending.

    First row and the row behind the last; the lowest pending node and how many are pending; the first node of the
    unit's own and the one behind the last; its rank, ascending on every row's path; its keys, and how many of them are
    charged as mixed. And for each node `[n]` whether it is CUT.
    """
    count, columns = walk.shape[0], cuts.shape[1]
    most_pending = columns - 1 if columns > 1 else count
    fates, pending = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    above = np.zeros((count, 2), np.int64)
    before = np.zeros(count + 1, np.int64)
    for node in range(count):
        before[node + 1] = before[node] + keys[node, 0]
    units = np.empty((count + 64, 9), np.int64)
    made = node = 0
    while node < count:
        if walk[node, 0] < 0:
            pending[node] = 0
        j = pending[node]
        if j < 0:
            node += 1
            continue
        first, own, end, depth = walk[node, 5], walk[node, 4], node + walk[node, 2], walk[node, 1]
        read, short = above[node, 0] + keys[node, 0], above[node, 1] + keys[node, 1]
        child, below = node + 1, 0
        if cuts[node, min(j, columns - 1)]:
            fates[node] = CUT
            tile = tile_cost(walk[node, 3], read, short, tile_rows, prices)[1]
            unit = first, first + walk[node, 3], walk[node, 0], j, node, child, depth, read, short
            units, made = _add(units, made, tile, unit)
            read = short = 0
        else:
            below = min(j + 1, most_pending)
            stop = runs[node, min(below, columns - 1), 1]
            if own and stop < 0:
                tile = tile_cost(own, read, short, tile_rows, prices)[1]
                unit = first, first + own, node, below, child, child, depth + 1, read, short
                units, made = _add(units, made, tile, unit)
            elif own:
                inner, last = before[stop] - before[child], _end_of_rows(child, stop, first + own, walk)
                unit = first, last, node, below, child, stop, depth + 1, read + inner, short + inner
                units, made = _add(units, made, last - first, unit)
                child = stop
        while child < end:
            stop = runs[child, min(below, columns - 1), 0]
            if stop < 0:
                pending[child], above[child, 0], above[child, 1] = below, read, short
                child += walk[child, 2]
                continue
            first = walk[child, 5]
            inner, last = before[stop] - before[child], _end_of_rows(child, stop, first, walk)
            unit = first, last, node, below, child, stop, depth + 1, read + inner, short + inner
            units, made = _add(units, made, last - first, unit)
            child = stop
        node += 1
    return units[:made], fates


@inlined
def _end_of_rows(node: int, end: int, row: int, walk: Ints) -> int:
    """The row behind those of all subtrees from `node` to `end`, the first of them at `row`."""
    while node < end:
        row = walk[node, 5] + walk[node, 3]
        node += walk[node, 2]
    return row


@inlined
def _add(units: Ints, made: int, tile: int, unit: tuple[int, ...]) -> tuple[Ints, int]:
    """A unit, in tiles of at most `tile` rows."""
    first, stop = unit[0], unit[1]
    while first < stop:
        if made == len(units):
            units = np.concatenate((units, np.empty_like(units)))
        for column, value in enumerate(unit):
            units[made, column] = value
        units[made, 0], units[made, 1] = first, min(first + tile, stop)
        made += 1
        first += tile
    return units, made


@compiled
def readers(units: Ints, walk: Ints, fates: Ints) -> tuple[Ints, Ints]:
    """How many units read each node, `[n]`, and what became of it, `[n]`: FOLDED, CUT or MIXED; `fates` says which are
    cut.
    """
    counts, fates = np.zeros(len(walk), np.int64), fates.copy()
    for unit in range(units.shape[0]):
        node = units[unit, 2]
        for _ in range(units[unit, 3]):
            counts[node] += 1
            node = walk[node, 0]
        for own in range(units[unit, 4], units[unit, 5]):
            counts[own] += 1
            if fates[own] != CUT:
                fates[own] = MIXED
    return counts, fates
