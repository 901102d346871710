"""Thins paths: tokens that no later row reads give up their slots, and stay in the tree.

Only the path of a sequence that shares nothing is thinned, because a node that lacks slots can be read, but neither
matched nor continued by others.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.node import Node
from radixgen.cache.pool import Extent
from radixgen.core.plan import consecutive_ranges

if TYPE_CHECKING:
    from radixgen.cache.tree import RadixTree


def thin(tree: "RadixTree", leaf: Node, ranges: NDArray[np.int64]) -> None:
    """Release the slots of the tokens above `leaf` that are at positions outside `ranges` `[n, 2]`, which are
    half-open, ascending and disjoint.

    The path has one cursor, on `leaf`. Its tokens before the last range move into a node of their own.
    """
    head = int(ranges[-1, 0]) - leaf.start
    if 0 < head < leaf.computed:
        tree.split(leaf, head)
    node = leaf.parent
    while node is not None and node.parent is not None:
        _thin_node(tree, node, ranges)
        node = node.parent


def _thin_node(tree: "RadixTree", node: Node, ranges: NDArray[np.int64]) -> None:
    positions, slots = node.key_slots()
    before = np.searchsorted(ranges[:, 0], positions, side="right") - 1
    kept = (before >= 0) & (positions < ranges[before, 1])
    if kept.all():
        return
    for _, extent in _extents(positions[~kept], slots[~kept]):
        tree.pool.release(extent)
    left = _extents(positions[kept], slots[kept])
    node.extent_positions, node.extents = [position for position, _ in left], [extent for _, extent in left]
    tree.columns.write(node)
    tree._changed(node)


def _extents(positions: NDArray[np.int64], slots: NDArray[np.int64]) -> list[tuple[int, Extent]]:
    """Return maximal extents of tokens with consecutive positions and slots, each with its first position."""
    ranges = consecutive_ranges(positions, slots).tolist()
    return [(int(positions[first]), Extent(int(slots[first]), stop - first)) for first, stop in ranges]
