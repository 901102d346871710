"""Slots of nodes: growth, reserves and release."""

from collections.abc import Sequence

from radixgen.cache.columns import Columns
from radixgen.cache.node import Node
from radixgen.cache.pool import Extent, ExtentPool, split_extents
from radixgen.core import OutOfSlots


class NodeSlots:
    """Gives slots of `pool` to nodes and takes them back, and updates `columns`."""

    def __init__(self, pool: ExtentPool, columns: Columns) -> None:
        self._pool, self._columns = pool, columns

    def take(self, node: Node, count: int, reserve: int) -> None:
        """Grow the node's extents to fit `count` more tokens, with up to `reserve` slots after them."""
        need = count - node.reserved
        if need > self._pool.free:
            raise OutOfSlots(f"count={need}: only {self._pool.free} of {self._pool.capacity} slots are free")
        if node.children:
            reserve = min(reserve, node.known - node.scheduled - count)
        want = min(need + reserve, self._pool.free)
        got = self.grow(node, want)
        if need > got:
            node.extents.extend(self._pool.allocate(want - got))
            node.capacity += want - got
        self._columns.write(node)

    def grow(self, node: Node, count: int) -> int:
        """Lengthen the node's last extent by up to `count` free slots behind it. Returns their number."""
        if not node.extents:
            return 0
        start, length = node.extents[-1]
        got = self._pool.grow(start + length, count)
        if got:
            node.extents[-1] = Extent(start, length + got)
            node.capacity += got
        return got

    def give(self, node: Node, extents: list[Extent]) -> int:
        """Replace the node's reserve by slots that hold the KV of its next tokens. Returns their number."""
        self.cut(node, node.scheduled)
        count = sum(extent.length for extent in extents)
        node.extents.extend(extents)
        node.capacity += count
        node.scheduled += count
        self._columns.write(node)
        return count

    def cut(self, node: Node, count: int) -> None:
        """Release the node's slots after the first `count`."""
        if node.capacity > count:
            node.extents, dropped = split_extents(node.extents, count)
            node.capacity = count
            for extent in dropped:
                self._pool.release(extent)
            self._columns.write(node)

    def reserve(self, leaves: Sequence[Node], counts: Sequence[int]) -> None:
        """Reserve up to `counts` slots, at least one each, at the ends of `leaves` for tokens that are not known yet.

        Raises `OutOfSlots`, with nothing changed, if fewer are free.
        """
        if sum(counts) > self._pool.free:
            raise OutOfSlots(f"count={sum(counts)}: only {self._pool.free} of {self._pool.capacity} slots are free")
        moved, wanted = [], []
        for node, count in zip(leaves, counts, strict=True):
            assert not node.children, "the next token would begin a leaf of its own"
            if not self.grow(node, count):
                moved.append(node)
                wanted.append(count)
        for node, extents in zip(moved, self._pool.allocate_each(wanted), strict=True):
            node.extents += extents
            node.capacity += sum(extent.length for extent in extents)
        self._columns.write_extents(leaves)
