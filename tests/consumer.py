"""A router's side of cache events: what it believes to be held, and what a tree really holds, each in plain tokens."""

from radixgen.cache import BlockEvent, Cleared, RadixTree, Removed, Stored

Block = tuple[str, tuple[int, ...]]
"""A block as the namespace and all tokens up to its end."""


class Consumer:
    """Applies events, and fails where one makes no sense on top of those before it."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.held: dict[int, Block] = {}
        self.events: list[BlockEvent] = []

    def __call__(self, event: BlockEvent) -> bool:
        self.events.append(event)
        if isinstance(event, Cleared):
            self.held.clear()
        elif isinstance(event, Removed):
            for one in event.hashes:
                namespace, tokens = self.held.pop(one)
                longer = [b for n, b in self.held.values() if n == namespace and b[: len(tokens)] == tokens]
                assert not longer, "a block goes before one that continues it"
        else:
            self._store(event)
        return True

    def _store(self, event: Stored) -> None:
        size, tokens = self.block_size, event.tokens.tolist()
        assert event.hashes and len(tokens) == size * len(event.hashes)
        before = () if event.parent is None else self.held[event.parent][1]
        assert event.parent is None or self.held[event.parent][0] == event.namespace
        for index, one in enumerate(event.hashes):
            assert one not in self.held and 0 <= one < 2**64
            before += tuple(tokens[index * size : (index + 1) * size])
            self.held[one] = event.namespace, before

    def check(self, tree: RadixTree) -> None:
        """It believes what is so."""
        assert len({*self.held.values()}) == len(self.held)
        assert {*self.held.values()} == blocks_of(tree, self.block_size)


def blocks_of(tree: RadixTree, size: int) -> set[Block]:
    """The blocks that a tree holds: of each node's computed tokens those at whose end one is whole."""
    found = set()
    for node in tree.nodes():
        tokens = tuple(node.path_tokens().tolist())
        for end in range(node.start + 1, node.start + node.computed + 1):
            if end % size == 0 and "\0" not in node.namespace:
                found.add((node.namespace, tokens[:end]))
    return found
