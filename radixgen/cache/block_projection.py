"""Computed tokens as fixed-size blocks: the coarse view of the tree used by routers in front of several engines.

A block is the `block_size` tokens that end at a multiple of `block_size` on some path. Its hash covers them and
everything before them, including the namespace. Since the tree holds every prefix once, each block belongs to exactly
one node: the node of its last token. Therefore:

- a block is held if and only if its last token is computed, since all tokens before a computed token are computed;
- branches that diverge within a block hold two blocks there, with different hashes;
- splits and moved boundaries move hashes between nodes, but add and remove none;
- leaves are evicted from their ends, so a block is removed after all blocks that continue it. The set of held blocks
  always includes the predecessor of each of its blocks.

Blocks with colliding hashes count as one, held while any of them is. Blocks of private namespaces, and those that were
not read exactly, are not reported.
"""

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple

from radixgen.cache.node import PRIVATE, Node
from radixgen.cache.tokens import TokenArray, exact_len
from radixgen.cache.tree import RadixTree


class BlocksAdded(NamedTuple):
    """A chain of blocks that are now held, each the parent of the next."""

    hashes: list[int]
    """Below 2**64."""
    parent: int | None
    """Hash of the block before the first; None if the first begins its path."""
    tokens: TokenArray
    """`[len(hashes) * block_size]`"""
    namespace: str


class BlocksDropped(NamedTuple):
    """Blocks no longer held, each after all blocks that continue it."""

    hashes: list[int]


class BlocksReset(NamedTuple):
    """No block is held any more."""


BlockEvent = BlocksAdded | BlocksDropped | BlocksReset


class BlockProjection:
    """Tracks which blocks a tree holds, and emits an event for each change.

    `emit` is called while the tree changes: it must return quickly and must not access the tree. If it returns False,
    the event is lost, and perhaps earlier ones: the next events are `BlocksReset` and then all held blocks.
    """

    def __init__(self, tree: RadixTree, emit: Callable[[BlockEvent], bool], block_size: int = 16) -> None:
        """Emit `BlocksReset` and the blocks that `tree` holds, then listen to the tree."""
        self.block_size = block_size
        self._tree = tree
        self._emit = emit
        self._overflowed = False
        self._held: Counter[int] = Counter()
        """Number of blocks per hash; above 1 only for collisions."""
        self._inexact: set[int] = set()
        """Hashes of nodes that are not reported."""
        self.emit_all()
        tree.listeners.append(self)

    def __len__(self) -> int:
        """Return the number of held hashes."""
        return len(self._held)

    def emit_all(self) -> None:
        """Emit `BlocksReset` and all held blocks. Hashes every token again."""
        self._overflowed = False
        self._held.clear()
        self._inexact.clear()
        self._emit_event(BlocksReset())
        nodes = self._tree.roots()
        for node in nodes:  # grows during the loop: parents come before their children
            node.block_hashes = ()
            self._follow(node)
            nodes.extend(node.children.values())

    def close(self) -> None:
        """Stop listening and remove all hashes from the tree."""
        self._tree.listeners.remove(self)
        for node in self._tree.nodes():
            node.block_hashes = ()

    def check(self) -> None:
        """Assert that each node has the hashes of the blocks that end in its computed tokens, and that exactly these
        are held.

        Hashes every path from its beginning.
        """
        held: Counter[int] = Counter()
        for node in self._tree.nodes():
            hashes = [] if PRIVATE in node.namespace else self._hashes_of(node)
            assert list(node.block_hashes) == hashes, f"the blocks of {node} are others"
            held.update(block_hash for block_hash in hashes if block_hash not in self._inexact)
        assert held == self._held

    # -- Listener ------------------------------------------------------------------------------------------

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
        """Add or remove blocks to match the node's computed tokens."""
        count = (node.start + node.computed) // self.block_size - node.start // self.block_size
        known = len(node.block_hashes)
        if count < known:
            self._remove(node, count)
        elif count > known and PRIVATE not in node.namespace:
            self._store(node, count - known)

    def _store(self, node: Node, count: int) -> None:
        """Add the node's next `count` blocks."""
        size = self.block_size
        parent = _last_hash(node)
        start = (node.start // size + len(node.block_hashes)) * size
        tokens = node.path_tokens(start, start + count * size)
        hashes = hash_blocks(tokens, self.block_size, node.namespace, parent)
        node.block_hashes += tuple(hashes)
        exact = 0 if parent in self._inexact else exact_len(tokens) // size
        if exact < count:
            self._inexact.update(hashes[exact:])
            hashes, tokens, count = hashes[:exact], tokens[: exact * size], exact
        if not hashes:
            return
        if self._held.keys().isdisjoint(hashes) and len(set(hashes)) == count:
            self._held.update(hashes)
            self._emit_event(BlocksAdded(hashes, parent, tokens, node.namespace))
            return
        for index, block_hash in enumerate(hashes):
            self._held[block_hash] += 1
            if self._held[block_hash] == 1:
                block = tokens[index * size : (index + 1) * size]
                self._emit_event(
                    BlocksAdded([block_hash], hashes[index - 1] if index else parent, block, node.namespace)
                )

    def _remove(self, node: Node, count: int) -> None:
        """Remove all but the first `count` blocks of the node."""
        hashes, node.block_hashes = node.block_hashes[count:], node.block_hashes[:count]
        gone = []
        for block_hash in reversed(hashes):
            if block_hash in self._inexact:
                self._inexact.remove(block_hash)
                continue
            self._held[block_hash] -= 1
            if not self._held[block_hash]:
                del self._held[block_hash]
                gone.append(block_hash)
        if gone:
            self._emit_event(BlocksDropped(gone))
        if gone and not self._held:
            self._emit_event(BlocksReset())

    def _emit_event(self, event: BlockEvent) -> None:
        self._overflowed = self._overflowed or not self._emit(event)

    def _hashes_of(self, node: Node) -> list[int]:
        """Hash the blocks that end in the node's computed tokens, from its path alone."""
        known = node.start + node.computed
        path = node.path_tokens()[: known - known % self.block_size]
        return hash_blocks(path, self.block_size, node.namespace)[node.start // self.block_size :]


def hash_blocks(tokens: TokenArray, block_size: int, namespace: str = "", parent: int | None = None) -> list[int]:
    """Hash the full blocks of `tokens`, chained from `parent`, the hash of the block before them."""
    before = _seed(namespace, block_size) if parent is None else parent
    data = tokens.astype("<i4", copy=False).tobytes()
    size = 4 * block_size
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        before = _digest(before.to_bytes(8, "little") + data[start : start + size])
        hashes.append(before)
    return hashes


def _last_hash(node: Node) -> int | None:
    """Return the hash of the last block that ends in the node or above it, or None."""
    above: Node | None = node
    while above is not None:
        if above.block_hashes:
            return above.block_hashes[-1]
        above = above.parent
    return None


def _seed(namespace: str, block_size: int) -> int:
    return _digest(block_size.to_bytes(8, "little") + namespace.encode("utf-8", "surrogatepass"))


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=b"radixgen.block").digest(), "little")
