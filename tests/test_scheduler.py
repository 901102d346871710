"""Who runs next: order, fairness with its bound, deadlines, bounded queues, preemption, accounting."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from oracle import StampModel

from radixgen import (
    DuplicateRequest,
    Engine,
    InvalidRequest,
    Limits,
    PromptTooLong,
    QueueFull,
    RequestOutput,
    SamplingParams,
    UnknownRequest,
)
from radixgen.scheduler.queue import WaitingQueue
from radixgen.scheduler.sequence import Request, Sequence

VOCAB = 8


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(**options: Any) -> Engine:
    return Engine(StampModel(VOCAB, 256), **({"kv_tokens": 512, "debug": True} | options))


def greedy(count: int, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, **others)


def some(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def finish(engine: Engine, each: Callable[[], None] = lambda: None) -> dict[str, RequestOutput]:
    """The last output of every request, in the order in which they ended."""
    ended: dict[str, RequestOutput] = {}
    for _ in range(10_000):
        if not engine.has_unfinished:
            return ended
        for output in engine.step():
            assert output.request_id not in ended, "a second last output"
            if output.finished:
                ended[output.request_id] = output
        engine.check()
        each()
    raise AssertionError("the engine does not drain")


# -- the waiting queue ------------------------------------------------------------------------------------


def queued(queue: WaitingQueue, serial: int, priority: int = 0, n: int = 1) -> Request:
    params = SamplingParams(n=n)
    prompt = np.zeros(4, np.int32)
    request = Request(f"r{serial}", serial, prompt, params, max_output=1, priority=priority)
    for index in range(n):
        sequence = Sequence(request, index, "", _state(params, index, prompt))
        request.add_sequence(sequence)
        queue.add(sequence)
    return request


def _state(params: SamplingParams, index: int, prompt: Any) -> Any:
    from radixgen.core import SamplingState

    return SamplingState(params, 0, index, prompt, [], frozenset())


def lengths(length: Callable[[Request], int]) -> Callable[[Sequence], Any]:
    """Gives the sequences of requests matches of this length."""

    def follow(sequence: Sequence) -> Any:
        sequence.followed = SimpleNamespace(computed=length(sequence.request))
        return sequence.followed

    return follow


def admit(queue: WaitingQueue, length: Callable[[Request], int]) -> Request:
    for sequence in queue:
        sequence.followed = None
    request = queue.choose(lengths(length))
    for sequence in list(request.waiting):
        queue.admit(sequence)
    queue.check()
    return request


def test_priority_then_longest_prefix_then_arrival() -> None:
    queue = WaitingQueue(max_overtaken=10)
    known = {1: 3, 2: 9, 3: 9, 4: 50, 5: 0}
    for serial in (1, 2, 3):
        queued(queue, serial)
    queued(queue, 4, priority=-1)
    queued(queue, 5, priority=1)
    order = [admit(queue, lambda r: known[r.serial]).serial for _ in range(5)]
    assert order == [5, 2, 3, 1, 4]


@pytest.mark.parametrize("bound", [0, 1, 7])
def test_nobody_is_overtaken_more_often_than_the_bound(bound: int) -> None:
    """Cold requests among hot ones that arrive for ever: each is overtaken `bound` times, and then never again."""
    queue = WaitingQueue(bound)
    rng = np.random.default_rng(bound)
    came: dict[int, int] = {}
    admitted: list[int] = []
    for serial in range(1, 2_000):
        came[serial] = len(admitted)
        queued(queue, serial)
        if serial % 3:
            admitted.append(admit(queue, lambda r: 0 if r.serial % 25 == 0 else int(rng.integers(1, 9))).serial)
    while len(queue):
        admitted.append(admit(queue, lambda r: 0 if r.serial % 25 == 0 else 5).serial)
    place = {serial: index for index, serial in enumerate(admitted)}
    overtaken = [sum(other > serial for other in admitted[: place[serial]]) for serial in came]
    assert max(overtaken) == bound
    waited = [place[serial] - came[serial] for serial in came]
    ahead = [sum(place[other] >= came[serial] for other in range(1, serial)) for serial in came]
    assert all(wait <= before + bound for wait, before in zip(waited, ahead, strict=True))


def test_requests_overtaken_while_a_higher_priority_fetches_are_counted() -> None:
    """Pins: the count ended at the first request of another priority, so cold ones were overtaken without end."""
    queue = WaitingQueue(max_overtaken=2)
    queued(queue, 1, priority=1).waiting[0].fetch = cast("Any", SimpleNamespace(arrived=False))
    known = {2: 0} | dict.fromkeys(range(3, 9), 5)
    for serial in known:
        queued(queue, serial)
    order = [admit(queue, lambda r: known[r.serial]).serial for _ in range(4)]
    assert order == [3, 4, 2, 5]


# -- order in the engine ----------------------------------------------------------------------------------


def test_hot_requests_go_first_but_cold_ones_are_not_forgotten() -> None:
    hot = some(40)
    with serve(limits=Limits(max_num_seqs=1, max_overtaken=3)) as engine:
        engine.generate([hot], greedy(1))
        cold = engine.submit(some(9, 1), greedy(2))
        hots = [engine.submit([*hot, i % VOCAB], greedy(2)) for i in range(8)]
        order = list(finish(engine))
    assert order == [*hots[:3], cold, *hots[3:]]


def test_siblings_are_admitted_together() -> None:
    with serve(limits=Limits(max_num_seqs=4)) as engine:
        engine.submit(some(4), greedy(9, ignore_eos=True))
        engine.submit(some(5, 1), greedy(3))
        engine.step()
        four = engine.submit(some(6, 2), greedy(3, n=4))
        running = []
        ended = finish(engine, lambda: running.append(engine.stats().num_running))
        assert len(ended[four].outputs) == 4
        assert set(running) <= {0, 1, 2, 4}, "siblings came one by one"


def test_more_siblings_than_seats_are_refused() -> None:
    with serve(limits=Limits(max_num_seqs=4)) as engine, pytest.raises(InvalidRequest, match="n=5"):
        engine.submit([1], greedy(1, n=5))


def test_the_budget_holds_and_decoding_goes_first() -> None:
    model = StampModel(VOCAB, 256)
    with Engine(model, kv_tokens=512, max_step_tokens=8) as engine:
        for seed in range(3):
            engine.submit(some(3, seed), greedy(30))
        for _ in range(5):
            engine.step()
        engine.submit(some(60, 9), greedy(3))
        while engine.has_unfinished:
            rows, generated = model.rows, engine.stats().generated_tokens
            decoding = engine.stats().num_running
            engine.step()
            assert model.rows - rows <= 8
            if decoding == 4:
                assert engine.stats().generated_tokens - generated >= 3


# -- memory -----------------------------------------------------------------------------------------------


def test_preempted_equals_not_preempted() -> None:
    prompts = [some(20, seed) for seed in range(6)]
    with serve(kv_tokens=4096) as engine:
        expected = [output.outputs for output in engine.generate(prompts, greedy(30))]
    with serve(kv_tokens=64) as engine:
        assert [output.outputs for output in engine.generate(prompts, greedy(30))] == expected
        assert engine.stats().preemptions > 0
        engine.check()


def test_sequences_in_the_same_state_give_way_together() -> None:
    """Pins a deadlock: pairs on one node, so that nobody held a slot alone and nobody was a victim."""
    with serve(kv_tokens=60) as engine:
        for seed in range(3):
            for _ in range(2):
                engine.submit(some(6, seed), greedy(40))
        ended = finish(engine)
    assert [len(output.outputs[0].token_ids) for output in ended.values()] == [40] * 6


def test_the_oldest_of_the_highest_priority_is_never_preempted() -> None:
    with serve(kv_tokens=64) as engine:
        for seed in range(6):
            engine.submit(some(20, seed), greedy(30), priority=seed % 2, request_id=str(seed))
        order = list(finish(engine))
        assert engine.stats().preemptions > 0
    assert order[:3] == ["1", "3", "5"]


def test_what_can_never_fit_is_refused_at_once() -> None:
    with serve(kv_tokens=50) as engine:
        engine.submit(some(20), greedy(31))
        with pytest.raises(PromptTooLong, match=r"len\(prompt\) \+ max_tokens=52"):
            engine.submit(some(20), greedy(32))
        with pytest.raises(PromptTooLong, match=r"len\(prompt\)=256"):
            engine.submit([1] * 256, greedy(1))
        assert len(finish(engine)) == 1


def test_every_slot_is_accounted_for() -> None:
    with serve(kv_tokens=128) as engine:
        engine.generate([some(30, seed) for seed in range(3)], greedy(5))
        engine.pin(some(30))
        engine.submit(some(20, 9), greedy(20))

        def adds_up() -> None:
            stats, pool = engine.stats(), engine._core.tree.pool
            assert pool.free + pool.fenced + pool.used == stats.kv_tokens_total
            assert stats.kv_tokens_used + stats.kv_tokens_reserved == pool.used
            live = {n.id: n for s in engine._core.scheduler.running for n in s.cursor.held.path()}
            live |= {n.id: n for p in engine._core.scheduler.pins for n in p.lock.held.path()}
            assert sum(n.computed for n in live.values()) == stats.kv_tokens_used - stats.kv_tokens_cached
            assert stats.kv_tokens_pinned == 30

        finish(engine, adds_up)


# -- pins -------------------------------------------------------------------------------------------------


def test_pins_survive_eviction_and_yield_to_requests() -> None:
    clock = Clock()
    with serve(kv_tokens=80, clock=clock) as engine:
        engine.generate(some(30), greedy(1))
        engine.generate(some(20, 1), greedy(1))
        weak, strong = engine.pin(some(30), priority=0), engine.pin(some(20, 1), priority=1)
        assert engine.reset_prefix_cache() == 0
        engine.generate(some(40, 2), greedy(1))
        assert not engine.unpin(weak), "the weaker pin gave way"
        assert engine.stats().num_pins == 1
        assert engine.generate(some(20, 1), greedy(1))[0].num_cached_tokens == 20
        engine.generate(some(70, 3), greedy(10))
        assert not engine.unpin(strong)
        engine.check()


def test_pins_expire() -> None:
    clock = Clock()
    with serve(clock=clock) as engine:
        engine.generate(some(30), greedy(1))
        engine.pin(some(30), ttl=5.0)
        clock.now = 4.9
        engine.step()
        assert engine.stats().num_pins == 1
        clock.now = 5.0
        engine.step()
        assert engine.stats().num_pins == 0 and engine.reset_prefix_cache() == 30


def test_pins_are_counted_and_hold_only_what_is_cached() -> None:
    with serve(limits=Limits(max_pins=1)) as engine:
        assert engine.pin(some(9)) is None
        engine.generate(some(9), greedy(1))
        assert engine.pin(some(9) + some(5, 1)) is not None
        assert engine.stats().kv_tokens_pinned == 9
        with pytest.raises(Exception, match="at most 1 prefixes"):
            engine.pin(some(9))


def test_pins_stay_where_a_request_would_not_fit_without_them() -> None:
    with serve(kv_tokens=100) as engine:
        engine.generate([some(12), some(12, 1)], greedy(1))
        pins = {engine.pin(some(12)), engine.pin(some(12, 1))}
        runs = engine.submit(some(30, 2), greedy(30, ignore_eos=True))
        engine.step()
        waits = engine.submit(some(78, 3), greedy(1))
        for _ in range(5):
            engine.step()
            assert engine.pins == pins and engine.stats().num_waiting == 1
        assert list(finish(engine)) == [runs, waits]


def test_a_pin_of_its_own_prompt_is_no_room_for_a_request() -> None:
    with serve(kv_tokens=100) as engine:
        engine.generate([some(40)], greedy(1))
        pin = engine.pin(some(40))
        engine.submit(some(30, 2), greedy(30, ignore_eos=True))
        engine.step()
        engine.submit(some(40) + some(40, 3), greedy(1))
        engine.step()
        assert engine.pins == {pin} and engine.stats().num_waiting == 1


def test_as_many_pins_yield_as_a_waiting_request_needs() -> None:
    with serve(kv_tokens=100) as engine:
        engine.generate([some(20, seed) for seed in range(3)], greedy(1))
        pins = [engine.pin(some(20, seed)) for seed in range(3)]
        engine.submit(some(10, 4), greedy(20, ignore_eos=True))
        engine.step()
        engine.submit(some(35, 5), greedy(1))
        engine.step()  # which was begun before
        engine.step()
        assert engine.pins == {pins[2]} and engine.stats().num_waiting == 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_pin_that_frees_nothing_outlives_preemption(n: int) -> None:
    """The prompt of the oldest is pinned: what the others hold is all that can give way."""
    with serve(kv_tokens=60) as engine:
        oldest = engine.submit(some(20), greedy(35, ignore_eos=True))
        engine.step()
        pin = engine.pin(some(20))
        engine.submit(some(6, 1), greedy(35, ignore_eos=True, n=n))
        while oldest in engine._core.requests:
            assert engine.pins == {pin}
            engine.step()
            engine.check()
        assert engine.stats().preemptions > 0
        finish(engine)


@pytest.mark.parametrize("seed", range(20))
def test_what_pins_can_yield_is_what_their_release_frees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with serve(kv_tokens=2_000) as engine:
        texts = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(12)]
        engine.generate(texts, greedy(1))
        for text in texts[:8]:
            engine.pin(text, priority=int(rng.integers(3)))
        for text in texts[6:]:
            engine.submit(text, greedy(int(rng.integers(1, 9)), ignore_eos=True))
        for _ in range(3):
            engine.step()
        wanted = rng.integers(0, 2, 12).astype(np.int32)
        tree, pins = engine._core.tree, engine._core.scheduler.pins

        def room() -> tuple[int, int]:
            match = tree.match_prefix(wanted)
            assert match is not None
            total = tree.pool.free + tree.evictable_tokens
            return total, total - match.evictable

        (total, without), found = room(), (pins.freed_by_release(), pins.freed_by_release(tree.match_prefix(wanted)))
        while pins.release_weakest():
            engine.check()
        assert room() == (total + found[0], without + found[1])
        assert pins.freed_by_release() == 0


# -- deadlines, cancels, bounds ---------------------------------------------------------------------------


def test_deadlines_end_waiting_and_running_requests() -> None:
    clock = Clock()
    with serve(limits=Limits(max_num_seqs=1), clock=clock) as engine:
        runs = engine.submit(some(5), greedy(50), timeout=3.0)
        waits = engine.submit(some(6, 1), greedy(50), timeout=2.0)
        stays = engine.submit(some(7, 2), greedy(4))

        def tick() -> None:
            clock.now += 0.5

        ended = finish(engine, tick)
    assert list(ended) == [waits, runs, stays]
    assert [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in ended.values()] == [
        ("abort", "deadline"),
        ("abort", "deadline"),
        ("length", None),
    ]
    assert ended[waits].outputs[0].token_ids == [] and 0 < len(ended[runs].outputs[0].token_ids) < 50


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, "", True])
def test_bad_timeouts(timeout: object) -> None:
    with serve() as engine, pytest.raises(InvalidRequest, match="timeout"):
        engine.submit([1], greedy(1), timeout=timeout)


def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    with serve(limits=Limits(max_waiting=3, max_waiting_tokens=20)) as engine:
        engine.submit(some(15), greedy(2))
        with pytest.raises(QueueFull, match="waiting_tokens=21: at most 20"):
            engine.submit(some(6), greedy(2))
        engine.submit(some(3), greedy(2))
        engine.submit(some(1), greedy(2))
        with pytest.raises(QueueFull, match="waiting=4: at most 3"):
            engine.submit(some(1), greedy(2))
        engine.step()
        engine.submit(some(15, 1), greedy(2))
        assert len(finish(engine)) == 4


def test_generate_feeds_a_short_queue() -> None:
    prompts = [some(5, seed) for seed in range(30)]
    with serve(limits=Limits(max_waiting=2, max_num_seqs=3)) as engine:
        assert [len(o.outputs[0].token_ids) for o in engine.generate(prompts, greedy(3))] == [3] * 30


@pytest.mark.parametrize("steps", range(8))
def test_cancel_at_any_moment(steps: int) -> None:
    prompt = some(20)
    with serve(max_step_tokens=8) as engine:
        expected = engine.generate(prompt, greedy(6))[0].outputs
        engine.reset_prefix_cache()
        ids = [engine.submit(prompt, greedy(6)) for _ in range(3)]
        ended: list[str] = []
        for _ in range(steps):
            ended += [output.request_id for output in engine.step() if output.finished]
        if ids[0] not in ended:
            engine.cancel(ids[0])
        with pytest.raises(UnknownRequest):
            engine.cancel(ids[0])
        again = engine.submit(prompt, greedy(6))
        outputs = finish(engine)
    assert [*ended, *outputs].count(ids[0]) == 1
    assert all(outputs[name].outputs == expected for name in (*ids[1:], again))


def test_an_id_is_free_again_once_its_last_output_was_collected() -> None:
    with serve() as engine:
        engine.submit([1], greedy(5), request_id="mine")
        engine.cancel("mine")
        with pytest.raises(DuplicateRequest):
            engine.submit([1], greedy(5), request_id="mine")
        assert [output.finished for output in engine.step()] == [True]
        engine.submit([1], greedy(5), request_id="mine")
        assert list(finish(engine)) == ["mine"]


def test_generated_ids_avoid_those_of_callers() -> None:
    with serve() as engine:
        names = [engine.submit([1], greedy(2), request_id="request-2"), *(engine.submit([1], greedy(2)) for _ in "ab")]
        assert len(set(names)) == 3 and len(finish(engine)) == 3


# -- rows -------------------------------------------------------------------------------------------------


def rows_of(engine: Engine, work: Callable[[], object]) -> tuple[int, int]:
    """Rows computed and steps run by `work`."""
    before = engine.stats()
    work()
    after = engine.stats()
    return after.computed_rows - before.computed_rows, after.steps - before.steps


def test_identical_requests_are_one_row() -> None:
    with serve() as engine:
        rows, _ = rows_of(engine, lambda: engine.generate([some(9)] * 8, greedy(6)))
        assert rows == 9 + 5
        rows, _ = rows_of(engine, lambda: engine.generate([some(9)] * 8, greedy(1)))
        assert rows == 1


def test_a_path_of_several_nodes_is_prefilled_in_one_step() -> None:
    with serve() as engine:
        prompts = [some(10) + some(5, 1), some(10) + some(5, 2), some(4)]
        assert rows_of(engine, lambda: engine.generate(prompts, greedy(1))) == (20, 1)


def test_read_rows_count_against_the_budget() -> None:
    with serve(max_step_tokens=1) as engine:
        prompts = [some(6, 1), some(6, 2), some(6, 3)]
        engine.generate(prompts, greedy(1))
        assert rows_of(engine, lambda: engine.generate(prompts, greedy(1))) == (3, 3)


def test_scores_compute_each_position_once_and_then_only_read() -> None:
    prompt, continuations = some(12), [[1, 2, 3], [1, 2, 4], [5]]
    with serve() as engine:
        cold: list[list[float]] = []
        rows, steps = rows_of(engine, lambda: cold.extend(engine.score(prompt, continuations)))
        assert (rows, steps) == (12 + 2, 1), "the last token of a continuation needs no row"
        used = engine.stats().kv_tokens_used
        warm: list[list[float]] = []
        rows, steps = rows_of(engine, lambda: warm.extend(engine.score(prompt, continuations)))
        assert (rows, steps) == (3, 1) and engine.stats().kv_tokens_used == used
        assert warm == cold


@pytest.mark.parametrize("budget", [2048, 5])
def test_the_first_output_has_the_scores_of_the_prompt(budget: int) -> None:
    with serve(max_step_tokens=budget) as engine:
        for _ in ("cold", "warm"):
            outputs = list(engine.stream(some(12), greedy(3, prompt_logprobs=1)))
            assert [len(o.prompt_logprobs or []) for o in outputs] == [12, 0, 0]
            assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 1, 1]


def test_a_cold_prompt_is_scored_and_continued_in_one_step() -> None:
    with serve() as engine:
        assert rows_of(engine, lambda: engine.generate(some(12), greedy(1, prompt_logprobs=0))) == (12, 1)


@pytest.mark.parametrize("error", [RuntimeError("planted"), AssertionError("planted")])
def test_what_scoring_raises_ends_its_request_unless_it_is_an_assertion(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def token_logprobs(*_: Any) -> list[dict[int, float]]:
        raise error

    monkeypatch.setattr("radixgen.engine.core.token_logprobs", token_logprobs)
    with serve() as engine:
        engine.submit(some(12), greedy(3, prompt_logprobs=0))
        if isinstance(error, AssertionError):
            with pytest.raises(AssertionError, match="planted"):
                engine.step()
            assert not caplog.messages
        else:
            (output,) = engine.step()
            assert [one.stop_reason for one in output.outputs] == ["RuntimeError('planted')"]
            assert "could not be scored" in caplog.text


def test_scored_rows_of_a_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixgen.scheduler.scheduler._MAX_SCORED", 4)
    with serve() as engine:
        scheduler = engine._core.scheduler
        schedule, most = scheduler.schedule, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            batch = schedule(*args, **kwargs)
            most.append(sum(len(part.rows) for part in batch.scoring) if batch else 0)
            return batch

        monkeypatch.setattr(scheduler, "schedule", watched)
        prompts = [some(10, 1), some(10, 2), some(10, 1)]
        outputs = engine.generate(prompts, greedy(2, prompt_logprobs=0))
    assert max(most) == 4
    assert [len(output.prompt_logprobs) for output in outputs] == [10] * 3
    assert outputs[0].prompt_logprobs == outputs[2].prompt_logprobs


def test_a_prompt_before_what_is_scored_is_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of rows whose logits are read."""
    monkeypatch.setattr("radixgen.scheduler.scheduler._MAX_SCORED", 4)
    prompt = some(50)
    with serve(max_step_tokens=64) as engine:
        steps = engine.num_steps
        (scores,) = engine.score(prompt, [[1, 2, 3]])
        assert len(scores) == 3 and engine.num_steps - steps == 1
        steps = engine.num_steps
        (more,) = engine.score(prompt[:20] + prompt[:20], [[1, 2, 3, 4, 5, 6]])
        assert len(more) == 6 and engine.num_steps - steps == 2
        assert rows_of(engine, lambda: engine.score(prompt, [[1, 2, 3]])) == (3, 1)


def test_decoding_goes_before_a_prompt_of_higher_priority() -> None:
    with serve(max_step_tokens=8) as engine:
        for seed in range(3):
            engine.submit(some(3, seed), greedy(20, ignore_eos=True))
        for _ in range(4):
            engine.step()
        engine.submit(some(60, 9), greedy(1), priority=1)
        for _ in range(6):
            assert len(engine.step()) >= 3


def test_what_is_cached_needs_no_room() -> None:
    prompt = some(40)
    with serve(kv_tokens=80) as engine:
        engine.generate(prompt, greedy(1))
        for token in range(3):
            engine.submit([*prompt, token], greedy(8, ignore_eos=True))
        engine.step()
        assert engine.stats().num_running == 3


def test_who_is_let_in_is_not_thrown_out_at_once() -> None:
    """What is cached and about to be used again is no room for anyone."""
    with serve(kv_tokens=64) as engine:
        engine.generate(some(30), greedy(1))
        engine.submit(some(30), greedy(20, ignore_eos=True))
        engine.submit(some(33, 1), greedy(5, ignore_eos=True))
        engine.step()
        assert engine.stats().num_running == 1
        finish(engine)
        assert engine.stats().preemptions == 0


def test_unpin_frees_what_was_kept() -> None:
    with serve() as engine:
        engine.generate(some(12), greedy(1))
        pin = engine.pin(some(12))
        assert pin is not None and engine.reset_prefix_cache() == 0
        assert engine.unpin(pin) and not engine.unpin(pin)
        assert engine.reset_prefix_cache() == 12


def test_rows_of_prompts_are_counted_when_they_were_computed() -> None:
    with serve(max_step_tokens=4) as engine:
        engine.generate(some(9), greedy(6))
        assert engine.stats().computed_prompt_tokens == 9
        engine._model.fail_next = RuntimeError("planted")
        engine.generate(some(7, 1), greedy(2))
        assert engine.stats().computed_prompt_tokens == 9 + 7


def test_rows_that_score_a_cached_prompt_keep_to_the_budget() -> None:
    with serve(max_step_tokens=5) as engine:
        engine.generate(some(12), greedy(1))
        engine.submit(some(12), greedy(1, prompt_logprobs=0))
        while engine.has_unfinished:
            assert rows_of(engine, engine.step)[0] <= 5


def test_a_full_pool_is_not_handed_out_slot_by_slot() -> None:
    with serve(kv_tokens=256) as engine:
        engine.generate([some(60, seed) for seed in range(4)], greedy(4))
        engine.submit(some(9, 9), greedy(100, ignore_eos=True))
        most = 0
        while engine.has_unfinished:
            engine.step()
            most = max([most, *(len(s.cursor.held.extents) for s in engine._core.scheduler.running)])
        assert most <= 12


def test_who_holds_no_slot_alone_is_spared() -> None:
    with serve(kv_tokens=60) as engine:
        engine.submit(some(20), greedy(35, ignore_eos=True), request_id="oldest")
        engine.submit(some(15, 1), greedy(35, ignore_eos=True), request_id="alone")
        engine.submit(some(20), greedy(35, ignore_eos=True), request_id="twin")
        waited: list[str] = []

        def note() -> None:
            if engine.stats().preemptions:
                waited.extend(sequence.request.id for sequence in engine._core.scheduler.waiting)

        finish(engine, note)
    assert waited[0] == "alone"


def test_the_oldest_of_equal_pins_gives_way_first() -> None:
    with serve(kv_tokens=80) as engine:
        pins = []
        for seed in range(3):
            engine.generate(some(20, seed), greedy(1))
            pins.append(engine.pin(some(20, seed)))
        engine.generate(some(30, 9), greedy(1))
        assert engine.stats().num_pins == 2
        assert [engine.unpin(pin) for pin in pins] == [False, True, True]


def test_pins_expire_one_after_the_other() -> None:
    clock = Clock()
    with serve(clock=clock) as engine:
        for seed, ttl in enumerate((5.0, 10.0, 50.0)):
            engine.generate(some(8, seed), greedy(1))
            engine.pin(some(8, seed), ttl=ttl)
        for now, left in ((5.0, 2), (9.0, 2), (10.0, 1), (49.0, 1), (50.0, 0)):
            clock.now = now
            engine.step()
            assert engine.stats().num_pins == left
