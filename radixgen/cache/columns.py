"""The nodes of a tree as arrays indexed by node id, for the planner."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.node import Node


class Columns:
    """The nodes of a tree as arrays indexed by node id. Rows of removed ids are stale."""

    def __init__(self) -> None:
        self.parent = np.full(64, -1, np.int32)
        self.start = np.zeros(64, np.int32)
        self.scheduled = np.zeros(64, np.int32)
        """Scheduled tokens that have a slot."""
        self.reserved = np.zeros(64, np.int32)
        self.following = np.zeros(64, np.int32)
        """Of a node continued by an only child: approximate number of the child's tokens in the slots right after the
        node's last.
        """
        self.num_extents = np.zeros(64, np.int32)
        self.first_slot = np.zeros(64, np.int64)
        self.first_extent = np.zeros(64, np.int64)
        """Of a node with several extents: index of the first in `extents`."""
        self.extent_room = np.zeros(64, np.int32)
        """Number of extents reserved for the node in `extents`."""
        self.place = np.full(64, -1, np.int64)
        """Scratch for callers that renumber nodes; -1 outside such calls."""
        self.changed = np.zeros(64, np.int64)
        """Version of the tree at which plans that read the node last became invalid, other than by tokens appended to a
        leaf.
        """
        self.cut = np.zeros(64, np.int64)
        """Version of the tree at which tokens at the node's end were last removed."""
        self.extents = np.zeros((64, 2), np.int64)
        """Start and length of extents; those of one node are consecutive."""
        self.thinned: dict[int, NDArray[np.int64]] = {}
        """Of nodes that were thinned: position of each extent's first token."""
        self._num_extents = 0

    def fit(self, size: int) -> None:
        """Grow every column to hold ids below `size`."""
        if size > self.parent.size:
            for name, column in vars(self).items():
                if isinstance(column, np.ndarray) and column.ndim == 1:
                    setattr(self, name, np.concatenate([column, np.full_like(column, -1 if name == "place" else 0)]))

    def write(self, node: Node) -> None:
        """Copy all fields of the node, after any change of its extents."""
        row = node.id
        self.parent[row] = node.parent.id if node.parent else -1
        self.start[row] = node.start
        self.scheduled[row] = node.num_keys
        self.reserved[row] = node.reserved
        self.following[row] = 0
        self.thinned.pop(row, None)
        if node.extent_positions is not None:
            self.thinned[row] = np.array(node.extent_positions, np.int64)
        self.num_extents[row] = len(node.extents)
        if node.extents:
            self.first_slot[row] = node.extents[0].start
        if len(node.extents) > 1:
            place = self._extent_place(row, len(node.extents))
            self.extents[place : place + len(node.extents)] = node.extents

    def write_extents(self, nodes: Sequence[Node]) -> None:
        """Update the rows of nodes after their last extent grew or extents were added, with nothing else changed."""
        rows = [node.id for node in nodes]
        self.reserved[rows] = [node.reserved for node in nodes]
        self.num_extents[rows] = [len(node.extents) for node in nodes]
        self.first_slot[rows] = [node.extents[0].start for node in nodes]
        for node in nodes:
            count = len(node.extents)
            if count > 1:
                place = self._extent_place(node.id, count)
                self.extents[place : place + count] = node.extents

    def pass_up(self, node: Node, child: Node) -> None:
        """Update both rows after one token moved from the start of `child` to the end of `node`."""
        row, below, slot = node.id, child.id, child.extents[0].start
        self.scheduled[row] = node.scheduled
        self.following[row] = child.extents[0].length
        self.start[below] = child.start
        self.scheduled[below] = child.scheduled
        self.first_slot[below] = slot
        if len(node.extents) > 1:
            self.extents[self.first_extent[row] + len(node.extents) - 1] = node.extents[-1]
        if len(child.extents) > 1:
            self.extents[self.first_extent[below]] = child.extents[0]

    def _extent_place(self, row: int, count: int) -> int:
        """Return the index of the node's extents, moved to twice the room if `count` does not fit."""
        if count > self.extent_room[row]:
            stop = self._num_extents + 2 * count
            while stop > len(self.extents):
                self.extents = np.concatenate([self.extents, np.zeros_like(self.extents)])
            self.first_extent[row], self.extent_room[row] = self._num_extents, 2 * count
            self._num_extents = stop
        return int(self.first_extent[row])
