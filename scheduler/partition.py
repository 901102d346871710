"""Cheapest partition of the paths of a tree into units, by dynamic programming.

Nodes are in preorder, so that a subtree is one range of nodes and one range of rows. Going down a path, a node is
either *cut*: a unit reads its keys, and those of the pending nodes above it, for all rows at or below it; or *folded*:
it becomes pending too, and every unit below reads it. At the bottom, a *run* of consecutive siblings' whole subtrees
(with the parent's own rows as the first of them) may share one tile, with a mask.

`best[v, j]` is the minimum cost of everything at or below `v` with `j` nodes pending above it. A node's children form a
sequence that is divided into runs and single children. The end of the best run is a minimum over a sliding window, so
that a node costs its number of children times the number of tile classes, for each `j`.
"""

import numpy as np

from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Float64Array, Int64Array
from radixgen.scheduler.tables import (
    U_FIRST_NODE,
    U_FIRST_ROW,
    U_LOWEST,
    U_PENDING,
    U_STOP_NODE,
    U_STOP_ROW,
    W_DEPTH,
    W_FIRST_ROW,
    W_OWN_ROWS,
    W_PARENT,
    W_ROWS,
    W_SIZE,
)

FOLDED, CUT, MIXED = 0, 1, 2

MAX_STATES = 16_000
"""Maximum entries of `best`: bounds the pending nodes, and with them the time, in deep trees."""


@inlined
def tile_cost(rows: int, keys: int, short: int, tile_rows: Int64Array, prices: Float64Array) -> tuple[float, int]:
    """Return the minimum cost of `rows` rows against `keys` keys, `short` of them charged as mixed, and the rows of a
    full tile.
    """
    least, chosen = np.inf, 0
    for kind in range(tile_rows.size):
        tile = prices[0, kind] + (keys - short) * prices[1, kind] + short * prices[2, kind]
        if rows <= tile_rows[kind]:
            if tile < least:
                least, chosen = tile, tile_rows[kind]
            continue
        full, rest = rows // tile_rows[kind], rows % tile_rows[kind]
        cost = full * tile
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
    walk: Int64Array,
    keys: Int64Array,
    mix: bool,
    tile_rows: Int64Array,
    prices: Float64Array,
    partial: float,
    most_pending: int,
) -> tuple[Float64Array, Int64Array, Int64Array]:
    """Compute the table of minimum costs and the choices that lead to them.

    walk and keys as returned by `preorder`; tile_rows `[classes]` and prices `[3, classes]` as `CostModel.columns`;
    partial: per row, over all of its heads; most_pending: maximum number of consecutive folded nodes.

    Returns `best [n, most_pending + 1]`, inf for impossible states; `cuts`, the same shape: 1 if the node is cut;
    `runs[node, pending, kind]` `[n, most_pending + 1, 2]`: end index of the run that starts at the node's subtree
    (kind 0) or at its own rows (kind 1), given `pending` folded ancestors; -1 if none.
    """
    count = walk.shape[0]
    best = np.full((count, most_pending + 1), np.inf)
    cuts = np.zeros((count, most_pending + 1), np.int64)
    runs = np.full((count, most_pending + 1, 2), -1, np.int64)
    tokens, folded = _tokens_below(walk, keys), np.empty(most_pending + 2)
    alone, least, ends, rows, below_keys, queue, marks = _scratch(count, tile_rows.size)
    for node in range(count - 1, -1, -1):
        parent, depth = walk[node, W_PARENT], walk[node, W_DEPTH]
        own, below = walk[node, W_OWN_ROWS], walk[node, W_ROWS]
        if walk[node, W_SIZE] == 1:
            pending, short, above = keys[node, 0], keys[node, 1], parent
            for j in range(min(depth, most_pending) + 1):
                price = 0.0 if j == depth else partial
                best[node, j] = tile_cost(own, pending, short, tile_rows, prices)[0] + own * price
                cuts[node, j] = j == most_pending
                pending, short = pending + keys[above, 0], short + keys[above, 1]
                above = walk[above, W_PARENT]
            continue
        pending = short = 0
        above = node
        for j in range(min(depth + 1, most_pending) + 1):
            if j:
                pending, short = pending + keys[above, 0], short + keys[above, 1]
                above = walk[above, W_PARENT]
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
                above = walk[above, W_PARENT]
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
def partition_uncut(
    walk: Int64Array, keys: Int64Array, mix: bool, tile_rows: Int64Array, prices: Float64Array
) -> tuple[Float64Array, Int64Array, Int64Array]:
    """As `partition` if no node is cut, so that each row's whole path is pending. The results have one column."""
    count = walk.shape[0]
    best, cuts, runs = np.empty((count, 1)), np.zeros((count, 1), np.int64), np.full((count, 1, 2), -1, np.int64)
    tokens, path = _tokens_below(walk, keys), keys.copy()
    for node in range(1, count):
        path[node, 0] += path[walk[node, W_PARENT], 0]
        path[node, 1] += path[walk[node, W_PARENT], 1]
    alone, least, ends, rows, below_keys, queue, marks = _scratch(count, tile_rows.size)
    for node in range(count - 1, -1, -1):
        if walk[node, W_SIZE] == 1:
            best[node, 0] = tile_cost(walk[node, W_OWN_ROWS], path[node, 0], path[node, 1], tile_rows, prices)[0]
            continue
        best[node, 0] = _sequence(
            node, 1, 0, path[node, 0], path[node, 1], 0.0, walk, tokens, best, runs, mix, tile_rows, prices, alone,
            ends, rows, below_keys, least, queue, marks,
        )  # fmt: skip
    return best, cuts, runs


@compiled
def unmixed_total(
    walk: Int64Array, keys: Int64Array, cuts: Int64Array, tile_rows: Int64Array, prices: Float64Array
) -> float:
    """Return the cost of all units without partial results, if the nodes marked in `cuts` `[n, 1]` are cut and all
    others folded, and no node's rows share a tile with other nodes' rows.
    """
    total, above = 0.0, np.zeros((len(walk), 2), np.int64)
    for node in range(len(walk)):
        parent = max(walk[node, W_PARENT], 0)
        read, short = above[parent, 0] + keys[node, 0], above[parent, 1] + keys[node, 1]
        rows = walk[node, W_ROWS] if cuts[node, 0] else walk[node, W_OWN_ROWS]
        if rows:
            total += tile_cost(rows, read, short, tile_rows, prices)[0]
        above[node, 0], above[node, 1] = (0, 0) if cuts[node, 0] else (read, short)
    return total


@inlined
def _tokens_below(walk: Int64Array, keys: Int64Array) -> Int64Array:
    """Return the number of keys at or below each node."""
    tokens = keys[:, 0].copy()
    for node in range(len(walk) - 1, 0, -1):
        tokens[walk[node, W_PARENT]] += tokens[node]
    return tokens


@inlined
def _scratch(
    count: int, kinds: int
) -> tuple[Float64Array, Float64Array, Int64Array, Int64Array, Int64Array, Int64Array, Int64Array]:
    """Allocate the arrays of `_sequence` for up to `count` children: alone, least, ends, rows, keys, queue, marks."""
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
    walk: Int64Array,
    tokens: Int64Array,
    best: Float64Array,
    runs: Int64Array,
    mix: bool,
    tile_rows: Int64Array,
    prices: Float64Array,
    alone: Float64Array,
    ends: Int64Array,
    rows: Int64Array,
    keys: Int64Array,
    least: Float64Array,
    queue: Int64Array,
    marks: Int64Array,
) -> float:
    """Return the minimum cost of `node`'s own rows (unless j is 0, for a node that is cut) and of its children.

    `j` is the number of folded ancestors. `pending` is their total number of keys, `short` the part in short extents,
    `column` their index in `best` and `runs`. Writes the ends of runs.
    """
    count = 0
    rows[0] = keys[0] = 0
    if j and walk[node, W_OWN_ROWS]:
        cost = tile_cost(walk[node, W_OWN_ROWS], pending, short, tile_rows, prices)[0]
        alone[0], ends[0] = cost + walk[node, W_OWN_ROWS] * price, node + 1
        rows[1], keys[1] = walk[node, W_OWN_ROWS], 0
        count = 1
    child = node + 1
    while child < node + walk[node, W_SIZE]:
        alone[count], ends[count] = best[child, column], child + walk[child, W_SIZE]
        rows[count + 1], keys[count + 1] = rows[count] + walk[child, W_ROWS], keys[count] + tokens[child]
        count += 1
        child += walk[child, W_SIZE]
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
        if i == 0 and j and walk[node, W_OWN_ROWS]:
            runs[node, column, 1] = end
        else:
            runs[first, column, 0] = end
    total: float = least[0]
    return total


@compiled
def collect(
    walk: Int64Array, keys: Int64Array, cuts: Int64Array, runs: Int64Array, tile_rows: Int64Array, prices: Float64Array
) -> tuple[Int64Array, Int64Array]:
    """Return the units of the partition, ancestors first, `[units, 9]`: the columns `U_FIRST_ROW` to `U_MIXED`.

    A `cuts` of one column applies to any number of pending nodes. Also returns for each node `[n]` whether it is CUT.
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
        if walk[node, W_PARENT] < 0:
            pending[node] = 0
        j = pending[node]
        if j < 0:
            node += 1
            continue
        first, own = walk[node, W_FIRST_ROW], walk[node, W_OWN_ROWS]
        end, depth = node + walk[node, W_SIZE], walk[node, W_DEPTH]
        read, short = above[node, 0] + keys[node, 0], above[node, 1] + keys[node, 1]
        child, below = node + 1, 0
        if cuts[node, min(j, columns - 1)]:
            fates[node] = CUT
            tile = tile_cost(walk[node, W_ROWS], read, short, tile_rows, prices)[1]
            unit = first, first + walk[node, W_ROWS], walk[node, W_PARENT], j, node, child, depth, read, short
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
                child += walk[child, W_SIZE]
                continue
            first = walk[child, W_FIRST_ROW]
            inner, last = before[stop] - before[child], _end_of_rows(child, stop, first, walk)
            unit = first, last, node, below, child, stop, depth + 1, read + inner, short + inner
            units, made = _add(units, made, last - first, unit)
            child = stop
        node += 1
    return units[:made], fates


@inlined
def _end_of_rows(node: int, end: int, row: int, walk: Int64Array) -> int:
    """Return the row after those of all subtrees from `node` to `end`, the first of which is at `row`."""
    while node < end:
        row = walk[node, W_FIRST_ROW] + walk[node, W_ROWS]
        node += walk[node, W_SIZE]
    return row


@inlined
def _add(units: Int64Array, made: int, tile: int, unit: tuple[int, ...]) -> tuple[Int64Array, int]:
    """Add a unit, in tiles of at most `tile` rows."""
    first, stop = unit[U_FIRST_ROW], unit[U_STOP_ROW]
    while first < stop:
        if made == len(units):
            units = np.concatenate((units, np.empty_like(units)))
        for column, value in enumerate(unit):
            units[made, column] = value
        units[made, U_FIRST_ROW], units[made, U_STOP_ROW] = first, min(first + tile, stop)
        made += 1
        first += tile
    return units, made


@compiled
def readers(units: Int64Array, walk: Int64Array, fates: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the number of units that read each node, `[n]`, and its fate, `[n]`: FOLDED, CUT or MIXED.

    `fates`: which nodes are CUT.
    """
    counts, fates = np.zeros(len(walk), np.int64), fates.copy()
    for unit in range(units.shape[0]):
        node = units[unit, U_LOWEST]
        for _ in range(units[unit, U_PENDING]):
            counts[node] += 1
            node = walk[node, W_PARENT]
        for own in range(units[unit, U_FIRST_NODE], units[unit, U_STOP_NODE]):
            counts[own] += 1
            if fates[own] != CUT:
                fates[own] = MIXED
    return counts, fates
