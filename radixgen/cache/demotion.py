"""Demotion: paths that will hardly be read again are evicted before all others."""

from collections import Counter
from collections.abc import Iterable

from radixgen.cache.node import DEMOTED, Lock, Node
from radixgen.cache.tokens import TokenArray
from radixgen.cache.tree import RadixTree


def demote(
    tree: RadixTree, tokens: TokenArray, namespace: str = "", start: int = 0, copying: Iterable[Lock] = ()
) -> int:
    """Let the cached tokens from position `start` on, and what alone continues them, be evicted before everything else.
    A new lock ends it. Returns how many of `tokens` that are.

    Nodes that another path shares or locks stay as they are. `copying`: locks of copies, which count as none.
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
    """Whether no more than `copies` of copies lock the node, and at most one path leads through it."""
    return node.lock_count + node.locked_children <= copies and len(node.children) <= 1
