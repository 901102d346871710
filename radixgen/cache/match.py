"""Prefix matches kept up to date while the tree changes, so that a waiting prompt is matched only once."""

from collections.abc import Iterator
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

    __slots__ = ("_evictable", "_first", "_parting", "group", "length", "namespace", "next_token", "node", "tokens")

    def __init__(self, tokens: TokenArray, namespace: str, evictable: "EvictionQueue") -> None:
        self.tokens = tokens
        self.namespace = namespace
        self.node: Node | None = None
        self.group = MatchGroup()
        self._evictable = evictable
        self.move(None, 0)

    def move(self, node: "Node | None", length: int) -> None:
        """Set the match to `length` tokens, ending in `node`."""
        if self.node is not None:
            self.group.remove(self)
            if not self.group.members:
                del self.node.followers[self.place]
            self._evictable.refresh(self.node)
        self.node, self.length = node, length
        self.next_token = int(self.tokens[length]) if length < self.tokens.size else -1
        if node is None:
            self.group = MatchGroup()
            self._first: FollowedMatch | None = None
        else:
            place = self.place
            self.group = node.followers.get(place) or node.followers.setdefault(place, MatchGroup())
            self.group.add(self)
            self._evictable.refresh(node)

    @property
    def place(self) -> tuple[int, int]:
        """What the followers of a node are grouped by."""
        return self.length, self.next_token

    @property
    def cost(self) -> float:
        """Tokens that are not known. Those that all of the group lack are divided among its members."""
        return self.tokens.size - self.length - self.group.saved

    def parts_from(self, first: "FollowedMatch") -> int:
        """Return the position of the first token that differs from those of the first in the group."""
        if first is self:
            return self.tokens.size
        if first is not self._first:
            length = self.length
            self._first = first
            self._parting = length + common_prefix_len(first.tokens[length:], self.tokens[length:])
        return self._parting

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


class MatchGroup:
    """Followed matches that end at the same place and go on with the same token, in the order in which they came.

    All of them lack the tokens up to position `shared_end`. `saved` is what each need not compute of these if they are
    divided among the members.
    """

    __slots__ = ("members", "saved", "shared_end")

    def __init__(self) -> None:
        self.members: dict[FollowedMatch, None] = {}
        self.shared_end = 0
        self.saved = 0.0

    def add(self, followed: FollowedMatch) -> None:
        end = followed.parts_from(next(iter(self.members), followed))
        self.shared_end = min(self.shared_end, end) if self.members else end
        self.members[followed] = None
        self._divide(followed.length)

    def remove(self, followed: FollowedMatch) -> None:
        """Remove a match. What the others share is not compared again."""
        del self.members[followed]
        self._divide(followed.length)

    def _divide(self, length: int) -> None:
        shared = self.shared_end - length
        self.saved = shared - shared / max(len(self.members), 1)


# Updates of the matches that end in a node, called after each kind of change.


def follow_append(node: "Node", token: int) -> None:
    """Update matches after `token` was appended to the node."""
    before = node.end - 1
    for followed in _members(node, before, token):
        followed.move(node, before + 1)


def follow_branch(parent: "Node", leaf: "Node") -> None:
    """Update matches after the parent got the new child `leaf`."""
    start = parent.end
    members = _members(parent, start, leaf.first_token)
    if not members:
        return
    end = start + common_prefix_len(leaf.tokens, members[0].tokens[start:])
    for followed in members:
        parting = followed.parts_from(members[0])
        length = min(end, parting)
        if parting == end < followed.tokens.size:
            length += common_prefix_len(leaf.tokens[end - start :], followed.tokens[end:])
        followed.move(leaf, length)


def follow_raise(lower: "Node", upper: "Node") -> None:
    """Update matches after the first tokens of `lower` moved to its parent `upper`."""
    for followed in list(followers(lower)):
        if followed.length <= upper.end:
            followed.move(upper, followed.length)


def follow_cut(node: "Node") -> None:
    """Update matches after tokens at the node's end were removed."""
    for followed in list(followers(node)):
        if followed.length > node.end:
            followed.move(node, node.end)


def follow_removal(node: "Node") -> None:
    """Update matches after the node was removed from the tree."""
    for followed in list(followers(node)):
        followed.move(node.parent, node.start)


def followers(node: "Node") -> Iterator[FollowedMatch]:
    """Iterate over the followed matches that end in the node."""
    return (followed for group in node.followers.values() for followed in group.members)


def _members(node: "Node", length: int, token: int) -> list[FollowedMatch]:
    """Return the matches that end in the node after `length` tokens and go on with `token`."""
    group = node.followers.get((length, token))
    return list(group.members) if group else []
