"""Thins paths: tokens that no later row reads give up their slots, and stay in the tree.

A node that lacks slots can be read, but not continued: what follows it would have to be computed from keys that are
gone. So only paths in a namespace of their own are thinned, and a thinned node is removed with its only child.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.node import Node
from radixgen.cache.pool import Extent

if TYPE_CHECKING:
    from radixgen.cache.tree import RadixTree


def thin(tree: "RadixTree", node: Node, position: int, ranges: NDArray[np.int64]) -> None:
    """Release the slots of the tokens on the path to `node` that are before `position`, and outside `ranges` `[n, 2]`,
    which are half-open, ascending and disjoint.

    The path is that of all cursors in its namespace, which are on `node` or below. Its computed tokens before
    `position`, if they are not nodes of their own, move into one.
    """
    head = position - node.start
    if 0 < head < node.computed:
        tree.split(node, head)
    above = node.parent
    while above is not None and above.parent is not None:
        _thin_node(tree, above, ranges)
        above = above.parent


def _thin_node(tree: "RadixTree", node: Node, ranges: NDArray[np.int64]) -> None:
    positions, slots = node.key_slots()
    before = np.searchsorted(ranges[:, 0], positions, side="right") - 1
    kept = (before >= 0) & (positions < ranges[before, 1])
    if kept.all() and node.extent_positions is not None:
        return
    for _, extent in _runs(positions[~kept], slots[~kept]):
        tree.pool.release(extent)
    runs = _runs(positions[kept], slots[kept])
    node.extent_positions, node.extents = [position for position, _ in runs], [extent for _, extent in runs]
    tree.columns.write(node)
    tree._changed(node)


def _runs(positions: NDArray[np.int64], slots: NDArray[np.int64]) -> list[tuple[int, Extent]]:
    """Return maximal runs of tokens with consecutive positions and slots: first position and extent of each."""
    if not slots.size:
        return []
    begins = np.flatnonzero(np.append(True, (np.diff(positions) != 1) | (np.diff(slots) != 1)))
    lengths = np.diff(np.append(begins, slots.size))
    columns = positions[begins].tolist(), slots[begins].tolist(), lengths.tolist()
    return [(position, Extent(slot, length)) for position, slot, length in zip(*columns, strict=True)]
