"""What was evicted: the ends at which the tree went on, remembered for a while."""

from collections import OrderedDict

End = tuple[int | str, int]
"""A node's epoch and its end, or the root's namespace and 0."""


class Ghosts:
    """Evicted continuations, each an end of the tree and the first token that followed it there; of more than
    `capacity` the latest.
    """

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
