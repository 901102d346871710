"""Cache hints: what each does to the tree, how it is answered, and its bounds, by the oracle."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from oracle import StampModel

from radixgen import CacheHint, Engine, HintResult, InvalidRequest, LimitReached, Limits, RequestOutput, SamplingParams
from radixgen.cache import ExtentPool, RadixTree, as_tokens, demote
from radixgen.cache.node import DEMOTED

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Hinted:
    """An engine over the oracle's model, checked after each step."""

    def __init__(self, slots: int = 128, host_slots: int = 0, limits: Limits | None = None, **options: Any) -> None:
        self.clock = Clock()
        self.engine = Engine(
            StampModel(3, 64),
            kv_tokens=slots,
            host_kv_tokens=host_slots,
            max_step_tokens=32,
            limits=limits or Limits(max_hint_pool_share=1.0),
            clock=self.clock,
            debug=True,
            **options,
        )
        self.host = self.engine._core.host
        if self.host is not None:
            self.host.fetches.min_fetch = 1

    def run(
        self, prompt: list[int], *hints: CacheHint, params: SamplingParams = GREEDY, **options: Any
    ) -> RequestOutput:
        name = self.engine.submit(prompt, params, cache_hints=hints, output_kind="final", **options)
        outputs = self.drain()
        assert outputs[-1].request_id == name
        return outputs[-1]

    def drain(self) -> list[RequestOutput]:
        outputs = []
        while self.engine.has_unfinished:
            outputs += self.engine.step()
            self.engine.check()
        return outputs

    def apply(self, prompt: list[int], *hints: CacheHint, **options: Any) -> tuple[HintResult, ...]:
        results = self.engine.apply_hints(prompt, hints, **options)
        self.engine.check()
        return results

    def cached(self, prompt: list[int], namespace: str = "") -> int:
        match = self.engine._core.tree.match_prefix(prompt, namespace)
        return match.computed if match else 0

    def evict(self, count: int = 10_000) -> None:
        if self.host is not None:
            self.host.saves.complete()
        self.engine._core.tree.evict(count)


def texts(count: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    """Prompts, of which any three in a row begin differently."""
    tails = np.random.default_rng(seed).integers(0, 3, (count, length)).tolist()
    return [[index % 3, index // 3 % 3, *tail[2:]] for index, tail in enumerate(tails)]


# -- retain and pin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "ttl"), [("retain", 300.0), ("pin", 3_600.0), ("prefetch", 60.0)])
def test_a_retained_prefix_stays_until_its_time(action: Any, ttl: float) -> None:
    served, (prompt, other) = Hinted(), texts(2)
    output = served.run(prompt, CacheHint(action, 12))
    assert output.cache_hints == (HintResult(action, "accepted", 12, ttl),)
    served.run(other)
    served.evict()
    assert served.cached(prompt) == 12 and served.cached(other) == 0
    served.clock.now = ttl + 1
    served.run(other)
    served.evict()
    assert served.cached(prompt) == 0 and not served.engine.pins
    served.engine.close()


def test_outputs_have_no_answers_without_hints() -> None:
    served, (prompt,) = Hinted(), texts(1)
    assert served.run(prompt).cache_hints == ()
    stats = served.engine.stats()
    assert stats.hints_accepted == stats.hints_clipped == stats.hints_refused == 0


def test_every_output_after_the_prompt_has_the_answers() -> None:
    served, (prompt,) = Hinted(), texts(1)
    served.engine.submit(prompt, GREEDY, cache_hints=[CacheHint("retain", 5, 9.0)], output_kind="delta")
    assert [output.cache_hints for output in served.drain()] == 4 * [(HintResult("retain", "accepted", 5, 9.0),)]


def test_what_is_asked_too_much_is_clipped() -> None:
    served, (prompt,) = Hinted(limits=Limits(max_hint_seconds=100.0, max_hint_pool_share=0.1)), texts(1)
    (result,) = served.run(prompt, CacheHint("retain", 50, 1e9)).cache_hints
    assert result.status == "clipped" and (result.num_tokens, result.ttl) == (12, 100.0)
    assert result.reason == (
        "ttl: at most 100 seconds; num_tokens: the prompt has 20 tokens; "
        "num_tokens: one owner's hints retain at most 10% of the pool"
    )
    assert served.engine.stats().hints_clipped == 1


def test_tokens_are_bounded_per_owner_and_shared_ones_count_once() -> None:
    """A quarter of 128 slots: two prefixes of 20 tokens are too many for one owner, but not what they share."""
    served, (prompt, other) = Hinted(limits=Limits()), texts(2)
    assert served.run(prompt, CacheHint("retain")).cache_hints[0].num_tokens == 20
    (result,) = served.run(other, CacheHint("retain")).cache_hints
    assert result.status == "clipped" and result.num_tokens == 12
    (result,) = served.run([*prompt, 1, 2], CacheHint("retain")).cache_hints
    assert result.status == "clipped" and result.num_tokens == 20
    (result,) = served.run(other, CacheHint("retain", 12), hint_owner="another").cache_hints
    assert result.status == "accepted" and result.num_tokens == 12
    (result,) = served.run(other, CacheHint("retain"), namespace="tenant").cache_hints
    assert result.status == "accepted" and result.num_tokens == 20


def test_pins_are_bounded_per_owner() -> None:
    served = Hinted(slots=400, limits=Limits(max_hint_pins=2, max_hint_pool_share=1.0))
    prompts = texts(4)
    statuses = [served.run(prompt, CacheHint("retain")).cache_hints[0].status for prompt in prompts]
    assert statuses == ["accepted", "accepted", "refused", "refused"] and len(served.engine.pins) == 2
    (result,) = served.apply(prompts[2], CacheHint("retain"), hint_owner="another")
    assert result.status == "accepted"
    (result,) = served.apply(prompts[3], CacheHint("retain"))
    assert result == HintResult("retain", "refused", reason="one owner's hints retain at most 2 prefixes")


def test_pins_are_bounded_in_all() -> None:
    served, prompts = Hinted(slots=400, limits=Limits(max_pins=2, max_hint_pool_share=1.0)), texts(3)
    results = [served.run(prompt, CacheHint("retain"), hint_owner=str(i)) for i, prompt in enumerate(prompts)]
    assert [output.cache_hints[0].status for output in results] == ["accepted", "accepted", "refused"]
    assert results[2].cache_hints[0].reason.startswith("at most 2 prefixes are pinned")


def test_no_owner_stops_another() -> None:
    """The owner of the most pins loses its weakest to another's hint, and any to `Engine.pin`."""
    served, prompts = Hinted(slots=400, limits=Limits(max_pins=4, max_hint_pool_share=1.0)), texts(7)
    retained = [
        served.run(p, CacheHint("retain", priority=int(i != 1)), hint_owner="greedy") for i, p in enumerate(prompts)
    ]
    assert [output.cache_hints[0].status for output in retained] == 4 * ["accepted"] + 3 * ["refused"]
    pins = served.engine._core.scheduler.pins
    for prompt in prompts[:3]:
        served.run(prompt, CacheHint("retain"), hint_owner="modest")
    assert sorted(pin.owner or "" for pin in pins) == ["greedy", "greedy", "modest", "modest"]
    assert all(pin.priority == 1 for pin in pins if pin.owner == "greedy")
    ours = [served.engine.pin(prompt) for prompt in prompts[:4]]
    assert None not in ours and {pin.owner for pin in pins} == {None}
    with pytest.raises(LimitReached, match="at most 4 prefixes"):
        served.engine.pin(prompts[0])
    (result,) = served.apply(prompts[0], CacheHint("retain"), hint_owner="modest")
    assert result.status == "refused" and set(ours) == set(served.engine.pins)


def test_a_longer_pin_replaces_those_that_it_outlasts() -> None:
    """As a conversation grows, one pin keeps it; a prefix that is to stay longer keeps its own."""
    served, (prompt,) = Hinted(), texts(1)
    served.run(prompt, CacheHint("retain", 5, 1_000.0), CacheHint("retain", 10, 50.0), CacheHint("retain", 15, 50.0))
    pins = served.engine._core.scheduler.pins
    assert sorted(pin.num_tokens for pin in pins) == [5, 15]
    served.run([*prompt, 0, 1], CacheHint("retain", 22, 50.0))
    assert sorted(pin.num_tokens for pin in pins) == [5, 22]
    pinned = served.engine.pin(prompt)
    served.run([*prompt, 0, 1], CacheHint("retain", None, 900.0))
    assert pinned in served.engine.pins, "only pins of hints are replaced"


def test_hints_give_way_to_requests() -> None:
    served, prompts = Hinted(slots=60), texts(4, 40)
    for prompt in prompts:
        assert served.run(prompt, CacheHint("pin")).outputs[0].finish_reason == "length"
    assert len(served.engine.pins) <= 1


def test_a_request_that_ends_before_its_prompt_is_computed() -> None:
    served, (prompt,) = Hinted(), texts(1)
    name = served.engine.submit(prompt, GREEDY, cache_hints=[CacheHint("retain"), CacheHint("demote")])
    served.engine.cancel(name)
    (output,) = served.drain()
    assert [result.status for result in output.cache_hints] == ["refused", "refused"]
    assert served.engine.stats().hints_refused == 2 and not served.engine.pins


def test_forks_and_samples_apply_hints_once() -> None:
    served, (prompt,) = Hinted(slots=200), texts(1)
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    name = served.engine.submit(prompt, params, cache_hints=[CacheHint("retain")])
    served.engine.step()
    served.engine.fork(name, 2)
    served.drain()
    assert served.engine.stats().hints_accepted == 1 and len(served.engine.pins) == 1


# -- demote -----------------------------------------------------------------------------------------------


def test_a_demoted_path_is_evicted_first() -> None:
    served, (first, second) = Hinted(), texts(2)
    served.run(first)
    (result,) = served.run(second, CacheHint("demote", 8)).cache_hints
    assert result == HintResult("demote", "accepted", 12)
    served.evict(15)  # 12 of the prompt, and 3 of the answer
    assert served.cached(second) == 8 and served.cached(first) == 20
    served.run(second)
    served.evict(5)
    assert served.cached(first) == 18, "what is used again is demoted no more"
    assert served.cached(second) == 20


def test_hints_that_demote_are_applied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins: each of a request's hints matched each of its sequences again, which held up the step."""
    served, (prompt,) = Hinted(), texts(1)
    calls: list[int] = []

    def counted(*arguments: Any) -> int:
        calls.append(arguments[3])
        return demote(*arguments)

    monkeypatch.setattr("radixgen.scheduler.cache_hints.demote", counted)
    params = SamplingParams(temperature=0.0, max_tokens=4, n=3)
    served.run(prompt, *[CacheHint("demote", start) for start in (20, 8, 15)], params=params)
    assert calls == [8] * 3
    demoted = [node for node in served.engine._core.tree.nodes() if node.priority == DEMOTED]
    assert min(node.start for node in demoted) == 8


def test_what_others_share_or_lock_is_not_demoted() -> None:
    served, (stem,) = Hinted(), texts(1)
    served.run([*stem, 0, 0])
    served.run([*stem, 1, 1])
    pin = served.engine.pin([*stem, 0, 0])
    assert [r.status for r in served.apply([*stem, 0, 0], CacheHint("demote"))] == ["refused"]
    (result,) = served.apply([*stem, 1, 1], CacheHint("demote"))
    assert result.status == "accepted" and result.num_tokens >= 2
    tree = served.engine._core.tree
    assert {node.priority for node in tree.nodes() if node.start < 20} == {0.0}
    assert pin is not None and served.engine.unpin(pin)
    served.evict(5)
    assert served.cached([*stem, 1, 1]) == 20 and served.cached([*stem, 0, 0]) == 22


def test_demotion_of_what_is_copied_to_the_host() -> None:
    """A save locks the path when the request has ended: the path is demoted nevertheless, and stays in the host."""
    served, (first, second) = Hinted(host_slots=400), texts(2)
    assert served.host is not None
    served.host._copies.delay = 3  # type: ignore[attr-defined]
    served.run(first)
    served.run(second, CacheHint("demote"))
    assert any(node.locked for node in served.engine._core.tree.nodes() if node.priority == DEMOTED)
    served.evict(23)
    assert served.cached(second) == 0 and served.cached(first) == 20
    assert served.host.tree.match_prefix(second).computed == 20  # type: ignore[union-attr]


def test_what_is_used_again_while_it_is_copied_is_demoted_no_more() -> None:
    """Pins: the save's lock hid the new one, and what the next request generated was demoted as well."""
    served, (prompt,) = Hinted(host_slots=400), texts(1)
    assert served.host is not None
    served.host._copies.delay = 1_000  # type: ignore[attr-defined]
    served.run(prompt, CacheHint("demote"))
    served.run([*prompt, 0, 1])
    match = served.engine._core.tree.match_prefix([*prompt, 0, 1])
    assert match is not None and match.length == 22
    assert [node.priority for node in match.node.path()] == [0.0] * len(match.node.path())


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20, 24, 25, 99])
def test_demotion_begins_anywhere(start: int) -> None:
    tree = RadixTree(ExtentPool(64), stamps=True)
    shared = 6
    prompts = [as_tokens([2] * shared + tail[: 25 - shared]) for tail in texts(2)]
    for tokens in prompts:
        lock = tree.insert(tokens)
        tree.schedule(lock.held, lock.held.known - lock.held.scheduled)
        tree.commit(lock.held)
        tree.unlock(lock)
    count = demote(tree, prompts[1], start=start)
    tree.check()
    assert count == max(25 - max(start, shared), 0)
    tree.evict(count)
    tree.check()
    match = tree.match_prefix(prompts[1])
    assert match is not None and match.computed == 25 - count
    assert tree.match_prefix(prompts[0]).computed == 25  # type: ignore[union-attr]


def test_demotion_of_nothing() -> None:
    served, (prompt,) = Hinted(), texts(1)
    for action in ("demote", "retain", "pin", "prefetch"):
        (result,) = served.apply(prompt, CacheHint(action))
        assert result.status == "refused" and result.reason and not result.num_tokens


# -- prefetch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 2])
def test_a_prefix_is_prefetched_and_kept(delay: int) -> None:
    served, (prompt, other) = Hinted(host_slots=400), texts(2)
    assert served.host is not None
    served.run(prompt)
    served.evict()
    served.host._copies.delay = delay  # type: ignore[attr-defined]
    (result,) = served.apply(prompt, CacheHint("prefetch", 16, 30.0))
    assert result == HintResult("prefetch", "accepted", 16, 30.0) and served.cached(prompt) == 0
    served.run(other)
    served.run(other)
    served.evict()
    assert served.cached(prompt) == 16 and len(served.engine.pins) == 1
    assert served.run(prompt).num_cached_tokens >= 16
    served.clock.now = 31.0
    served.run(other)
    served.evict()
    assert not served.engine.pins and served.cached(prompt) == 0
    served.engine.close()


def test_a_prefetch_that_is_late_locks_nothing() -> None:
    served, (prompt, other) = Hinted(host_slots=400), texts(2)
    assert served.host is not None
    served.run(prompt)
    served.evict()
    served.host._copies.delay = 2  # type: ignore[attr-defined]
    served.apply(prompt, CacheHint("prefetch", ttl=1.0))
    served.clock.now = 5.0
    served.run(other)
    served.run(other)
    served.host.saves.complete()
    assert not served.engine.pins and not list(served.host.locks())


def test_a_request_joins_a_prefetch() -> None:
    served, (prompt,) = Hinted(host_slots=400), texts(1)
    assert served.host is not None
    served.run(prompt)
    served.evict()
    served.host._copies.delay = 3  # type: ignore[attr-defined]
    served.apply(prompt, CacheHint("prefetch"))
    assert served.run(prompt).num_cached_tokens == 20
    assert served.engine.stats().host_fetched_tokens == 20


def test_prefetches_count_for_their_owner() -> None:
    served = Hinted(slots=200, host_slots=400, limits=Limits(max_hint_pins=1, max_hint_pool_share=1.0))
    assert served.host is not None
    prompts = texts(3)
    for prompt in prompts:
        served.run(prompt)
    served.evict()
    served.host._copies.delay = 5  # type: ignore[attr-defined]
    statuses = [served.apply(prompt, CacheHint("prefetch"))[0].status for prompt in prompts]
    assert statuses == ["accepted", "refused", "refused"]


# -- share ------------------------------------------------------------------------------------------------


def test_a_request_that_shares_nothing() -> None:
    served, (prompt,) = Hinted(), texts(1)
    served.run(prompt)
    output = served.run(prompt, CacheHint("share", 0), CacheHint("retain"), CacheHint("demote"))
    assert output.num_cached_tokens == 0
    assert [result.status for result in output.cache_hints] == ["accepted", "refused", "refused"]
    assert {node.namespace for node in served.engine._core.tree.nodes()} == {""}


@pytest.mark.parametrize(("tokens", "status"), [(None, "accepted"), (20, "accepted"), (99, "accepted"), (7, "clipped")])
def test_prompts_are_shared_as_a_whole(tokens: int | None, status: str) -> None:
    served, (prompt,) = Hinted(), texts(1)
    served.run(prompt)
    output = served.run(prompt, CacheHint("share", tokens))
    assert output.num_cached_tokens == 20 and output.cache_hints[0].status == status
    assert served.apply(prompt, CacheHint("share", 0))[0].status == "refused"


# -- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hints", "field", "limit"),
    [
        ("retain", "cache_hints", "must be a list of CacheHint"),
        ([{"action": "retain"}], "cache_hints", "must be a list of CacheHint"),
        (17 * [CacheHint("retain")], "len(cache_hints)", "must be at most 16"),
        ([CacheHint("evict")], "cache_hints[0].action", "must be one of retain, pin, prefetch, demote, share"),
        ([CacheHint("pin"), CacheHint("retain", -1)], "cache_hints[1].num_tokens", "from 0 to"),
        ([CacheHint("retain", 1.5)], "cache_hints[0].num_tokens", "integer"),
        ([CacheHint("retain", ttl=0)], "cache_hints[0].ttl", "above 0"),
        ([CacheHint("retain", ttl=math.nan)], "cache_hints[0].ttl", "above 0"),
        ([CacheHint("retain", priority=2**31)], "cache_hints[0].priority", "from -2147483648"),
    ],
)
def test_malformed_hints(hints: Sequence[CacheHint], field: str, limit: str) -> None:
    served = Hinted()
    for call in (
        lambda: served.engine.submit([0, 1], GREEDY, cache_hints=hints),
        lambda: served.engine.apply_hints([0, 1], hints),
    ):
        with pytest.raises(InvalidRequest) as error:
            call()
        assert error.value.field == field and limit in error.value.limit
    assert not served.engine.has_unfinished


def test_a_malformed_owner() -> None:
    with pytest.raises(InvalidRequest, match="hint_owner"):
        Hinted().engine.apply_hints([0], [], hint_owner="\0")
