"""Bugs of the tree and of plans over it, each pinned by the history that showed it."""

import numpy as np
import pytest

from radixgen.cache import ExtentPool, Lock, Node, RadixTree, boundary, first_in
from radixgen.core import Plan
from radixgen.scheduler.planner import Planner


def compute(tree: RadixTree, node: Node, reserve: int = 0) -> None:
    tree.schedule(node, node.known - node.scheduled, reserve)
    tree.commit(node)


def plan(planner: Planner, lock: Lock) -> Plan:
    """The plan of one row, the last token under `lock`."""
    node = lock.held
    rows = np.array([node.id], np.int32), np.array([node.end - 1], np.int32)
    return planner.plan(*rows, node.slots(node.known - 1, node.known))


def slots_read(step: Plan) -> list[int]:
    ranges = zip(step.segment_starts.tolist(), step.segment_lengths.tolist(), strict=True)
    return [slot for start, length in ranges for slot in range(start, start + length)]


def test_a_leaf_that_grows_into_its_second_reserved_extent_is_planned_anew() -> None:
    """The carried plan lengthened the full extent by one and read a stranger's slot."""
    tree = RadixTree(ExtentPool(12))
    held = [tree.insert([number]) for number in range(12)]
    for lock in held:
        compute(tree, lock.held)
    for lock in (held[2], held[3], held[6], held[7]):
        tree.unlock(lock)
    tree.reset()
    assert len(tree.pool.free_extents()) == 2
    lock = tree.insert([20])
    compute(tree, lock.held, reserve=3)
    assert len(lock.held.extents) == 2
    planner = Planner(tree)
    for token in range(4):
        step = plan(planner, lock)
        assert slots_read(step) == lock.held.slots(0, lock.held.known).tolist()
        if token < 3:
            tree.advance([lock], token)
            compute(tree, lock.held)
    tree.check()


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("leave", [False, True])
def test_a_node_split_while_its_step_is_in_flight(fail: bool, leave: bool) -> None:
    """The upper part was neither committed nor rolled back, since the step named only the lower one."""
    tree = RadixTree(ExtentPool(16), stamps=True)
    lock = tree.insert([1, 2, 3, 4, 5, 6])
    node = lock.held
    compute(tree, tree.split(node, 1))
    tree.schedule(node, 4)
    other = tree.insert([1, 2, 3, 9])
    if leave:
        tree.unlock(lock)
    (tree.rollback if fail else tree.commit)(node)
    tree.check()
    match = tree.match_prefix([1, 2, 3, 4, 5, 6])
    assert match is not None
    assert match.computed == (1 if fail else 3 if leave else 5)
    parent = other.held.parent
    assert parent is not None and parent.scheduled == parent.computed == (0 if fail else 2)


def test_rollback_of_a_node_that_left_the_tree_in_flight_leaves_its_successor_alone() -> None:
    """It wrote the dead node's columns over those of the node that had taken its id."""
    tree = RadixTree(ExtentPool(8))
    keep = tree.insert([5])
    lock = tree.insert([1, 2])
    node = lock.held
    tree.schedule(node, 2)
    tree.unlock(lock)
    successor = tree.insert([5, 6, 7])
    assert successor.held.id == node.id
    compute(tree, keep.held)
    compute(tree, successor.held)
    tree.rollback(node)
    tree.check()


def test_a_new_leaf_has_its_own_priority() -> None:
    """It took its parent's where that was higher: a low priority under a shared prefix had no effect."""
    tree = RadixTree(ExtentPool(16))
    for tokens, priority in (([1, 1], 2), ([1, 2], 0), ([1, 3], -1), ([1, 4], 1)):
        lock = tree.insert(tokens, priority=priority)
        for node in lock.held.path():
            if node.scheduled < node.known:
                compute(tree, node)
        tree.unlock(lock)
    gone = []
    for _ in range(4):
        tree.evict(1)
        gone.append(next(t for t in (1, 2, 3, 4) if t not in gone and _computed(tree, [1, t]) < 2))
    assert gone == [3, 2, 4, 1]


def _computed(tree: RadixTree, tokens: list[int]) -> int:
    match = tree.match_prefix(tokens)
    return match.computed if match else 0


def test_a_split_leaves_the_age_of_the_first_tokens() -> None:
    """The upper part of a split counted as new, so `first_in` kept it longer than younger nodes."""
    tree = RadixTree(ExtentPool(16), policy=first_in)
    for tokens in ([1, 2, 3], [5, 6]):
        lock = tree.insert(tokens)
        compute(tree, lock.held)
        tree.unlock(lock)
    tree.unlock(tree.insert([1, 2]))
    tree.evict(3)
    assert _computed(tree, [1, 2]) == 0
    assert _computed(tree, [5, 6]) == 2


def test_a_shifted_boundary_leaves_no_reserve_behind_a_branch() -> None:
    """Pins that a node which failed to compute, and then gave its first token away, keeps no slot too many."""
    tree = RadixTree(ExtentPool(16), stamps=True)
    tree.insert([1, 2, 3, 4, 5])
    tree.insert([1, 2, 3, 4, 6])
    above = tree.insert([1])
    for node in above.held.path()[1:]:
        tree.schedule(node, node.known)
        tree.commit(node)
    branch = above.held.children[2]
    tree.schedule(branch, 3)
    tree.rollback(branch)
    assert branch.reserved == 3 and len(branch.children) == 2
    assert tree.advance([above], 2) is above.held
    assert branch.known == 2
    tree.check()


def test_an_only_child_is_followed_to_its_end_on_one_node() -> None:
    """Its plan is carried over as that of a leaf that grows."""
    tree = RadixTree(ExtentPool(32), stamps=True)
    lock = tree.insert([1, 2, 3, 4, 5, 6])
    compute(tree, lock.held)
    tree.unlock(lock)
    lock = tree.insert([1, 2])
    node, planner = lock.held, Planner(tree)
    plan(planner, lock)
    for token in (3, 4, 5, 6):
        assert node.next_cached_slot == node.extents[-1].end
        assert tree.advance([lock], token) is node
        version = tree.version
        step = plan(planner, lock)
        assert slots_read(step) == node.slots(0, token).tolist() and step.slack == 6 - token
        assert (step.age > 0) == (token > 3) and tree.version == version
        tree.check()
    assert tree.num_nodes == 2 and not node.children and node.next_cached_slot == -1
    tree.advance([lock], 7)
    compute(tree, node)
    tree.check()


def passed_up(part: int, others: list[list[int]]) -> list[object]:
    """What a tree says after five tokens of eight were followed, the first `part` of them in one run of slots."""
    tree = RadixTree(ExtentPool(64), stamps=True)
    lock = tree.insert([1, 2, 3, 4, 5, 6, 7, 8])
    tree.schedule(lock.held, part)
    compute(tree, tree.insert([1], "another").held)  # takes the slot behind
    if part < 8:
        tree.schedule(lock.held, 8 - part)
    tree.commit(lock.held)
    for one in others:
        for node in tree.insert(one).held.path()[1:]:
            if not node.complete:
                compute(tree, node)
    follower, cursor = tree.follow(np.array([1, 2, 3, 4], np.int32)), tree.insert([1])
    tree.unlock(lock)
    for token in (2, 3, 4, 5, 6):
        assert tree.advance([cursor], token) is cursor.held
    tree.check()
    columns, nodes = tree.columns, list(tree.nodes())
    named = (columns.following, columns.changed)
    return [
        [(n.id, n.extents, n.tokens.tolist(), n.start, n.scheduled, n.computed, n.capacity) for n in nodes],
        [[int(column[node.id]) for column in named] for node in nodes],
        (tree.evictable_tokens, tree.version, follower.length, follower.node is cursor.held),
    ]


@pytest.mark.parametrize(
    "others", [[], [[1, 2, 3, 4, 5, 6, 7, 8, 9]], [[1, 2, 3, 4, 5, 6, 70], [1, 2, 3, 4, 5, 6, 80]]]
)
@pytest.mark.parametrize("part", [2, 5, 8])
def test_tokens_pass_up_alike_in_both_ways(monkeypatch: pytest.MonkeyPatch, others: list[list[int]], part: int) -> None:
    pass_up, passed = boundary.pass_up, []

    def noted(tree: RadixTree, node: Node, child: Node) -> bool:
        passed.append(pass_up(tree, node, child))
        return passed[-1]

    monkeypatch.setattr(boundary, "pass_up", noted)
    quickly = passed_up(part, others)
    assert any(passed)
    monkeypatch.setattr(boundary, "pass_up", lambda *_: False)
    assert passed_up(part, others) == quickly


def test_an_only_child_that_is_held_or_branches_is_not_taken_apart() -> None:
    for others in ([[1, 2, 3]], [[1, 2, 3, 4], [1, 2, 3, 5]]):
        tree = RadixTree(ExtentPool(32), stamps=True)
        held = [tree.insert(tokens) for tokens in others]
        for one in held:
            for node in one.held.path()[1:]:
                if not node.complete:
                    compute(tree, node)
        lock = tree.insert([1, 2])
        above = lock.held
        assert tree.advance([lock], 3) is not above and above.children
        tree.check()


def test_order_survives_the_sweep_of_stale_entries() -> None:
    """Leaves that were used again and again leave dead entries behind; who goes first must not change."""
    tree = RadixTree(ExtentPool(32))
    for token in range(16):
        lock = tree.insert([token, token])
        compute(tree, lock.held)
        tree.unlock(lock)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 12)).tolist()
    for token in order:
        tree.unlock(tree.insert([token, token]))
    last_use = sorted(range(16), key=lambda token: len(order) - order[::-1].index(token))
    for gone in range(16):
        tree.evict(2)
        assert [t for t in range(16) if _computed(tree, [t, t])] == sorted(last_use[gone + 1 :])


def test_what_is_evicted_is_counted_and_what_is_locked_is_not_evictable() -> None:
    tree = RadixTree(ExtentPool(32))
    lock = tree.insert([1, 2, 3, 4])
    compute(tree, lock.held)
    assert tree.match_prefix([1, 2, 3, 9]).evictable == 0
    tree.unlock(lock)
    assert tree.match_prefix([1, 2, 3, 9]).evictable == 3
    assert tree.evict(3) == 3 and tree.evict(3) == 1 and tree.evicted_tokens == 4


def test_eviction_over_several_leaves_takes_no_more_than_asked() -> None:
    tree = RadixTree(ExtentPool(32))
    for token in range(3):
        lock = tree.insert([token] * 4)
        compute(tree, lock.held)
        tree.unlock(lock)
    assert tree.evict(5) == 5 and tree.evictable_tokens == 7
