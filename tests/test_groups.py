"""Admission by groups: what waiting requests lack in common is computed once, and what they match is evicted last."""

from typing import Any

import numpy as np
import pytest
from oracle import StampModel

from radixgen import Engine, Limits, SamplingParams
from radixgen.cache import ExtentPool, Node, RadixTree

VOCAB = 50
RNG = np.random.default_rng(0)


def serve(**options: Any) -> Engine:
    return Engine(StampModel(VOCAB, 512), debug=True, **options)


def some(count: int) -> list[int]:
    return RNG.integers(0, VOCAB, count).tolist()


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


def order_of_ends(engine: Engine) -> list[str]:
    ended = []
    while engine.has_unfinished:
        ended += [output.request_id for output in engine.step() if output.finished]
        engine.check()
    return ended


def cached(tree: RadixTree, tokens: list[int]) -> Node:
    """Compute `tokens`, then release their lock."""
    lock = tree.insert(tokens)
    node = lock.held
    tree.schedule(node, node.known - node.scheduled)
    tree.commit(node)
    tree.unlock(lock)
    return node


# -- in the engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0, 5])
def test_what_a_group_shares_is_computed_once(own: int) -> None:
    """Pins: with room for one prompt, members of four groups took turns, and each computed its whole prompt."""
    shared = [some(40) for _ in range(4)]
    with serve(kv_tokens=80) as engine:
        for seed in range(4):
            for tokens in shared:
                params = SamplingParams(temperature=1.0, seed=seed, max_tokens=4, ignore_eos=True)
                engine.submit(tokens + [seed] * own, params, output_kind="final")
        assert len(order_of_ends(engine)) == 16
        assert engine.stats().computed_prompt_tokens == 4 * 40 + 16 * own


def test_members_that_run_one_after_another_find_their_path() -> None:
    """Pins: a request of a higher priority evicted what the next member was about to use, and left what nobody was."""
    shared, unused = some(40), some(35)
    with serve(kv_tokens=120, limits=Limits(max_num_seqs=1)) as engine:
        engine.generate([shared], greedy(1))
        engine.generate([unused], greedy(1))
        first = engine.submit(some(5), greedy(3), priority=1)
        members = [engine.submit([*shared, token], greedy(3)) for token in range(3)]
        engine.step()
        urgent = engine.submit(some(60), greedy(1), priority=1)
        assert order_of_ends(engine) == [first, urgent, *members]
        assert engine.stats().cached_prompt_tokens == 3 * 40


def test_groups_overtake_no_more_than_the_bound() -> None:
    shared = some(40)
    with serve(kv_tokens=500, limits=Limits(max_num_seqs=1, max_overtaken=3)) as engine:
        engine.generate([[1]], greedy(1))
        first = engine.submit(shared, greedy(1))
        alone = engine.submit(some(60), greedy(1))
        members = [engine.submit([*shared, token], greedy(1)) for token in range(8)]
        assert order_of_ends(engine) == [first, *members[:3], alone, *members[3:]]


def test_a_request_that_nothing_fits_beside_still_runs() -> None:
    """What another one matches is evicted if nothing else can be."""
    shared = some(40)
    with serve(kv_tokens=64, limits=Limits(max_num_seqs=1, max_overtaken=2)) as engine:
        engine.generate([shared], greedy(1))
        large = engine.submit(some(60), greedy(2))
        members = [engine.submit([*shared, token], greedy(2)) for token in range(3)]
        assert order_of_ends(engine) == [*members[:2], large, members[2]]


# -- in the tree ------------------------------------------------------------------------------------------


def test_nodes_that_are_matched_are_evicted_last() -> None:
    tree = RadixTree(ExtentPool(30))
    cached(tree, [1] * 10)
    cached(tree, [2] * 10)
    followed = tree.follow(np.array([1] * 10 + [3], np.int32))
    tree.evict(10)
    assert followed.length == 10 and tree.match_prefix([2]).length == 0
    tree.evict(4)
    assert followed.length == 6, "what nothing else can replace is evicted"
    cached(tree, [2] * 10)
    tree.unfollow(followed)
    tree.evict(6)
    assert tree.match_prefix([1]).length == 0 and tree.match_prefix([2] * 10).length == 10
    tree.check()


def test_of_matched_and_unmatched_nodes_the_lower_priority_goes_first() -> None:
    tree = RadixTree(ExtentPool(30))
    tree.unlock(computed_lock(tree, [1] * 10, priority=0))
    tree.unlock(computed_lock(tree, [2] * 10, priority=1))
    followed = tree.follow(np.array([1] * 10, np.int32))
    tree.evict(10)
    assert followed.length == 0


def computed_lock(tree: RadixTree, tokens: list[int], priority: int) -> Any:
    lock = tree.insert(tokens, priority=priority)
    tree.schedule(lock.held, lock.held.known)
    tree.commit(lock.held)
    return lock


def test_a_node_that_loses_its_match_in_a_split_is_evicted_in_its_turn() -> None:
    tree = RadixTree(ExtentPool(40))
    cached(tree, [1] * 10)
    cached(tree, [2] * 10)
    followed = tree.follow(np.array([1] * 5 + [3], np.int32))
    lock = tree.insert([1] * 5)
    assert followed.node is lock.held
    tree.check()
    tree.evict(5)
    assert tree.match_prefix([1] * 10).length == 5 and tree.match_prefix([2] * 10).length == 10
    tree.unlock(lock)
