"""Matches that stay right while the tree changes, so that a prompt that waits is compared with the tree only once."""

from typing import TYPE_CHECKING, NamedTuple

from radixgen.cache.tokens import TokenArray, common_prefix_len

if TYPE_CHECKING:
    from radixgen.cache.node import Node


class Match(NamedTuple):
    """The longest prefix found: it ends `offset` tokens into `node`. Of its `length` tokens `computed` have
    KV, and `evictable` could be evicted at this moment.
    """

    node: "Node"
    offset: int
    length: int
    computed: int
    evictable: int


class FollowedMatch:
    """The longest known prefix of `tokens`, kept up to date by the tree: of its `length` tokens the last ones are in
    `node`, which is None where the namespace has no root.
    """

    __slots__ = ("length", "namespace", "next_token", "node", "tokens")

    def __init__(self, tokens: TokenArray, namespace: str) -> None:
        self.tokens = tokens
        self.namespace = namespace
        self.node: Node | None = None
        self.move(None, 0)

    def move(self, node: "Node | None", length: int) -> None:
        """Go to where `length` tokens end, in `node`."""
        if self.node is not None:
            del self.node.followers[self]
        if node is not None:
            node.followers[self] = None
        self.node, self.length = node, length
        self.next_token = int(self.tokens[length]) if length < self.tokens.size else -1

    @property
    def computed(self) -> int:
        """How many of its tokens have KV."""
        return min(self.node.computed_end, self.length) if self.node is not None else 0

    def match(self) -> Match | None:
        """As `RadixTree.match_prefix`. Costs a step for each node at the end of the path that holds no KV, or is not
        locked.
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


# What becomes of the matches that end in a node where it changes, each called after the change.


def grew(node: "Node", token: int) -> None:
    """The node has `token` at its end."""
    before = node.end - 1
    for followed in list(node.followers):
        if followed.length == before and followed.next_token == token:
            followed.move(node, before + 1)


def branched(parent: "Node", leaf: "Node") -> None:
    """The parent has a new child."""
    end, token = parent.end, leaf.first_token
    for followed in list(parent.followers):
        if followed.length == end and followed.next_token == token:
            followed.move(leaf, end + common_prefix_len(leaf.tokens, followed.tokens[end:]))


def raised(lower: "Node", upper: "Node") -> None:
    """The first tokens of `lower` have passed to its parent `upper`."""
    for followed in list(lower.followers):
        if followed.length <= upper.end:
            followed.move(upper, followed.length)


def shortened(node: "Node") -> None:
    """Tokens at the node's end were dropped."""
    for followed in list(node.followers):
        if followed.length > node.end:
            followed.move(node, node.end)


def removed(node: "Node") -> None:
    """The node is not in the tree any more."""
    for followed in list(node.followers):
        followed.move(node.parent, node.start)
