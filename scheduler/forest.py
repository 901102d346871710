"""The active nodes of a step, extracted from the tree's columns, and the walk over them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import RadixTree
from radixgen.core.compiled import compiled
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.scheduler.partition import Paths, preorder
from radixgen.scheduler.tables import (
    FIRST_EXTENT,
    LENGTH,
    PARENT,
    ROOM,
    START,
    STOP_EXTENT,
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
    """Slots after the node's last extent into which it can grow. Default: none."""


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
        _narrow(forest.parents), _narrow(forest.starts), _narrow(forest.lengths), _narrow(rooms),
        forest.extent_offsets.astype(np.int64, copy=False), forest.extent_starts.astype(np.int64, copy=False),
        _narrow(forest.extent_lengths), least_run,
    )  # fmt: skip
    return Paths(nodes, extents, *preorder(nodes, short, _narrow(row_nodes), _narrow(row_positions)))


def _narrow(values: NDArray[np.integer]) -> Int32Array:
    return values.astype(np.int32, copy=False)


@compiled
def _tables(
    parents: Int32Array, starts: Int32Array, lengths: Int32Array, rooms: Int32Array, offsets: Int64Array,
    extent_starts: Int64Array, extent_lengths: Int32Array, least_run: int,
) -> tuple[Int64Array, Int64Array, Int64Array]:  # fmt: skip
    """Return `Paths.nodes` and `Paths.extents` of a forest, and the number of keys in short extents of each node."""
    nodes = np.zeros((parents.size + 1, 6), np.int64)
    nodes[0, PARENT] = -1
    extents = np.empty((extent_starts.size, 2), np.int64)
    short = np.zeros(parents.size + 1, np.int64)
    for extent in range(extent_starts.size):
        extents[extent, 0], extents[extent, 1] = extent_starts[extent], extent_lengths[extent]
    for at in range(parents.size):
        node = at + 1
        nodes[node, PARENT] = parents[at] + 1
        nodes[node, START], nodes[node, LENGTH], nodes[node, ROOM] = starts[at], lengths[at], rooms[at]
        nodes[node, FIRST_EXTENT], nodes[node, STOP_EXTENT] = offsets[at], offsets[at + 1]
        for extent in range(offsets[at], offsets[at + 1]):
            if extent_lengths[extent] < least_run:
                short[node] += extent_lengths[extent]
    return nodes, extents, short
