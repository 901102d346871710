"""A router's side of cache events: what it believes to be held, and what a tree really holds, each in plain tokens."""

from typing import Any

import msgspec
import zmq

from radixgen.cache import BlockEvent, BlocksAdded, BlocksDropped, BlocksReset, RadixTree, as_tokens
from radixgen.serve.zmq.kv_events import KVEvents

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
        if isinstance(event, BlocksReset):
            self.held.clear()
        elif isinstance(event, BlocksDropped):
            for one in event.hashes:
                namespace, tokens = self.held.pop(one)
                longer = [b for n, b in self.held.values() if n == namespace and b[: len(tokens)] == tokens]
                assert not longer, "a block goes before one that continues it"
        else:
            self._store(event)
        return True

    def _store(self, event: BlocksAdded) -> None:
        size, tokens = self.block_size, event.tokens.tolist()
        assert event.hashes and len(tokens) == size * len(event.hashes)
        before = () if event.parent is None else self.held[event.parent][1]
        namespace = event.namespace if event.parent is None else self.held[event.parent][0]
        assert namespace == event.namespace or not event.namespace
        for index, one in enumerate(event.hashes):
            assert one not in self.held and 0 <= one < 2**64
            before += tuple(tokens[index * size : (index + 1) * size])
            self.held[one] = namespace, before

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
            if end % size == 0 and "\0" not in node.namespace and min(tokens[:end]) >= 0:
                found.add((node.namespace, tokens[:end]))
    return found


class Router:
    """Subscribes to an engine's events, and asks for what it missed. Batches in `deaf_to` never reach it."""

    def __init__(self, events: KVEvents, deaf_to: tuple[int, ...] = ()) -> None:
        self.consumer = Consumer(events.config.block_size)
        self.deaf_to = deaf_to
        self.next = 0
        self.replays = 0
        self._topic = events.config.topic.encode()
        self._sub = zmq.Context.instance().socket(zmq.SUB)
        self._sub.connect(events.endpoint)
        self._sub.subscribe(self._topic)
        self._replay = zmq.Context.instance().socket(zmq.DEALER)
        self._replay.connect(str(events.replay_endpoint))

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *error: object) -> None:
        self._sub.close(linger=0)
        self._replay.close(linger=0)

    def follow(self, tree: RadixTree) -> None:
        """Until it knows what the tree holds."""
        for _ in range(200):
            if {*self.consumer.held.values()} == blocks_of(tree, self.consumer.block_size):
                return
            if self._sub.poll(50):
                self._hear(*self._sub.recv_multipart())
            else:
                self.ask(self.next)  # the last batches may be what it missed
        self.consumer.check(tree)

    def ask(self, start: int) -> int:
        """A replay. Returns of how many batches it was."""
        self.replays += 1
        self._replay.send_multipart([b"", start.to_bytes(8, "big", signed=start < 0)])
        count = 0
        while True:
            assert self._replay.poll(10_000), "a replay did not end"
            empty, topic, sequence, payload = self._replay.recv_multipart()
            if not payload:
                assert (empty, topic, int.from_bytes(sequence, "big", signed=True)) == (b"", b"", -1)
                return count
            count += 1
            assert (empty, topic) == (b"", self._topic)
            number, events = int.from_bytes(sequence, "big"), wire_events(payload)
            if number >= self.next or isinstance(events[0], BlocksReset):
                self._apply(number, events)

    def _hear(self, topic: bytes, sequence: bytes, payload: bytes) -> None:
        number = int.from_bytes(sequence, "big")
        assert topic == self._topic
        if number in self.deaf_to or number < self.next:
            return
        if number > self.next:
            self.ask(self.next)
        if number == self.next:
            self._apply(number, wire_events(payload))

    def _apply(self, number: int, events: list[BlockEvent]) -> None:
        assert number == self.next or isinstance(events[0], BlocksReset), "a gap"
        for event in events:
            self.consumer(event)
        self.next = number + 1


def wire_events(payload: bytes) -> list[BlockEvent]:
    """The events of a batch, as maps or as arrays."""
    _, events, rank = msgspec.msgpack.decode(payload)
    assert rank == 0
    return [_event(list(event.values()) if isinstance(event, dict) else event) for event in events]


def _event(fields: list[Any]) -> BlockEvent:
    kind, *values = fields
    if kind == "AllBlocksCleared":
        return BlocksReset()
    if kind == "BlockRemoved":
        return BlocksDropped(values[0])
    assert kind == "BlockStored"
    hashes, parent, tokens, size, _, _, _, *extra = values
    assert len(tokens) == size * len(hashes)
    # A namespace is told with the first block of a path alone.
    return BlocksAdded(hashes, parent, as_tokens(tokens), extra[0][0][0] if extra else "")
