"""Number of slots reserved per sequence, so that its leaf grows in place and plans are carried over."""

from collections.abc import Sized

from radixgen.cache import Node, RadixTree

FIRST_RESERVE = 16
_LARGEST_RESERVE = 256


class Reserves:
    """Computes reserves. `running` and `waiting` are live collections of those that share the slots."""

    def __init__(self, tree: RadixTree, running: Sized, waiting: Sized) -> None:
        self._tree, self._running, self._waiting = tree, running, waiting

    @property
    def share(self) -> int:
        """Maximum reserve of one sequence: a fair share of the slots that are free or evictable."""
        return (self._tree.pool.free + self._tree.evictable_tokens) // (2 * max(len(self._running), 1))

    def of_leaf(self, node: Node, step: int) -> int:
        """Return the slots to reserve after the token that a leaf computes in `step`, about as many as the leaf has
        tokens.

        Reserves of different leaves run out in the same step, because rebuilding a plan costs the same for a thousand
        leaves as for one. While no request waits, even short leaves get long reserves, as far as slots are free: the
        kernels read contiguous keys in a fraction of the time.
        """
        room = 0 if len(self._waiting) else self._tree.pool.free // (2 * max(len(self._running), 1))
        period = 1 << (min(max(FIRST_RESERVE, node.known, room), _LARGEST_RESERVE).bit_length() - 1)
        growth = period - 1 - step % period
        return min(self.share, growth if 2 * growth >= period else growth + period)
