"""Random histories of tree and pool against a naive dictionary of sequences, `check()` after every step."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radixgen.cache import (
    ExtentPool,
    FollowedMatch,
    Lock,
    Node,
    RadixTree,
    RunIndex,
    first_in,
    least_recently_used,
    marked,
)
from radixgen.core import OutOfSlots
from radixgen.scheduler.planner import Planner

TOKEN = st.sampled_from([0, 1, 2, marked(1, 7)])
TOKENS = st.lists(TOKEN, min_size=1, max_size=12)
NAMESPACES = st.sampled_from(["", "other"])


class TreeMachine(RuleBasedStateMachine):
    """Cursors wander over an alphabet of three tokens and a marked one, in a pool that is nearly always full."""

    @initialize(capacity=st.integers(24, 64), policy=st.sampled_from([least_recently_used, first_in]))
    def begin(self, capacity: int, policy: object) -> None:
        self.tree = RadixTree(ExtentPool(capacity), policy=policy, stamps=True)
        self.held: dict[Lock, tuple[str, list[int]]] = {}
        self.planner = Planner(self.tree)
        self.runs = RunIndex(self.tree, 5)
        self.steps: list[int] = []
        self.in_flight: list[Node] = []
        self.followed: list[FollowedMatch] = []

    @rule(tokens=TOKENS, namespace=NAMESPACES, priority=st.integers(0, 2))
    def insert(self, tokens: list[int], namespace: str, priority: int) -> None:
        match = self.tree.match_prefix(tokens, namespace)
        lock = self.tree.insert(tokens, namespace, priority=priority)
        assert match is None or match.length <= len(tokens)
        self.held[lock] = (namespace, tokens)

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def follow(self, tokens: list[int], namespace: str) -> None:
        """From here on `RadixTree.check` compares the match with a fresh one."""
        self.followed.append(self.tree.follow(np.array(tokens, np.int32), namespace))

    @precondition(lambda self: self.followed)
    @rule(enter=st.booleans())
    def unfollow(self, enter: bool) -> None:
        """The oldest is let go of, after its tokens have entered the tree or without."""
        one = self.followed.pop(0)
        if enter:
            lock = self.tree.insert(one.tokens, one.namespace, followed=one)
            assert one.match() == self.tree.match_prefix(one.tokens, one.namespace)
            assert one.length == one.tokens.size
            self.held[lock] = (one.namespace, one.tokens.tolist())
        self.tree.unfollow(one)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), token=TOKEN, alone=st.booleans())
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

    @precondition(lambda self: self.held and not self.in_flight)
    @rule(data=st.data(), chunk=st.integers(1, 12), reserve=st.integers(0, 8), fail=st.booleans(), hold=st.booleans())
    def compute(self, data: st.DataObject, chunk: int, reserve: int, fail: bool, hold: bool) -> None:
        """One step: schedule a chunk of a cursor's path from its first token without KV."""
        self.in_flight = self._schedule(self._pick(data).held, chunk, reserve)
        if not hold:
            self.retire(fail)

    @precondition(lambda self: self.in_flight)
    @rule(fail=st.booleans())
    def retire(self, fail: bool) -> None:
        """The step in flight ends; its nodes may have been split, cut or removed meanwhile."""
        for node in reversed(self.in_flight) if fail else self.in_flight:
            (self.tree.rollback if fail else self.tree.commit)(node)
        self.in_flight = []

    @precondition(lambda self: self.held and not self.in_flight)
    @rule(token=TOKEN, reserve=st.integers(0, 8), steps=st.integers(1, 4))
    def decode(self, token: int, reserve: int, steps: int) -> None:
        """Every cursor moves on by one token and is computed; each row's plan must read its own path."""
        for _ in range(steps):
            groups: dict[Node, list[Lock]] = {}
            for lock in self.held:
                groups.setdefault(lock.held, []).append(lock)
            for group in groups.values():
                for lock in group:
                    namespace, tokens = self.held[lock]
                    self.held[lock] = (namespace, [*tokens, token])
                self.tree.advance(group, token)
            for lock in self.held:
                for node in self._schedule(lock.held, 100, reserve):
                    self.tree.commit(node)
            self._check_plan()

    def _check_plan(self) -> None:
        ready = {lock.held.id: lock.held for lock in self.held if lock.held.complete and lock.held.known}
        if not ready:
            return
        ends = [node.end - 1 for node in ready.values()]
        slots = np.concatenate([node.slots(node.known - 1, node.known) for node in ready.values()])
        plan = self.planner.plan(np.array(list(ready), np.int32), np.array(ends, np.int32), slots)
        nodes = list(ready.values())
        read: list[list[int]] = [[] for _ in ready]
        for (first, stop), (low, high) in zip(plan.unit_rows.tolist(), plan.unit_segments.tolist(), strict=True):
            for row in range(first, stop):
                for start, length in zip(plan.segment_starts[low:high], plan.segment_lengths[low:high], strict=True):
                    read[plan.row_order[row]] += range(int(start), int(start + length))
        for node, slots in zip(nodes, read, strict=True):
            own = [slot for part in node.path() for slot in part.slots(0, part.known).tolist()]
            assert sorted(slots) == sorted(own)

    def _schedule(self, leaf: Node, chunk: int, reserve: int) -> list[Node]:
        """Schedule up to `chunk` tokens of a path from its first without a slot. Returns the nodes."""
        tree = self.tree
        begun = []
        for node in leaf.path():
            count = min(chunk, node.known - node.scheduled)
            if count == 0:
                continue
            wanted = tree.slots_wanted(node, count)
            if wanted > tree.pool.free:
                tree.reclaim_reserves(tree.reserved_tokens)
                wanted = tree.slots_wanted(node, count)
                tree.evict(max(0, wanted - tree.pool.free))
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
        return begun

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

    @rule()
    def index_runs(self) -> None:
        self.runs.check()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "tree"):
            return
        self.tree.check()
        assert set(self.tree.followed()) == set(self.followed)
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
        self.retire(fail=False)
        for one in self.followed:
            self.tree.unfollow(one)
        for lock in self.held:
            self.tree.unlock(lock)
        self.tree.reset()
        for step in self.steps:
            self.tree.pool.retire_step(step)
        self.tree.check()
        assert self.tree.pool.free == self.tree.pool.capacity
        assert self.tree.num_nodes == 0
        self.runs.check()
        assert not (self.runs._places or self.runs._hashes or self.runs._exact_ends)


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
