"""Memory of recent evictions, to explain later why a prompt is not cached."""

from collections import OrderedDict

End = tuple[int | str, int]
"""The epoch of a node and its end position, or the namespace of a root and 0."""


class RecentEvictions:
    """The latest `capacity` evicted continuations: a position in the tree, and the first token that followed it."""

    def __init__(self, capacity: int = 65_536) -> None:
        self.capacity = capacity
        self._tokens: OrderedDict[tuple[End, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def __contains__(self, continuation: tuple[End, int]) -> bool:
        return continuation in self._tokens

    def add(self, end: End, token: int) -> None:
        self._tokens[end, token] = None
        self._tokens.move_to_end((end, token))
        if len(self._tokens) > self.capacity:
            self._tokens.popitem(last=False)
