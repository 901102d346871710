"""The router against a plain twin that keeps lists of token tuples, and what its rule promises."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixgen.cache import BlockProjection, BlocksAdded, BlocksDropped, BlocksReset, ExtentPool, RadixTree, hash_blocks
from radixgen.core import DuplicateRequest, EngineDead, InvalidRequest
from radixgen.serve.routing import Router

BLOCK = 2
MARGIN = 5
WEIGHT = 3
OUTPUT = 2
Tokens = tuple[int, ...]


def prefixes(tokens: Tokens) -> list[Tokens]:
    """Each full block of `tokens`, as all tokens up to its end."""
    return [tokens[:stop] for stop in range(BLOCK, len(tokens) + 1, BLOCK)]


def hashed(blocks: Sequence[Tokens]) -> list[int]:
    return [hash_blocks(np.array(block, np.int32), BLOCK)[-1] for block in blocks]


def hashes_of(tokens: Tokens) -> list[int]:
    return hash_blocks(np.array(tokens, np.int32), BLOCK)


class PlainRouter:
    """The rule, word by word: a block is named by all tokens up to its end."""

    def __init__(self) -> None:
        self.cached: dict[int, list[Tokens]] = {}
        self.requests: dict[int, tuple[int, Tokens, int]] = {}

    def load(self, replica: int) -> int:
        here = [(tokens, output) for where, tokens, output in self.requests.values() if where == replica]
        live = {block for tokens, _ in here for block in prefixes(tokens)}
        return BLOCK * len(live.difference(self.cached[replica])) + sum(OUTPUT * output for _, output in here)

    def match(self, replica: int, tokens: Tokens) -> int:
        live = [block for where, prompt, _ in self.requests.values() if where == replica for block in prefixes(prompt)]
        count = 0
        for block in prefixes(tokens):
            if block not in self.cached[replica] and block not in live:
                break
            count += 1
        return count

    def blocks(self, replica: int) -> int:
        live = {block for where, prompt, _ in self.requests.values() if where == replica for block in prefixes(prompt)}
        return len(live.union(self.cached[replica]))

    def choose(self, tokens: Tokens) -> int:
        total = len(prefixes(tokens))

        def cost(replica: int) -> tuple[Fraction, int, int]:
            missing = total - self.match(replica, tokens)
            share = Fraction(missing, total) if total else Fraction(0)
            return self.load(replica) + WEIGHT * BLOCK * missing + MARGIN * share, missing, self.blocks(replica)

        return min(self.cached, key=cost)


@given(st.data())
def test_router_equals_its_plain_twin(data: Any) -> None:
    plain = PlainRouter()
    router = Router(block_size=BLOCK, prefix_weight=WEIGHT, output_weight=OUTPUT, margin=MARGIN)
    prompts = st.lists(st.integers(0, 1), max_size=7).map(tuple)
    fresh = 0
    for _ in range(data.draw(st.integers(1, 15), "steps")):
        kinds = [
            "joined",
            *(["sent", "sent", "stored", "stored", "removed", "cleared", "died"] if plain.cached else []),
        ]
        kind = data.draw(st.sampled_from([*kinds, *(["ended"] if plain.requests else [])]))
        fresh += 1
        if kind == "joined":
            plain.cached[fresh] = []
            router.joined(fresh)
            continue
        if kind == "ended":
            request = data.draw(st.sampled_from(sorted(plain.requests)))
            del plain.requests[request]
            router.ended(request)
        elif kind == "sent":
            prompt, output = data.draw(prompts), data.draw(st.integers(0, 9))
            replica = router.choose(hashes_of(prompt))
            assert replica == plain.choose(prompt)
            plain.requests[fresh] = replica, prompt, output
            router.sent(fresh, replica, hashes_of(prompt), output_tokens=output)
        else:
            replica = data.draw(st.sampled_from(sorted(plain.cached)))
            held = plain.cached[replica]
            if kind == "stored":
                new = [block for block in prefixes(data.draw(prompts)) if block not in held]
                held += new
                router.stored(replica, hashed(new))
            elif kind == "removed":
                leaves = [a for a in held if not any(b[: len(a)] == a and b != a for b in held)]
                gone = data.draw(st.lists(st.sampled_from(leaves), unique=True)) if leaves else []
                plain.cached[replica] = [block for block in held if block not in gone]
                router.removed(replica, hashed(gone))
            elif kind == "cleared":
                held.clear()
                router.cleared(replica)
            else:
                del plain.cached[replica]
                lost = [request for request, one in plain.requests.items() if one[0] == replica]
                assert sorted(router.died(replica)) == lost  # type: ignore[type-var]
                for request in lost:
                    del plain.requests[request]
        probe = data.draw(prompts)
        for replica in plain.cached:
            assert router.load(replica) == plain.load(replica)
            assert router.match(replica, hashes_of(probe)) == plain.match(replica, probe)


def ids(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_samples_of_one_prompt_go_together_before_any_is_computed() -> None:
    router = Router(range(4))
    for group in range(4):
        prompt = ids(1_000 * group, 20)
        replicas = set()
        for sample in range(16):
            replica = router.choose(prompt)
            router.sent((group, sample), replica, prompt)
            replicas.add(replica)
        assert len(replicas) == 1
    assert len({router.load(replica) for replica in range(4)}) == 1, "each group on a replica of its own"


def test_the_margin_says_when_the_longest_prefix_is_given_up() -> None:
    router = Router(range(2), block_size=16, prefix_weight=2, output_weight=1, margin=1_000)
    prompt = ids(0, 10)
    router.stored(1, prompt)
    router.sent("busy", 1, [], output_tokens=1_320)
    assert router.choose(prompt) == 1, "160 tokens saved, which weigh twice, and the margin"
    router.sent("busier", 1, [], output_tokens=1)
    assert router.choose(prompt) == 0
    assert router.choose(prompt + ids(100, 10)) == 0
    router.ended("busy")
    assert router.choose(prompt + ids(100, 10)) == 1, "half the prompt, half the margin"


def test_a_common_beginning_does_not_gather_everything() -> None:
    """A chat template's first block is no reason to queue behind each other."""
    router = Router(range(4), block_size=16)
    for request in range(40):
        prompt = [0, *ids(1_000 * (request + 1), 40)]
        router.sent(request, router.choose(prompt), prompt)
    loads = [router.load(replica) for replica in range(4)]
    assert max(loads) - min(loads) <= 2 * 41 * 16


def test_many_agents_with_one_system_prompt_are_spread() -> None:
    router, system = Router(range(2)), ids(0, 188)
    for agent in range(128):
        prompt = system + ids(1_000 * (agent + 1), 12)
        router.sent(agent, router.choose(prompt), prompt, output_tokens=100)
    assert abs(router.load(0) - router.load(1)) < 2_000


def test_an_idle_replica_with_less_in_its_cache_takes_what_is_new() -> None:
    router = Router(range(2))
    router.stored(0, ids(0, 10))
    assert router.choose(ids(100, 5)) == 1
    router.stored(1, ids(200, 11))
    assert router.choose(ids(100, 5)) == 0


def test_what_is_computed_is_no_load() -> None:
    router = Router([3], block_size=16, output_weight=3)
    router.sent("a", 3, ids(0, 4), output_tokens=7)
    router.sent("b", 3, ids(0, 4), output_tokens=7)
    assert router.load(3) == 4 * 16 + 42
    router.stored(3, ids(0, 3))
    assert router.load(3) == 16 + 42
    router.removed(3, [2])
    assert router.load(3) == 2 * 16 + 42
    router.ended("a")
    router.ended("b")
    router.ended("b")
    assert router.load(3) == 0 and router.match(3, ids(0, 4)) == 2


def test_a_replica_that_dies_leaves_nothing_behind() -> None:
    router = Router(range(2))
    router.stored(1, ids(0, 4))
    router.sent("a", 1, ids(0, 8))
    assert router.died(1) == ["a"] and router.died(1) == []
    for late in (lambda: router.stored(1, [1]), lambda: router.removed(1, [1]), lambda: router.cleared(1)):
        late()
    router.ended("a")
    assert router.replicas == (0,) and router.choose(ids(0, 4)) == 0
    router.joined(1)
    assert router.load(1) == 0 and router.match(1, ids(0, 4)) == 0
    router.sent("a", 1, ids(0, 8))
    assert router.match(1, ids(0, 8)) == 8


def test_memory_is_bounded() -> None:
    router = Router([0], max_blocks=5)
    router.stored(0, ids(0, 100))
    assert router.match(0, ids(0, 100)) == 5
    router.removed(0, ids(0, 100)[::-1])
    assert router.match(0, ids(0, 100)) == 0


def test_bad_input() -> None:
    with pytest.raises(InvalidRequest, match="block_size=0"):
        Router(block_size=0)
    with pytest.raises(InvalidRequest, match="prefix_weight=0"):
        Router(prefix_weight=0)
    with pytest.raises(InvalidRequest, match="output_weight=0"):
        Router(output_weight=0)
    with pytest.raises(InvalidRequest, match="margin=-1"):
        Router(margin=-1)
    with pytest.raises(InvalidRequest, match="max_blocks=0"):
        Router(max_blocks=0)
    with pytest.raises(InvalidRequest, match="replica=-1"):
        Router([-1])
    with pytest.raises(InvalidRequest, match="replica=0: has joined already"):
        Router([0, 0])
    router = Router([0])
    for call in (router.load, lambda replica: router.match(replica, []), lambda replica: router.sent("a", replica, [])):
        with pytest.raises(InvalidRequest, match="replica=1: is not there"):
            call(1)
    router.sent("a", 0, [1])
    with pytest.raises(DuplicateRequest, match="request='a'"):
        router.sent("a", 0, [2])
    with pytest.raises(InvalidRequest, match="output_tokens=-1"):
        router.sent("b", 0, [2], output_tokens=-1)
    router.died(0)
    with pytest.raises(EngineDead, match="there is no replica"):
        router.choose([1])


def test_the_events_of_a_tree_are_what_the_router_knows() -> None:
    """Prompts through a small tree: after each, the router has what the tree has, by the hashes that callers make."""
    rng = np.random.default_rng(0)
    router = Router([0], block_size=4)

    def feed(event: BlocksAdded | BlocksDropped | BlocksReset) -> bool:
        if isinstance(event, BlocksAdded):
            router.stored(0, event.hashes)
        elif isinstance(event, BlocksDropped):
            router.removed(0, event.hashes)
        else:
            router.cleared(0)
        return True

    tree = RadixTree(ExtentPool(120))
    BlockProjection(tree, feed, 4)
    prompts = [rng.integers(0, 2, int(rng.integers(1, 40))).astype(np.int32) for _ in range(60)]
    for prompt in prompts:
        cursor = tree.insert(prompt)
        leaf = cursor.held
        new = leaf.known - leaf.scheduled
        if new:
            tree.evict(max(tree.slots_wanted(leaf, new) - tree.pool.free, 0))
            tree.schedule(leaf, new)
            tree.commit(leaf)
        tree.unlock(cursor)
        for probe in prompts:
            match = tree.match_prefix(probe)
            assert router.match(0, hash_blocks(probe, 4)) == (match.computed if match else 0) // 4
