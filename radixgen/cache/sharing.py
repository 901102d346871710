"""Explanation of why a prompt was not shared to its end."""

from itertools import islice

from radixgen.cache.match import Match
from radixgen.cache.node import Node
from radixgen.cache.tokens import TokenArray, token_ids
from radixgen.cache.tree import RadixTree
from radixgen.core import SharingEnd

_SHOWN_TOKENS = 8
_MAX_BRANCHES = 16
"""Children of a node, and roots of other namespaces, that are searched; the newest of each."""


def sharing_end(tree: RadixTree, tokens: TokenArray, namespace: str, match: Match | None) -> SharingEnd | None:
    """Return where and why sharing of `tokens` ended, or None if all are known. `match` is their match in `namespace`.

    Costs a few prefix matches, independent of the tree's size.
    """
    position = match.length if match else 0
    if position == tokens.size:
        return None
    following = tuple(token_ids(tokens[position : position + _SHOWN_TOKENS]).tolist())
    inside = match is not None and match.offset < match.node.known
    if not inside:
        end = match.node.epoch_end if match else (namespace, 0)
        if (end, int(tokens[position])) in tree.recent_evictions:
            return SharingEnd("evicted", position, following)
    if not position and _held_elsewhere(tree, tokens[:_SHOWN_TOKENS], namespace):
        return SharingEnd("namespace", position, following)
    if match and (inside or match.node.children):
        return SharingEnd("diverged", position, following, _continuation(match.node, match.offset))
    return SharingEnd("cold", position, following)


def _held_elsewhere(tree: RadixTree, head: TokenArray, namespace: str) -> bool:
    """Return whether one of the newest other namespaces knows all of `head`."""
    others = (name for name in islice(reversed(tree.namespaces), _MAX_BRANCHES + 1) if name != namespace)
    matches = (tree.match_prefix(head, name) for name in others)
    return any(match is not None and match.length == head.size for match in matches)


def _continuation(node: Node, offset: int) -> tuple[int, ...]:
    """Return the tokens after the first `offset` of `node`, through the children in use or used last."""
    tokens = node.token_ids[offset : offset + _SHOWN_TOKENS].tolist()
    while node.children and len(tokens) < _SHOWN_TOKENS:
        newest = islice(reversed(node.children.values()), _MAX_BRANCHES)
        node = max(newest, key=lambda child: (child.locked, child.last_used))
        tokens += node.token_ids[: _SHOWN_TOKENS - len(tokens)].tolist()
    return tuple(tokens)
