"""Where and why sharing ended: told by the tree, by a naive set of prefixes, and by the engine's outputs."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from oracle import StampModel
from test_tree_machine import NAMESPACES, TOKENS, TreeMachine

from radixgen import AsyncEngine, Engine, RequestOutput, SamplingParams, SharingEnd
from radixgen.cache import ExtentPool, RadixTree, RecentEvictions, sharing_end, token_ids
from radixgen.core import PromptTokens, merge_outputs

SYSTEM = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def asked(tree: RadixTree, tokens: list[int], namespace: str = "") -> SharingEnd | None:
    return sharing_end(tree, np.array(tokens, np.int32), namespace, tree.match_prefix(tokens, namespace))


def shown(tokens: Sequence[int]) -> tuple[int, ...]:
    """Tokens as outputs have them, without marks."""
    return tuple(token_ids(np.array(tokens, np.int32)).tolist())


def cached(tree: RadixTree, tokens: list[int], namespace: str = "") -> None:
    """Compute `tokens` and leave them."""
    lock = tree.insert(tokens, namespace)
    for node in lock.held.path():
        if node.scheduled < node.known:
            tree.schedule(node, node.known - node.scheduled)
            tree.commit(node)
    tree.unlock(lock)


def test_nothing_is_known_or_all_is() -> None:
    tree = RadixTree(ExtentPool(64))
    assert asked(tree, [1, 2]) == SharingEnd("cold", 0, (1, 2))
    cached(tree, SYSTEM)
    assert asked(tree, SYSTEM) is None and asked(tree, SYSTEM[:3]) is None
    assert asked(tree, [*SYSTEM, *range(30, 40)]) == SharingEnd("cold", 10, tuple(range(30, 38)))


def test_diverged_shows_what_is_in_use_or_was_used_last() -> None:
    tree = RadixTree(ExtentPool(64))
    cached(tree, [*SYSTEM, 20, 21])
    assert asked(tree, [*SYSTEM[:4], 30]) == SharingEnd("diverged", 4, (30,), (5, 6, 7, 8, 9, 10, 20, 21))
    cached(tree, [*SYSTEM, 22, 23])
    assert asked(tree, [*SYSTEM, 30]) == SharingEnd("diverged", 10, (30,), (22, 23))
    lock = tree.insert([*SYSTEM, 20, 21])
    assert asked(tree, [*SYSTEM, 30]) == SharingEnd("diverged", 10, (30,), (20, 21))
    tree.unlock(lock)


def test_evicted_at_its_end_whole_and_with_its_root() -> None:
    tree = RadixTree(ExtentPool(64))
    cached(tree, SYSTEM)
    tree.evict(3)
    assert asked(tree, SYSTEM) == SharingEnd("evicted", 7, (8, 9, 10))
    assert asked(tree, [*SYSTEM[:7], 30]) == SharingEnd("cold", 7, (30,))
    tree.reset()
    assert tree.num_nodes == 0
    assert asked(tree, SYSTEM) == SharingEnd("evicted", 0, tuple(SYSTEM[:8]))
    assert asked(tree, SYSTEM, "other") == SharingEnd("cold", 0, tuple(SYSTEM[:8]))
    cached(tree, SYSTEM)
    assert asked(tree, [*SYSTEM, 11]) == SharingEnd("cold", 10, (11,))


def test_evicted_below_a_branch_goes_before_diverged() -> None:
    tree = RadixTree(ExtentPool(64))
    cached(tree, [*SYSTEM, 20])
    keep = tree.insert([*SYSTEM, 21])
    tree.evict(1)
    assert asked(tree, [*SYSTEM, 20]) == SharingEnd("evicted", 10, (20,))
    assert asked(tree, [*SYSTEM, 22]) == SharingEnd("diverged", 10, (22,), (21,))
    tree.unlock(keep)


def test_an_end_that_was_cut_and_grew_otherwise_forgets() -> None:
    """Ends named by node and position alone called another prefix's continuation evicted."""
    tree = RadixTree(ExtentPool(64))
    cached(tree, [1, 2, 3, 4])
    tree.evict(1)
    lock = tree.insert([1, 2, 3])
    assert asked(tree, [1, 2, 3, 4]) == SharingEnd("evicted", 3, (4,))
    tree.unlock(lock)
    tree.evict(1)
    lock = tree.insert([1, 2])
    tree.advance([lock], 9)
    assert lock.held.path_tokens().tolist() == [1, 2, 9] and lock.held.parent is tree.root()
    assert asked(tree, [1, 2, 9, 4]) == SharingEnd("cold", 3, (4,))
    tree.unlock(lock)


def test_another_namespace_has_it() -> None:
    tree = RadixTree(ExtentPool(64))
    cached(tree, SYSTEM, "a")
    assert asked(tree, SYSTEM, "b") == SharingEnd("namespace", 0, tuple(SYSTEM[:8]))
    assert asked(tree, SYSTEM[:2], "b") == SharingEnd("namespace", 0, (1, 2))
    assert asked(tree, [*SYSTEM[:7], 30], "b") == SharingEnd("cold", 0, (*SYSTEM[:7], 30))
    cached(tree, [7], "b")
    assert asked(tree, SYSTEM, "b") == SharingEnd("namespace", 0, tuple(SYSTEM[:8]))
    assert asked(tree, [30], "b") == SharingEnd("diverged", 0, (30,), (7,))


def test_a_namespace_that_was_discarded_was_not_evicted() -> None:
    tree = RadixTree(ExtentPool(64))
    cached(tree, SYSTEM, "a")
    tree.discard("a")
    assert asked(tree, SYSTEM, "a") == SharingEnd("cold", 0, tuple(SYSTEM[:8]))


def test_of_many_evictions_the_latest_stay() -> None:
    evictions = RecentEvictions(capacity=3)
    for token in (1, 2, 3, 1, 4):
        evictions.add((5, 6), token)
    assert len(evictions) == 3
    assert [((5, 6), token) in evictions for token in (1, 2, 3, 4)] == [True, False, True, True]


class SharingMachine(TreeMachine):
    """The same histories, asked about: the answers follow from the sets of prefixes known now and evicted ever."""

    @initialize(capacity=st.integers(24, 64), policy=st.none())
    def begin(self, capacity: int, policy: None) -> None:
        super().begin(capacity, lambda node: (node.priority, node.last_used))
        self.evicted: set[tuple[str, tuple[int, ...]]] = set()
        evict = self.tree.evict

        def watched(count: int) -> int:
            before = self.known()
            dropped = evict(count)
            self.last = before - self.known()
            self.evicted |= self.last
            return dropped

        self.tree.evict = watched

    def known(self) -> set[tuple[str, tuple[int, ...]]]:
        prefixes = set()
        for node in self.tree.nodes():
            path = tuple(node.path_tokens().tolist())
            prefixes |= {(node.namespace, path[:end]) for end in range(node.start + 1, node.end + 1)}
        return prefixes

    @rule(count=st.integers(1, 20), ask=st.data())
    def evict_and_ask(self, count: int, ask: st.DataObject) -> None:
        """What has just been evicted is said to be."""
        self.last: set[tuple[str, tuple[int, ...]]] = set()
        self.tree.evict(count)
        assume(self.last)
        namespace, tokens = ask.draw(st.sampled_from(sorted(self.last)))
        end = asked(self.tree, list(tokens), namespace)
        assert end is not None and end.reason == "evicted"

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def ask(self, tokens: list[int], namespace: str) -> None:
        known, end = self.known(), asked(self.tree, tokens, namespace)
        position = max(n for n in range(len(tokens) + 1) if not n or (namespace, tuple(tokens[:n])) in known)
        if end is None:
            assert position == len(tokens)
            return
        assert end.position == position and end.prompt_tokens == shown(tokens[position : position + 8])
        head = (*tokens[:position], *end.cached_tokens)
        goes_on = {path for name, path in known if name == namespace and path[:position] == head[:position]}
        elsewhere = any(name != namespace and path == tuple(tokens[:8]) for name, path in known)
        if end.reason == "evicted":
            assert (namespace, tuple(tokens[: position + 1])) in self.evicted
        elif position == 0 and elsewhere:
            assert end.reason == "namespace"
        elif any(len(path) > position for path in goes_on):
            meant = {path for path in goes_on if (*path[:position], *shown(path[position:])) == head}
            assert end.reason == "diverged" and meant
            assert len(end.cached_tokens) == 8 or meant - {path[:-1] for path in goes_on}
        else:
            assert end.reason == "cold"
        assert bool(end.cached_tokens) == (end.reason == "diverged")

    @rule(tokens=TOKENS, namespace=NAMESPACES)
    def ask_what_is_held(self, tokens: list[int], namespace: str) -> None:
        match = self.tree.match_prefix(tokens, namespace)
        held = [own for name, own in self.held.values() if name == namespace]
        shared = max(n for n in range(len(tokens) + 1) if not n or any(own[:n] == tokens[:n] for own in held))
        assert (match.length - match.evictable if match else 0) == shared


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- the engine ------------------------------------------------------------------------------------------------

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def engine(slots: int = 64, share: bool = True) -> Engine:
    return Engine(StampModel(50, 64, frozenset()), kv_tokens=slots, share=share, debug=True)


def run(served: Engine) -> dict[str, RequestOutput]:
    found: dict[str, RequestOutput] = {}
    while served.has_unfinished:
        found |= {output.request_id: output for output in served.step()}
        served.check()
    return found


def test_a_burst_shares_what_is_not_computed_yet() -> None:
    with engine() as served:
        names = [served.submit([*SYSTEM, last], ONE) for last in (20, 21, 20)]
        found = run(served)
        first, second, third = (found[name] for name in names)
        assert (first.num_shared_tokens, first.sharing_ended) == (0, SharingEnd("cold", 0, tuple(SYSTEM[:8])))
        assert (second.num_cached_tokens, second.num_shared_tokens) == (0, 10)
        assert second.sharing_ended == SharingEnd("diverged", 10, (21,), (20,))
        assert (third.num_cached_tokens, third.num_shared_tokens, third.sharing_ended) == (0, 11, None)
        (fourth,) = served.generate([[*SYSTEM, 22]], ONE)
        assert (fourth.num_cached_tokens, fourth.num_shared_tokens) == (10, 0)
        assert served.stats().sharing_ended == {"cold": 1, "evicted": 0, "namespace": 0, "diverged": 2}


def test_pins_are_shared_with() -> None:
    with engine() as served:
        served.generate([SYSTEM], ONE)
        served.pin(SYSTEM[:6])
        (output,) = served.generate([[*SYSTEM, 20]], ONE)
        assert (output.num_cached_tokens, output.num_shared_tokens) == (10, 6)


def test_evicted_and_namespace_in_outputs() -> None:
    with engine() as served:
        served.generate([SYSTEM], ONE)
        served.reset_prefix_cache()
        (output,) = served.generate([SYSTEM], ONE)
        assert output.sharing_ended == SharingEnd("evicted", 0, tuple(SYSTEM[:8]))
        name = served.submit(SYSTEM, ONE, namespace="other")
        assert run(served)[name].sharing_ended == SharingEnd("namespace", 0, tuple(SYSTEM[:8]))


def test_with_sharing_off_each_has_a_namespace_of_its_own() -> None:
    with engine(share=False) as served:
        names = [served.submit(SYSTEM, ONE) for _ in range(2)]
        found = run(served)
        assert [found[name].sharing_ended.reason for name in names] == ["cold", "namespace"]


def test_a_fork_inherits_and_preemption_changes_nothing() -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    with engine(slots=40) as served:
        names = [served.submit([*SYSTEM, last], params) for last in (20, 21, 22)]
        served.step()
        (fork,) = served.fork(names[1])
        found = run(served)
        assert served.stats().preemptions > 0
        expected = SharingEnd("diverged", 10, (21,), (20,))
        assert found[fork].sharing_ended == found[names[1]].sharing_ended == expected
        assert found[fork].num_shared_tokens == 10
        assert sum(served.stats().sharing_ended.values()) == 3


@pytest.mark.parametrize("cumulative", [False, True])
def test_every_delta_tells(cumulative: bool) -> None:
    async def ask() -> list[RequestOutput]:
        async with AsyncEngine(engine()) as served:
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            return [output async for output in served.generate(SYSTEM, params, cumulative=cumulative)]

    outputs = asyncio.run(ask())
    assert {output.sharing_ended for output in outputs} == {SharingEnd("cold", 0, tuple(SYSTEM[:8]))}


def test_merged_deltas_tell() -> None:
    end = SharingEnd("cold", 0, (1,))
    first, then = (RequestOutput("a", PromptTokens([1]), [], done, 3, 2, end) for done in (False, True))
    merged = merge_outputs([first, then])
    assert (merged.num_shared_tokens, merged.sharing_ended, merged.finished) == (2, end, True)
