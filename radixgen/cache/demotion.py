"""Demotion: paths that nobody is expected to read again are evicted before all others."""

from collections import Counter
from collections.abc import Iterable

from radixgen.cache.node import DEMOTED, Lock, Node
from radixgen.cache.tokens import TokenArray
from radixgen.cache.tree import RadixTree


def demote(
    tree: RadixTree, tokens: TokenArray, namespace: str = "", start: int = 0, copying: Iterable[Lock] = ()
) -> int:
    """Let the cached tokens from position `start` on be evicted before everything else, with their only continuation.
    Returns how many of `tokens` this applies to. A new lock ends it.

    Nodes that another path shares, or that are locked, stay as they are; locks in `copying` do not count.
    """
    match = tree.match_prefix(tokens, namespace)
    if match is None or match.length <= start or match.node.children:
        return 0
    copies = Counter(lock.node for lock in copying)
    node, demoted = match.node, 0
    while node.parent is not None and node.end > start and _is_free(node, copies[node]):
        if node.start < start:
            tree.split(node, start - node.start)
        node.priority = DEMOTED
        if node.evictable:
            tree.evictable.add(node)
        demoted += min(node.end, match.length) - node.start
        copies[node.parent] += node.locked
        node = node.parent
    return demoted


def _is_free(node: Node, copies: int) -> bool:
    """Return whether only `copies` locks of copies hold the node, and at most one path leads through it."""
    return node.lock_count + node.locked_children <= copies and len(node.children) <= 1
