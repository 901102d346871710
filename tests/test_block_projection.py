"""What is computed as blocks: random histories of the tree, and a consumer of events that is never wrong."""

from collections import deque

import numpy as np
import pytest
from consumer import Consumer, blocks_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from test_tree_machine import NAMESPACES, TOKENS, TreeMachine

import radixgen.cache.block_projection as module
from radixgen.cache import (
    BlockEvent,
    BlockProjection,
    BlocksAdded,
    BlocksDropped,
    BlocksReset,
    ExtentPool,
    RadixTree,
    first_in,
    least_recently_used,
)

BRANCHES = st.lists(st.integers(0, 11), max_size=3)


class BlockMachine(TreeMachine):
    """The histories of `TreeMachine`, followed by a consumer; some of its events are lost, and it is then told anew."""

    @initialize(
        capacity=st.integers(24, 64),
        policy=st.sampled_from([least_recently_used, first_in]),
        size=st.integers(1, 4),
    )
    def begin(self, capacity: int, policy: object, size: int) -> None:
        super().begin(capacity, policy)
        self.losing = 0
        self.consumer = Consumer(size)
        self.projection = BlockProjection(self.tree, self.hear, size)

    def hear(self, event: BlockEvent) -> bool:
        if self.losing:
            self.losing -= 1
            return False
        return self.consumer(event)

    @precondition(lambda self: not self.in_flight)
    @rule(tokens=TOKENS, namespace=NAMESPACES, branches=BRANCHES, fail=st.booleans(), stay=st.booleans())
    def serve(self, tokens: list[int], namespace: str, branches: list[int], fail: bool, stay: bool) -> None:
        """A prompt is computed, in flight others that part from it come and split it; then it stays cached."""
        lock = self.tree.insert(tokens, namespace)
        self.in_flight = self._schedule(lock.held, 100, 0)
        locks = [self.tree.insert([*tokens[:length], 0], namespace) for length in branches]
        self.retire(fail)
        for one in locks if stay else [*locks, lock]:
            self.tree.unlock(one)
        if stay:
            self.held[lock] = (namespace, tokens)

    @precondition(lambda self: self.tree.evictable_tokens)
    @rule(count=st.integers(1, 4))
    def evict_some(self, count: int) -> None:
        self.tree.evict(count)

    @rule(count=st.integers(1, 2))
    def lose(self, count: int) -> None:
        self.losing = count

    @rule()
    def listen_anew(self) -> None:
        self.projection.close()
        assert not any(node.block_hashes for node in self.tree.nodes())
        self.losing = 0
        self.projection = BlockProjection(self.tree, self.hear, self.projection.block_size)

    @invariant()
    def believes_what_is_so(self) -> None:
        if not hasattr(self, "projection"):
            return
        self.projection.check()
        assert len(self.projection) == len(blocks_of(self.tree, self.projection.block_size))
        if not self.projection._overflowed:
            self.consumer.check(self.tree)


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def tree_of(*prompts: list[int], namespace: str = "") -> RadixTree:
    tree = RadixTree(ExtentPool(256))
    for prompt in prompts:
        add(tree, prompt, namespace)
    return tree


def add(tree: RadixTree, prompt: list[int], namespace: str = "") -> None:
    """Compute a prompt, and leave it cached."""
    lock = tree.insert(prompt, namespace)
    for node in lock.held.path():
        if node.scheduled < node.known:
            tree.schedule(node, node.known - node.scheduled)
            tree.commit(node)
    tree.unlock(lock)


def events_of(tree: RadixTree, size: int = 4) -> list[BlockEvent]:
    events: list[BlockEvent] = []
    BlockProjection(tree, lambda event: events.append(event) is None, size)
    return events


def test_a_long_prompt_is_one_event_and_its_end_another() -> None:
    tree = RadixTree(ExtentPool(256))
    events = events_of(tree)
    assert events == [BlocksReset()]
    add(tree, [*range(11)])
    stored = events[1]
    assert isinstance(stored, BlocksAdded) and len(events) == 2
    assert (stored.parent, stored.tokens.tolist(), stored.namespace) == (None, [*range(8)], "")
    add(tree, [*range(13)])
    more = events[2]
    assert isinstance(more, BlocksAdded) and more.parent == stored.hashes[-1]
    assert more.tokens.tolist() == [8, 9, 10, 11], "it begins in the node before"
    tree.evict(2)
    assert events[3:] == [BlocksDropped(more.hashes)]
    tree.reset()
    assert events[4:] == [BlocksDropped(stored.hashes[::-1]), BlocksReset()]


def test_a_split_tells_nothing_and_branches_inside_a_block_are_two() -> None:
    tree = tree_of([*range(8)])
    events = events_of(tree)
    add(tree, [0, 1, 2, 3, 4, 5])
    assert len(events) == 2, "a split emits nothing"
    add(tree, [0, 1, 2, 3, 4, 5, 9, 9])
    first, second = events[1:]
    assert isinstance(first, BlocksAdded) and isinstance(second, BlocksAdded)
    assert second.parent == first.hashes[0] and second.tokens.tolist() == [4, 5, 9, 9]
    assert second.hashes[0] not in first.hashes


def test_hashes_are_stable_and_name_everything_before_the_block() -> None:
    """The literals are what other versions and other workers have for the same blocks."""
    (_, stored) = events_of(tree_of([*range(8)]))
    assert isinstance(stored, BlocksAdded)
    assert stored.hashes == HASHES
    others = [
        events_of(tree_of([*range(8)], namespace="tenant"))[1],
        events_of(tree_of([1, *range(1, 8)]))[1],
        events_of(tree_of([*range(8)]), size=2)[1],
    ]
    for other in others:
        assert isinstance(other, BlocksAdded) and not {*other.hashes} & {*stored.hashes}


HASHES = [10764068877120707867, 5638208025446514785]


def test_a_namespace_of_one_sequence_is_nobody_elses_business() -> None:
    tree = tree_of([*range(8)], namespace="\0007.0")
    assert events_of(tree) == [BlocksReset()]
    tree.reset()


def test_what_was_lost_is_told_anew_at_the_next_change() -> None:
    room: deque[BlockEvent] = deque(maxlen=8)
    full = [False]

    def emit(event: BlockEvent) -> bool:
        if not full[0]:
            room.append(event)
        return not full[0]

    tree = RadixTree(ExtentPool(256))
    projection = BlockProjection(tree, emit, 4)
    full[0] = True
    add(tree, [*range(8)])
    full[0] = False
    assert [*room] == [BlocksReset()]
    add(tree, [7])
    assert isinstance(room[1], BlocksReset) and isinstance(room[2], BlocksAdded) and len(room[2].hashes) == 2
    projection.check()


def test_blocks_whose_hashes_collide_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda data: digest(data) % 8)
    tree, held = RadixTree(ExtentPool(512)), set[int]()

    def emit(event: BlockEvent) -> bool:
        if isinstance(event, BlocksAdded):
            assert not held & {*event.hashes}
            held.update(event.hashes)
        elif isinstance(event, BlocksDropped):
            assert held >= {*event.hashes}
            held.difference_update(event.hashes)
        else:
            held.clear()
        return True

    projection = BlockProjection(tree, emit, 2)
    random = np.random.default_rng(0)
    for _ in range(300):
        add(tree, random.integers(0, 3, 12).tolist())
        tree.evict(int(random.integers(0, 24)))
        projection.check()
        assert held == {one for node in tree.nodes() for one in node.block_hashes}
    assert sum(projection._held.values()) > len(projection)
