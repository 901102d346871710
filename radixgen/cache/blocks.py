"""What is computed, seen as blocks: the coarse view of the tree that routers in front of several engines work with.

A block is the `block_size` tokens that end at a multiple of `block_size` on some path; its hash names them and
everything before them, namespace included. The tree holds every prefix once, so a block stands in one place: at its
last token. From this follows all the rest:

- a block is held if and only if its last token is computed, since what precedes a computed token is computed;
- branches that part inside a block hold two blocks there, with two hashes;
- a split, and a boundary that moves, take hashes from one node to another: no block comes or goes;
- leaves are evicted from their ends, so that a block goes after all that continue it: what is held is closed under
  "the block before", at every moment.

Two blocks whose hashes collide count as one, held while either is.
"""

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from radixgen.cache.node import Node
from radixgen.cache.tokens import TokenArray
from radixgen.cache.tree import RadixTree

PRIVATE = "\0"
"""A namespace with this in it belongs to one sequence; its blocks are of use to nobody else."""


class BlocksAdded(NamedTuple):
    """Blocks that came to be held, each the parent of the next."""

    hashes: list[int]
    """Below 2**64"""
    parent: int | None
    """The hash of the block before the first; None where that is the first of its path."""
    tokens: TokenArray
    """`[len(hashes) * block_size]`"""
    namespace: str


class BlocksDropped(NamedTuple):
    """Blocks that are held no more, each after all that continue it."""

    hashes: list[int]


class BlocksReset(NamedTuple):
    """No block is held."""


BlockEvent = BlocksAdded | BlocksDropped | BlocksReset


class BlockProjection:
    """Listens to a tree and tells, in events, which blocks it holds.

    `emit` is called in the midst of what changes the tree: it must return soon and touch nothing of the tree. Where it
    returns False, this event is lost, and maybe others before it: the next thing told is `BlocksReset`, then everything
    that is held.
    """

    def __init__(self, tree: RadixTree, emit: Callable[[BlockEvent], bool], block_size: int = 16) -> None:
        """Begins with `BlocksReset`, then tells what `tree` holds already."""
        self.block_size = block_size
        self._tree = tree
        self._emit = emit
        self._overflowed = False
        self._held: Counter[int] = Counter()
        """How many blocks have this hash: 1, but for collisions."""
        self.emit_all()
        tree.listener = self

    def __len__(self) -> int:
        """How many hashes are held."""
        return len(self._held)

    def emit_all(self) -> None:
        """Begin anew: `BlocksReset`, then everything that is held. Hashes every token."""
        self._overflowed = False
        self._held.clear()
        self._emit_event(BlocksReset())
        nodes = self._tree.roots()
        for node in nodes:  # which grows meanwhile: parents come before their children
            node.block_hashes = ()
            self._follow(node)
            nodes.extend(node.children.values())

    def close(self) -> None:
        """Listen no more, and leave nothing behind in the tree."""
        self._tree.listener = None
        for node in self._tree.nodes():
            node.block_hashes = ()

    def check(self) -> None:
        """Assert, by hashing every path from its beginning, that each node has the hashes of the blocks that end in its
        computed tokens, and that they are what is held.
        """
        held: Counter[int] = Counter()
        for node in self._tree.nodes():
            hashes = [] if PRIVATE in node.namespace else self._hashes_of(node)
            assert list(node.block_hashes) == hashes, f"the blocks of {node} are others"
            held.update(hashes)
        assert held == self._held

    # -- what the tree tells ------------------------------------------------------------------------------

    def changed(self, node: Node) -> None:
        """As `Listener.changed`."""
        self._follow(node)
        if self._overflowed:
            self.emit_all()

    def moved(self, lower: Node, upper: Node, count: int) -> None:
        """As `Listener.moved`."""
        if lower.block_hashes:
            passed = lower.start // self.block_size - (lower.start - count) // self.block_size
            upper.block_hashes += lower.block_hashes[:passed]
            lower.block_hashes = lower.block_hashes[passed:]

    # -- inside -------------------------------------------------------------------------------------------

    def _follow(self, node: Node) -> None:
        """Bring the node's hashes up to what it has computed."""
        count = (node.start + node.computed) // self.block_size - node.start // self.block_size
        known = len(node.block_hashes)
        if count < known:
            self._remove(node, count)
        elif count > known and PRIVATE not in node.namespace:
            self._store(node, count - known)

    def _store(self, node: Node, count: int) -> None:
        """The next `count` blocks of the node are held."""
        size = self.block_size
        parent = _last_hash(node)
        start = (node.start // size + len(node.block_hashes)) * size
        tokens = _tokens(node, start, start + count * size)
        hashes = hash_blocks(tokens, self.block_size, node.namespace, parent)
        node.block_hashes += tuple(hashes)
        if self._held.keys().isdisjoint(hashes) and len(set(hashes)) == count:
            self._held.update(hashes)
            self._emit_event(BlocksAdded(hashes, parent, tokens, node.namespace))
            return
        for index, one in enumerate(hashes):
            self._held[one] += 1
            if self._held[one] == 1:
                block = tokens[index * size : (index + 1) * size]
                self._emit_event(BlocksAdded([one], hashes[index - 1] if index else parent, block, node.namespace))

    def _remove(self, node: Node, count: int) -> None:
        """All but the first `count` blocks of the node are held no more."""
        hashes, node.block_hashes = node.block_hashes[count:], node.block_hashes[:count]
        gone = []
        for one in reversed(hashes):
            self._held[one] -= 1
            if not self._held[one]:
                del self._held[one]
                gone.append(one)
        if gone:
            self._emit_event(BlocksDropped(gone))
        if not self._held:
            self._emit_event(BlocksReset())

    def _emit_event(self, event: BlockEvent) -> None:
        self._overflowed = self._overflowed or not self._emit(event)

    def _hashes_of(self, node: Node) -> list[int]:
        """The hashes of the blocks that end in the node's computed tokens, from its path alone."""
        known = node.start + node.computed
        path = node.path_tokens()[: known - known % self.block_size]
        return hash_blocks(path, self.block_size, node.namespace)[node.start // self.block_size :]


def hash_blocks(tokens: TokenArray, block_size: int, namespace: str = "", parent: int | None = None) -> list[int]:
    """The hashes of the full blocks of `tokens`, each after the one before it and the first after `parent`."""
    before = _seed(namespace, block_size) if parent is None else parent
    data = tokens.astype("<i4", copy=False).tobytes()
    size = 4 * block_size
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        before = _digest(before.to_bytes(8, "little") + data[start : start + size])
        hashes.append(before)
    return hashes


def _last_hash(node: Node) -> int | None:
    """Of the last block that ends in the node or, where none does, before it."""
    above: Node | None = node
    while above is not None:
        if above.block_hashes:
            return above.block_hashes[-1]
        above = above.parent
    return None


def _tokens(node: Node, start: int, stop: int) -> TokenArray:
    """A copy of the tokens at positions `[start, stop)` of the node's path, the last of them in the node."""
    pieces = [node.tokens[max(start - node.start, 0) : stop - node.start]]
    while start < node.start:
        assert node.parent is not None
        node = node.parent
        pieces.append(node.tokens[max(start - node.start, 0) :])
    return np.concatenate(pieces[::-1])


def _seed(namespace: str, block_size: int) -> int:
    return _digest(block_size.to_bytes(8, "little") + namespace.encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=b"radixgen.block").digest(), "little")
