"""The active nodes of a step, extracted from the tree's columns, and the walk over them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import RadixTree
from radixgen.core.compiled import compiled
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.scheduler.tables import (
    E_KEYS,
    E_POSITION,
    E_SLOT,
    FIRST_EXTENT,
    LENGTH,
    PARENT,
    ROOM,
    STOP_EXTENT,
    W_DEPTH,
    W_FIRST_ROW,
    W_MERGED,
    W_OWN_ROWS,
    W_PARENT,
    W_ROWS,
    W_SIZE,
)


@dataclass(frozen=True, slots=True)
class Forest:
    """The active nodes of a step, parents before children, and the extents of their keys. Arrays are `[nodes]`."""

    parents: Int32Array
    """-1 for a root."""
    starts: Int32Array
    """Position of the node's first token."""
    lengths: Int32Array
    """Keys in the node."""
    extent_offsets: Int64Array
    """`[nodes + 1]`: node `i` holds extents `[extent_offsets[i], extent_offsets[i + 1])`."""
    extent_starts: Int64Array
    """`[extents]`"""
    extent_lengths: Int32Array
    """`[extents]`, summing to the node's length."""
    rooms: Int32Array | None = None
    """Slots after the node's last extent into which it can grow; -1 if the node must not. Default: none."""
    extent_positions: Int32Array | None = None
    """`[extents]`: position of the first key. Default: the keys of a node are consecutive."""

    @property
    def positions(self) -> Int32Array:
        """`extent_positions`, with its default."""
        if self.extent_positions is not None:
            return self.extent_positions
        ends = np.cumsum(self.extent_lengths, dtype=np.int64)
        before = np.append(0, ends)[self.extent_offsets]
        owner = np.repeat(np.arange(self.parents.size), np.diff(self.extent_offsets))
        positions: Int32Array = (ends - self.extent_lengths - before[owner] + self.starts[owner]).astype(np.int32)
        return positions


class Paths(NamedTuple):
    """The paths of the rows: a forest under one common root, so that rows of several trees are siblings, and its
    depth-first walk as returned by `preorder`.
    """

    nodes: Int64Array
    """`[nodes, 5]`: the columns `PARENT` to `ROOM`."""
    extents: Int64Array
    """`[extents, 3]`: the columns `E_SLOT` to `E_POSITION`."""
    lowest: Int64Array
    walk: Int64Array
    keys: Int64Array
    order: Int64Array
    positions: Int64Array
    """`[rows]`, in the walk's order."""

    @property
    def num_keys(self) -> int:
        """Number of distinct keys."""
        return int(self.keys[:, 0].sum())


def active_forest(
    tree: RadixTree, node_ids: Int32Array, row_positions: Int32Array
) -> tuple[Forest, Int32Array, Int64Array]:
    """Return the nodes on the paths of `node_ids`, renumbered with parents first; each row's new node number; all node
    ids.

    A node's keys are its scheduled ones plus those up to the last position of its rows (`row_positions`). The extra
    ones are in its reserve, or in the adjacent slots of its only child.
    """
    columns = tree.columns
    ids, rows = _climb(node_ids, columns.parent, columns.place)
    parents, starts, lengths, rooms, offsets, slots, counts = _read(
        ids, rows, row_positions, columns.parent, columns.start, columns.scheduled, columns.reserved,
        columns.following, columns.num_extents, columns.first_slot, columns.first_extent, columns.extents,
        columns.place,
    )  # fmt: skip
    return Forest(parents, starts, lengths, offsets, slots, counts, rooms), rows, ids


@compiled
def _climb(node_ids: Int32Array, parent: Int32Array, place: Int64Array) -> tuple[Int64Array, Int32Array]:
    """Return the nodes at or above `node_ids`, parents first, and the index of each of `node_ids` among them.

    On return, `place[id]` is the index of each active node and -1 otherwise.
    """
    ids = np.empty(2 * node_ids.size + 64, np.int64)
    count = 0
    rows = np.empty(node_ids.size, np.int32)
    for row in range(node_ids.size):
        node, begin = node_ids[row], count
        while node >= 0 and place[node] < 0:
            if count == ids.size:
                ids = np.concatenate((ids, np.empty_like(ids)))
            ids[count] = node
            place[node] = 0
            count += 1
            node = parent[node]
        ids[begin:count] = ids[begin:count][::-1].copy()
        for at in range(begin, count):
            place[ids[at]] = at
        rows[row] = place[node_ids[row]]
    return ids[:count], rows


@compiled
def _read(
    ids: Int64Array, rows: Int32Array, positions: Int32Array, parent: Int32Array, start: Int32Array,
    scheduled: Int32Array, reserved: Int32Array, following: Int32Array, num_extents: Int32Array,
    first_slot: Int64Array, first_extent: Int64Array, extents: Int64Array, place: Int64Array,
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, Int64Array, Int64Array, Int32Array]:  # fmt: skip
    """Return the columns of `ids` as in `Forest`, and the extents of their keys, without reserved slots. Resets
    `place`.
    """
    size = ids.size
    parents, starts, lengths, rooms = np.empty((4, size), np.int32)
    offsets = np.empty(size + 1, np.int64)
    most = 0
    for at in range(size):
        most += num_extents[ids[at]]
        lengths[at] = scheduled[ids[at]]
    for row in range(rows.size):
        at = rows[row]
        lengths[at] = max(lengths[at], positions[row] + 1 - start[ids[at]])
    slots, counts = np.empty(most, np.int64), np.empty(most, np.int32)
    offsets[0] = made = 0
    for at in range(size):
        node = ids[at]
        above, left = parent[node], lengths[at]
        parents[at] = place[above] if above >= 0 else -1
        starts[at] = start[node]
        rooms[at] = reserved[node] + following[node] + scheduled[node] - left
        if num_extents[node] == 1 and left:
            slots[made], counts[made] = first_slot[node], left
            made += 1
        elif left:
            extent, last = first_extent[node], first_extent[node] + num_extents[node] - 1
            while left > 0:
                slots[made], counts[made] = extents[extent, 0], left
                if extent < last:
                    counts[made] = min(extents[extent, 1], left)
                left -= counts[made]
                extent += 1
                made += 1
        offsets[at + 1] = made
    for at in range(size):
        place[ids[at]] = -1
    return parents, starts, lengths, rooms, offsets, slots[:made], counts[:made]


def walk_paths(forest: Forest, row_nodes: Int32Array, row_positions: Int32Array, least_run: int = 0) -> Paths:
    """Return the paths of rows at `row_positions` `[rows]` in the nodes `row_nodes` `[rows]` of `forest`.

    Keys in extents of fewer than `least_run` are counted as short.
    """
    rooms = np.zeros_like(forest.parents) if forest.rooms is None else forest.rooms
    nodes, extents, short = _tables(
        _narrow(forest.parents), _narrow(forest.lengths), _narrow(rooms),
        forest.extent_offsets.astype(np.int64, copy=False), forest.extent_starts.astype(np.int64, copy=False),
        _narrow(forest.extent_lengths), _narrow(forest.positions), least_run,
    )  # fmt: skip
    return Paths(nodes, extents, *preorder(nodes, short, _narrow(row_nodes), _narrow(row_positions)))


def _narrow(values: NDArray[np.integer]) -> Int32Array:
    return values.astype(np.int32, copy=False)


@compiled
def _tables(
    parents: Int32Array, lengths: Int32Array, rooms: Int32Array, offsets: Int64Array, extent_starts: Int64Array,
    extent_lengths: Int32Array, extent_positions: Int32Array, least_run: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:  # fmt: skip
    """Return `Paths.nodes` and `Paths.extents` of a forest, and the number of keys in short extents of each node."""
    nodes = np.zeros((parents.size + 1, 5), np.int64)
    nodes[0, PARENT] = -1
    extents = np.empty((extent_starts.size, 3), np.int64)
    short = np.zeros(parents.size + 1, np.int64)
    for extent in range(extent_starts.size):
        extents[extent, E_SLOT], extents[extent, E_KEYS] = extent_starts[extent], extent_lengths[extent]
        extents[extent, E_POSITION] = extent_positions[extent]
    for at in range(parents.size):
        node = at + 1
        nodes[node, PARENT] = parents[at] + 1
        nodes[node, LENGTH], nodes[node, ROOM] = lengths[at], rooms[at]
        nodes[node, FIRST_EXTENT], nodes[node, STOP_EXTENT] = offsets[at], offsets[at + 1]
        for extent in range(offsets[at], offsets[at + 1]):
            if extent_lengths[extent] < least_run:
                short[node] += extent_lengths[extent]
    return nodes, extents, short


@compiled
def preorder(
    nodes: Int64Array, short: Int64Array, row_nodes: Int32Array, row_positions: Int32Array
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array, Int64Array]:
    """Walk the nodes at or below which there are rows, depth first.

    nodes `[nodes, 5]` as in `Paths`, parents before children. Node 0 is the only root, and `row_nodes` counts from the
    node after it. A node with one child and no rows of its own is merged into the child. Rows of a node without keys
    belong to the nearest node above with keys.

    Returns `lowest [n]`: the node of each place, the lowest if several are merged; `walk [n, 7]`: the columns
    `W_PARENT` to `W_MERGED`; `keys [n, 2]`: the keys of the merged nodes, and those counted by `short` [nodes];
    `order [rows]`: the row at each place, those of one node by position; `positions [rows]`, in that order.
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
        walk[at, W_PARENT] = place[parent] if parent >= 0 else -1
        walk[at, W_DEPTH] = walk[walk[at, W_PARENT], W_DEPTH] + 1 if parent >= 0 else 0
        walk[at, W_SIZE], walk[at, W_ROWS], walk[at, W_OWN_ROWS] = size[node], below[node], own[node]
        walk[at, W_FIRST_ROW], walk[at, W_MERGED] = next_row[parent], stands_for[node]
        next_place[parent] += size[node]
        next_row[parent] += below[node]
        next_place[node] = at + 1
        next_row[node] = walk[at, W_FIRST_ROW] + own[node]
    order, positions = order_rows(row_nodes, row_positions, home, place, walk)
    return lowest, walk, walk_keys, order, positions


@compiled
def order_rows(
    row_nodes: Int32Array, row_positions: Int32Array, home: Int64Array, place: Int64Array, walk: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Sort rows by node, then by position. Returns the order and the sorted positions."""
    order, positions = np.empty((2, row_nodes.size), np.int64)
    taken = np.zeros(walk.shape[0], np.int64)
    for row in range(row_nodes.size):
        at = place[home[row_nodes[row] + 1]]
        order[walk[at, W_FIRST_ROW] + taken[at]] = row
        taken[at] += 1
    for at in range(walk.shape[0]):
        first, own = walk[at, W_FIRST_ROW], walk[at, W_OWN_ROWS]
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
