"""Nodes of the radix tree, and locks on the paths to them.

Of a node's tokens the first `computed` have KV, the first `scheduled` have a slot, and all `known` are in the tree:
`known >= scheduled >= computed`. Its extents hold `scheduled` slots, followed by reserved slots into which a leaf
grows.

    tokens   |---- computed ----|-- scheduled --|-- known --|
    extents  |------------ slots in use --------|-- reserve --|

A node that was thinned (`radixgen.cache.thinning`) is computed to its end and has slots for some of its tokens only.
"""

import math

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.match import FollowedMatch
from radixgen.cache.pool import Extent
from radixgen.cache.recent_evictions import End
from radixgen.cache.tokens import TokenArray, token_ids

PRIVATE = "\0"
"""Part of a namespace that nothing outside the engine may find: of one sequence alone, or `BLENDED`."""
BLENDED = f"{PRIVATE}blended"
"""End of the namespace of KV that is inexact, because some of it was moved from other positions."""
DEMOTED = -math.inf
"""Priority of a node that is evicted before all others, until it is locked again."""
_MIN_RUN = 16


class Node:
    """A run of tokens with its slots, parent and children. Only the tree writes its fields."""

    __slots__ = (
        "_buffer",
        "_offset",
        "_owns_tail",
        "block_hashes",
        "capacity",
        "children",
        "computed",
        "epoch",
        "extent_positions",
        "extents",
        "followers",
        "id",
        "known",
        "last_used",
        "lock_count",
        "locked_children",
        "namespace",
        "parent",
        "priority",
        "scheduled",
        "serial",
        "start",
    )

    def __init__(self, parent: "Node | None", namespace: str, buffer: TokenArray) -> None:
        self.parent = parent
        self.namespace = namespace
        self.children: dict[int, Node] = {}
        self.extents: list[Extent] = []
        self.extent_positions: list[int] | None = None
        """Position of each extent's first token, of a node that was thinned: some of its tokens gave up their slots."""
        self.capacity = 0
        self.known = int(buffer.size)
        self.scheduled = 0
        self.computed = 0
        self.start = parent.end if parent else 0
        self.lock_count = 0
        self.locked_children = 0
        self.priority = 0.0
        self.last_used = 0
        self.serial = 0
        self.epoch = 0
        self.id = -1
        self.block_hashes: tuple[int, ...] = ()
        """Hashes of the blocks that end in the node. Written by the tree's listener."""
        self.followers: dict[FollowedMatch, None] = {}
        """Followed matches that end in the node."""
        self._buffer = buffer
        self._offset = 0
        self._owns_tail = True

    @property
    def tokens(self) -> TokenArray:
        """The node's tokens; the first one that was read inexactly on its path is marked."""
        return self._buffer[self._offset : self._offset + self.known]

    @property
    def token_ids(self) -> TokenArray:
        """The node's tokens without marks."""
        return token_ids(self.tokens)

    @property
    def first_token(self) -> int:
        """The node's key among its parent's children."""
        return int(self._buffer[self._offset])

    @property
    def end(self) -> int:
        """Position after the node's last token."""
        return self.start + self.known

    @property
    def computed_end(self) -> int:
        """Position after the last computed token on the path to the node's end."""
        node = self
        while not node.computed and node.parent is not None:
            node = node.parent
        return node.start + node.computed

    @property
    def epoch_end(self) -> End:
        """Identifies the prefix that ends with this node. An unchanged value means that no token of the prefix has
        changed.
        """
        return self.namespace if self.parent is None else self.epoch, self.end

    @property
    def complete(self) -> bool:
        """Whether every token up to the node's end has KV."""
        return self.computed == self.known

    @property
    def locked(self) -> bool:
        return self.lock_count + self.locked_children > 0

    @property
    def idle(self) -> bool:
        """Whether the node has neither locks of its own nor children."""
        return not self.lock_count and not self.children

    @property
    def evictable(self) -> bool:
        """Whether tokens may be evicted from the node's end."""
        return not self.locked and not self.children and self.known > 0

    @property
    def num_keys(self) -> int:
        """Scheduled tokens that have a slot: all, unless the node was thinned."""
        return self.scheduled if self.extent_positions is None else sum(extent.length for extent in self.extents)

    @property
    def reserved(self) -> int:
        return self.capacity - self.scheduled

    @property
    def next_slot(self) -> int:
        """The reserved slot for the next token, or -1 if none is reserved."""
        spare = self.capacity - self.scheduled
        if not spare:
            return -1
        for start, length in reversed(self.extents):
            if spare <= length:
                return start + length - spare
            spare -= length
        raise AssertionError("the extents hold less than the node says")

    @property
    def next_cached_slot(self) -> int:
        """The slot of the next token if an only child has computed it, else -1."""
        if len(self.children) != 1:
            return -1
        (child,) = self.children.values()
        return child.extents[0].start if child.computed else -1

    def path(self) -> list["Node"]:
        """The nodes from the root to this one."""
        nodes = [self]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        return nodes[::-1]

    def unscheduled_path(self) -> list["Node"]:
        """The nodes of the path that have tokens without a slot, from the top."""
        nodes = []
        node: Node | None = self
        while node is not None and node.scheduled < node.known:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def path_tokens(self, first: int = 0, stop: int | None = None) -> TokenArray:
        """Copy the tokens at positions `[first, stop)` of the node's path. Default: all of them."""
        parts = self._path_parts(first, self.end if stop is None else stop)
        return np.concatenate([node.tokens[begin:end] for node, begin, end in parts] or [self.tokens[:0]])

    def path_slots(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the slots of the tokens at positions `[first, stop)` of the node's path."""
        parts = self._path_parts(first, stop)
        return np.concatenate([node.slots(begin, end) for node, begin, end in parts] or [np.empty(0, np.int64)])

    def _path_parts(self, first: int, stop: int) -> list[tuple["Node", int, int]]:
        """The nodes of the path that hold positions `[first, stop)`, from the top, each with the range within it."""
        parts = []
        node: Node | None = self
        while node is not None and stop > first:
            begin = max(first, node.start)
            if begin < stop:
                parts.append((node, begin - node.start, stop - node.start))
                stop = begin
            node = node.parent
        return parts[::-1]

    def slots(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the slots of tokens `[first, stop)`, relative to the node's start."""
        pieces = []
        end = self.capacity
        for start, length in reversed(self.extents):  # most calls are for slots near the end
            begin = end - length
            if begin < stop:
                pieces.append(np.arange(start + max(first - begin, 0), start + min(stop, end) - begin))
            if begin <= first:
                break
            end = begin
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces[::-1]) if pieces else np.empty(0, np.int64)

    def key_slots(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions and the slots of the node's scheduled tokens, ascending, without those that have none
        any more.
        """
        if self.extent_positions is None:
            return np.arange(self.start, self.start + self.scheduled), self.slots(0, self.scheduled)
        pairs = zip(self.extent_positions, self.extents, strict=True)
        runs = [np.arange(extent.length) + [[position], [extent.start]] for position, extent in pairs]
        positions, slots = np.concatenate([np.empty((2, 0), np.int64), *runs], axis=1)
        return positions, slots

    def __repr__(self) -> str:
        return (
            f"Node(id={self.id}, start={self.start}, known={self.known}, scheduled={self.scheduled}, "
            f"computed={self.computed}, locks={self.lock_count}+{self.locked_children})"
        )

    def _append(self, token: int) -> None:
        stop = self._offset + self.known
        if not self._owns_tail or stop == self._buffer.size:
            grown = np.empty(max(_MIN_RUN, 2 * self.known), np.int32)
            grown[: self.known] = self.tokens
            self._buffer, self._offset, self._owns_tail = grown, 0, True
            stop = self.known
        self._buffer[stop] = token
        self.known += 1


class Lock:
    """A handle that keeps the path to `node` in the tree until it is released. A sequence's lock is its cursor."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node: Node | None = node

    @property
    def held(self) -> Node:
        """The locked node. Asserts that the lock was not released."""
        assert self.node is not None, "the lock was released"
        return self.node


def end_demotion(node: Node) -> None:
    """Give the demoted end of the path to `node`, which may be locked by copies, its place in the order again."""
    above: Node | None = node
    while above is not None and above.priority == DEMOTED:
        above.priority = 0.0
        above = above.parent
