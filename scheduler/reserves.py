"""How many slots a sequence has in reserve, so that its leaf grows in place and its plan with it."""

from collections.abc import Sized

from radixgen.cache import Node, RadixTree

FIRST_RESERVE = 16
_LARGEST_RESERVE = 256


class Reserves:
    """The rule by which slots are reserved: `running` and `waiting` are who shares them, as they change."""

    def __init__(self, tree: RadixTree, running: Sized, waiting: Sized) -> None:
        self._tree, self._running, self._waiting = tree, running, waiting

    @property
    def share(self) -> int:
        """Slots that one sequence may keep in reserve: a fair share of what is free or could be evicted."""
        return (self._tree.pool.free + self._tree.evictable_tokens) // (2 * max(len(self._running), 1))

    def of_leaf(self, node: Node, step: int) -> int:
        """Slots to keep behind the token that a leaf computes in `step`, about as many as it knows: until a step at
        which others run out of room too, because a plan is made anew for a thousand of them as for one.

        While nobody waits, even a short leaf has many, as far as they are free: the kernels read its keys in a fraction
        of the time where they lie in one piece.
        """
        room = 0 if len(self._waiting) else self._tree.pool.free // (2 * max(len(self._running), 1))
        period = 1 << (min(max(FIRST_RESERVE, node.known, room), _LARGEST_RESERVE).bit_length() - 1)
        growth = period - 1 - step % period
        return min(self.share, growth if 2 * growth >= period else growth + period)
