"""Slots whose KV is copied from another tier instead of being computed."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.node import Node
from radixgen.cache.pool import Extent, split_extents

if TYPE_CHECKING:
    from radixgen.cache.tree import RadixTree


def begin_load(tree: "RadixTree", count: int) -> list[Extent] | None:
    """Take `count` slots, evicting what is unlocked. Returns None if too few are free then."""
    if count > tree.pool.free + tree.evictable_tokens:
        return None
    tree.evict(count - tree.pool.free)
    if count > tree.pool.free:
        return None  # some of what was evicted is still fenced
    extents = tree.pool.allocate(count)
    tree.loading.update(extents)
    return extents


def schedule_path(tree: "RadixTree", node: Node) -> NDArray[np.int64]:
    """Give slots to the tokens of the path to `node` that have none, evicting what is unlocked, and return the slots,
    int64 `[tokens]`. Raises `OutOfSlots`.
    """
    lacking = node.unscheduled_path()
    tree.evict(sum(part.known - part.scheduled for part in lacking) - tree.pool.free)
    return np.concatenate([tree.schedule(part, part.known - part.scheduled) for part in lacking])


def cancel_load(tree: "RadixTree", extents: list[Extent]) -> None:
    """Release slots that nothing was copied to."""
    tree.loading.difference_update(extents)
    for extent in extents:
        tree.pool.release(extent)


def end_load(tree: "RadixTree", node: Node, first: int, extents: list[Extent]) -> None:
    """Give `extents`, the KV of the tokens from position `first` on, to the tokens on the path to `node` that have no
    slots. The slots of the others are released. Called between two steps.
    """
    tree.loading.difference_update(extents)
    unused: list[Extent] = []
    for part in node.path():
        count = part.known - part.scheduled
        if count:
            start = part.end - count
            released, extents = split_extents(extents, start - first)
            loaded, extents = split_extents(extents, count)
            unused += released
            first = part.end
            tree.give(part, loaded)
    for extent in unused + extents:
        tree.pool.release(extent)
