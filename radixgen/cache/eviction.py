"""Priority queue of evictable nodes, in a policy's order."""

import heapq

from radixgen.cache.node import Node
from radixgen.cache.policy import EvictionPolicy

_FEW_ENTRIES = 64


class EvictionQueue:
    """A heap of nodes, keyed by the policy at the time each was added.

    Removed nodes leave stale entries, which are skipped, and dropped together once they are the majority.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[tuple[float, ...], int, Node]] = []
        self._entry_of: dict[Node, int] = {}
        self._num_entries = 0

    def __contains__(self, node: Node) -> bool:
        return node in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def add(self, node: Node) -> None:
        """Add a node, or move it to the position of its current key."""
        self._num_entries += 1
        self._entry_of[node] = self._num_entries
        heapq.heappush(self._heap, (self._policy(node), self._num_entries, node))
        if len(self._heap) > 2 * len(self._entry_of) + _FEW_ENTRIES:
            self._heap = [item for item in self._heap if self._entry_of.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def refresh(self, node: Node) -> None:
        """Move a node to the position of its current key if it is present."""
        if node in self._entry_of:
            self.add(node)

    def remove(self, node: Node) -> None:
        """Remove a node if it is present."""
        self._entry_of.pop(node, None)

    def up_to_date(self, node: Node) -> bool:
        """Return whether a node that is present stands at the position of its current key. Costs O(entries)."""
        return (self._policy(node), self._entry_of[node], node) in self._heap

    def first(self) -> Node | None:
        """Return the next node to evict without removing it."""
        while self._heap:
            _, entry, node = self._heap[0]
            if self._entry_of.get(node) == entry:
                return node
            heapq.heappop(self._heap)
        return None
