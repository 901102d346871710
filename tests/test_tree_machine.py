"""Random histories of tree and pool against a naive dictionary of sequences, `check()` after every step."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radixgen.cache import ExtentPool, Lock, RadixTree, first_in, least_recently_used
from radixgen.core import OutOfSlots

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
NAMESPACES = st.sampled_from(["", "other"])


class TreeMachine(RuleBasedStateMachine):
    """Cursors wander over a three-token alphabet in a pool that is nearly always full."""

    @initialize(capacity=st.integers(24, 64), policy=st.sampled_from([least_recently_used, first_in]))
    def begin(self, capacity: int, policy: object) -> None:
        self.tree = RadixTree(ExtentPool(capacity), policy=policy, stamps=True)
        self.held: dict[Lock, tuple[str, list[int]]] = {}
        self.steps: list[int] = []

    @rule(tokens=TOKENS, namespace=NAMESPACES, priority=st.integers(0, 2))
    def insert(self, tokens: list[int], namespace: str, priority: int) -> None:
        match = self.tree.match_prefix(tokens, namespace)
        lock = self.tree.insert(tokens, namespace, priority=priority)
        assert match is None or match.length <= len(tokens)
        self.held[lock] = (namespace, tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=st.integers(0, 2), alone=st.booleans())
    def advance(self, data: st.DataObject, token: int, alone: bool) -> None:
        node = self._pick(data).held
        group = [lock for lock in self.held if lock.node is node]
        for lock in (group := group[:1] if alone else group):
            namespace, tokens = self.held[lock]
            self.held[lock] = (namespace, [*tokens, token])
        self.tree.advance(group, token)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        lock = self._pick(data)
        self.held[self.tree.lock(lock.held)] = self.held[lock]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        lock = self._pick(data)
        del self.held[lock]
        self.tree.unlock(lock)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), chunk=st.integers(1, 12), reserve=st.integers(0, 8), fail=st.booleans())
    def compute(self, data: st.DataObject, chunk: int, reserve: int, fail: bool) -> None:
        """One step: schedule a chunk of a cursor's path from its first token without KV."""
        tree = self.tree
        begun = []
        for node in self._pick(data).held.path():
            count = min(chunk, node.known - node.scheduled)
            if count == 0:
                continue
            wanted = tree.slots_wanted(node, count)
            if wanted > tree.pool.free:
                tree.reclaim_reserves()
                tree.evict(wanted - tree.pool.free)
            before = tree.pool.free
            try:
                slots = tree.schedule(node, count, reserve)
            except OutOfSlots:
                assert wanted > tree.pool.free and before == tree.pool.free
                break
            assert slots.size == count == np.unique(slots).size
            begun.append(node)
            chunk -= count
            if node.scheduled < node.known:
                break
        for node in begun:
            (tree.rollback if fail else tree.commit)(node)

    @rule()
    def begin_step(self) -> None:
        self.steps.append(self.tree.pool.begin_step())

    @precondition(lambda self: self.steps)
    @rule()
    def retire_step(self) -> None:
        self.tree.pool.retire_step(self.steps.pop(0))

    @rule(count=st.integers(1, 20))
    def evict(self, count: int) -> None:
        evictable = self.tree.evictable_tokens
        assert self.tree.evict(count) == min(count, evictable)

    @rule()
    def reset(self) -> None:
        self.tree.reset()
        assert self.tree.evictable_tokens == 0

    @rule(namespace=NAMESPACES)
    def discard(self, namespace: str) -> None:
        self.tree.discard(namespace)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        for lock, (namespace, tokens) in self.held.items():
            node = lock.held
            assert node.namespace == namespace
            assert node.path_tokens().tolist() == tokens
            match = self.tree.match_prefix(tokens, namespace)
            assert match is not None and match.length == len(tokens)
        assert self._locks_below() == {n.id: n.lock_count for n in self.tree.nodes()}

    def _pick(self, data: st.DataObject) -> Lock:
        return data.draw(st.sampled_from(list(self.held)))

    def _locks_below(self) -> dict[int, int]:
        counts = {node.id: 0 for node in self.tree.nodes()}
        for lock in self.held:
            counts[lock.held.id] += 1
        return counts

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for lock in self.held:
            self.tree.unlock(lock)
        self.tree.reset()
        for step in self.steps:
            self.tree.pool.retire_step(step)
        self.tree.check()
        assert self.tree.pool.free == self.tree.pool.capacity
        assert self.tree.num_nodes == 0


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
