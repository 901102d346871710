"""Prefix matches kept up to date while the tree changes, so that a waiting prompt is matched only once."""

from typing import TYPE_CHECKING, NamedTuple

from radixgen.cache.tokens import TokenArray, common_prefix_len

if TYPE_CHECKING:
    from radixgen.cache.eviction import EvictionQueue
    from radixgen.cache.node import Node


class Match(NamedTuple):
    """The longest known prefix of a token sequence. It ends `offset` tokens into `node`. Of its `length` tokens,
    `computed` have KV and `evictable` are unlocked.
    """

    node: "Node"
    offset: int
    length: int
    computed: int
    evictable: int

    @property
    def evictable_slots(self) -> int:
        """Slots of the evictable tokens: fewer than tokens if the path was thinned."""
        slots = self.evictable
        node: Node | None = self.node
        while node is not None and not node.locked:
            slots -= node.known - node.num_keys
            node = node.parent
        return slots


def longest_match(root: "Node", tokens: TokenArray) -> Match:
    """Return the longest prefix of `tokens` below `root`."""
    node = root
    offset = length = computed = evictable = 0
    while length < tokens.size:
        child = node.children.get(int(tokens[length]))
        if child is None:
            break
        common = common_prefix_len(child.tokens, tokens[length:])
        node, offset = child, common
        length += common
        computed += min(common, child.computed)
        if not child.lock_count + child.locked_children:
            evictable += common
        if common < child.known:
            break
    return Match(node, offset, length, computed, evictable)


class FollowedMatch:
    """The longest known prefix of `tokens`, kept up to date by the tree. Its `length` tokens end in `node`, which is
    None if the namespace has no root.
    """

    __slots__ = ("_evictable", "length", "namespace", "next_token", "node", "tokens")

    def __init__(self, tokens: TokenArray, namespace: str, evictable: "EvictionQueue") -> None:
        """`evictable`: queue in which nodes that are matched are moved back."""
        self.tokens = tokens
        self.namespace = namespace
        self.node: Node | None = None
        self._evictable = evictable
        self.move(None, 0)

    def move(self, node: "Node | None", length: int) -> None:
        """Set the match to `length` tokens, ending in `node`."""
        if self.node is not None:
            del self.node.followers[self]
            self._evictable.refresh(self.node)
        if node is not None:
            node.followers[self] = None
            self._evictable.refresh(node)
        self.node, self.length = node, length
        self.next_token = int(self.tokens[length]) if length < self.tokens.size else -1

    @property
    def computed(self) -> int:
        """Tokens of the match that have KV."""
        return min(self.node.computed_end, self.length) if self.node is not None else 0

    def match(self) -> Match | None:
        """As `RadixTree.match_prefix`. The cost is linear in the nodes at the end of the path without KV or without a
        lock.
        """
        node = self.node
        if node is None:
            return None
        offset = self.length - node.start
        above, part, evictable = node, offset, 0
        while not above.locked and above.parent is not None:
            evictable += part
            above = above.parent
            part = above.known
        return Match(node, offset, self.length, self.computed, evictable)


# Updates of the matches that end in a node, called after each kind of change.


def follow_append(node: "Node", token: int) -> None:
    """Update matches after `token` was appended to the node."""
    before = node.end - 1
    for followed in list(node.followers):
        if followed.length == before and followed.next_token == token:
            followed.move(node, before + 1)


def follow_branch(parent: "Node", leaf: "Node") -> None:
    """Update matches after the parent got the new child `leaf`."""
    end, token = parent.end, leaf.first_token
    for followed in list(parent.followers):
        if followed.length == end and followed.next_token == token:
            followed.move(leaf, end + common_prefix_len(leaf.tokens, followed.tokens[end:]))


def follow_raise(lower: "Node", upper: "Node") -> None:
    """Update matches after the first tokens of `lower` moved to its parent `upper`."""
    for followed in list(lower.followers):
        if followed.length <= upper.end:
            followed.move(upper, followed.length)


def follow_cut(node: "Node") -> None:
    """Update matches after tokens at the node's end were removed."""
    for followed in list(node.followers):
        if followed.length > node.end:
            followed.move(node, node.end)


def follow_removal(node: "Node") -> None:
    """Update matches after the node was removed from the tree."""
    for followed in list(node.followers):
        followed.move(node.parent, node.start)
