"""Beam search finds what transformers finds, on cursors that move nothing, however crowded the engine is."""

import asyncio
import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

import families
import numpy as np
import pytest
import torch
from beams import TIE, OracleLM, reference_search
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import StampModel
from texts import tokenizer
from transformers import AutoModelForCausalLM

import radixgen.engine.core as core_module
from radixgen import (
    AsyncEngine,
    BeamSearchParams,
    CompletionOutput,
    Engine,
    InvalidRequest,
    Limits,
    PromptTooLong,
    RequestOutput,
    SamplingParams,
)
from radixgen.model import smollm2
from radixgen.sampling.beam_search import BeamSearch, Choices
from radixgen.thoughts import beam, beam_async

WIDTHS = [1, 2, 4, 8]
EARLY = [False, True, "never"]
WAYS = list(product([0.5, 1.0, 2.0], EARLY))
NAMES = ["llama", "qwen3", "gemma2", "gpt2", "deepseek-v3"]
ENDS = (5, 9, 33, 41)
"""With a few ends some hypotheses end early, and some never."""


def some(count: int, seed: int = 0, vocab: int = families.VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def told(outputs: Sequence[CompletionOutput]) -> list[list[int]]:
    return [one.token_ids for one in outputs]


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """The one output with which each request ends."""
    ended: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.request_id not in ended
            if output.finished:
                ended[output.request_id] = output
        engine.check()
    return ended


def serve(vocab: int = 24, **options: Any) -> Engine:
    return Engine(StampModel(vocab, 64), **{"kv_tokens": 512, "debug": True} | options)


# -- what is found ----------------------------------------------------------------------------------------


def compare(model: Any, engine: Engine, prompts: list[list[int]], params: BeamSearchParams) -> tuple[int, int]:
    """How many hypotheses were compared, and how many searches parted at a tie."""
    compared = ties = 0
    for prompt, output in zip(prompts, engine.beam_search(prompts, params), strict=True):
        want = reference_search(model, prompt, params, params.stop_token_ids)
        if told(output.outputs) != want.token_ids:
            assert want.margin < TIE, (params, told(output.outputs), want)
            ties += 1
            continue
        compared += len(want.token_ids)
        for one, score in zip(output.outputs, want.scores, strict=True):
            assert one.score == pytest.approx(score, abs=1e-4)
            assert one.score == pytest.approx(one.cumulative_logprob / len(one.token_ids) ** params.length_penalty)
            assert one.finish_reason == ("stop" if one.token_ids[-1] in params.stop_token_ids else "length")
            assert one.stop_reason == (one.token_ids[-1] if one.finish_reason == "stop" else None)
    engine.check()
    return compared, ties


@pytest.mark.parametrize("place", range(len(NAMES)), ids=NAMES)
def test_five_architectures(place: int) -> None:
    """Two prompts at once, one the beginning of the other; each width meets every pair of penalty and early stopping in
    some model. No tie has been seen.
    """
    reference, model = families.build(NAMES[place]), families.build(NAMES[place])
    prompts = [some(20), some(20)[:9]]
    compared = ties = 0
    with Engine(model, kv_tokens=1024, debug=True) as engine:
        for turn, width in enumerate(WIDTHS):
            for way in (2 * place + turn, 2 * place + turn + 1):
                penalty, early = WAYS[way % len(WAYS)]
                params = BeamSearchParams(
                    beam_width=width, max_tokens=8, length_penalty=penalty, early_stopping=early, stop_token_ids=ENDS
                )
                found = compare(reference, engine, prompts, params)
                compared, ties = compared + found[0], ties + found[1]
    assert ties <= 1 and compared >= 2 * 2 * sum(WIDTHS) - 8 * ties


@pytest.mark.slow
def test_smollm2() -> None:
    """No tie has been seen."""
    path = smollm2.fetch()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with Engine(path, dtype="float32", kv_tokens=512) as engine:
        prompt = engine.tokenize("A haiku about the sea:").tolist()
        ends = (int(engine.tokenizer.eos_token_id), *engine.tokenize(".,").tolist())
        found = [
            compare(reference, engine, [prompt], BeamSearchParams(beam_width=w, max_tokens=8, stop_token_ids=ends))
            for w in WIDTHS
        ]
    assert sum(ties for _, ties in found) <= 1 and sum(count for count, _ in found) >= sum(WIDTHS) - 8


@st.composite
def searches(draw: st.DrawFn) -> BeamSearchParams:
    most = draw(st.integers(1, 10))
    return BeamSearchParams(
        beam_width=draw(st.sampled_from([1, 2, 3, 4, 8])),
        max_tokens=most,
        min_tokens=draw(st.sampled_from([0, 0, most // 2, most])),
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from(EARLY)),
        stop_token_ids=tuple(draw(st.lists(st.integers(2, 15), max_size=4, unique=True))),
    )


@settings(max_examples=25, deadline=None)
@given(
    params=searches(),
    prompts=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=12), min_size=1, max_size=2),
    spare=st.sampled_from([0, 3, 10, 200]),
    budget=st.sampled_from([1, 3, 16, 64]),
    seats=st.sampled_from([8, 9, 64]),
    share=st.sampled_from([True, True, True, False]),
    plan=st.sampled_from(["auto", "unshared", "naive"]),
)
def test_the_rules_are_those_of_transformers(
    params: BeamSearchParams,
    prompts: list[list[int]],
    spare: int,
    budget: int,
    seats: int,
    share: bool,
    plan: Any,
) -> None:
    """Logits are the same to the last bit, and so are the results, in pools down to the length of one beam."""
    engine = serve(
        kv_tokens=max(map(len, prompts)) + params.max_tokens - 1 + spare,
        max_step_tokens=budget,
        limits=Limits(max_num_seqs=seats),
        share=share,
        plan=plan,
    )
    reference = OracleLM(24)
    with engine:
        names = [engine.submit(prompt, params) for prompt in prompts]
        ended = finish(engine)
        assert engine._core.tree.reset() == engine._core.tree.pool.capacity - engine._core.tree.pool.free == 0 or share
        for name, prompt in zip(names, prompts, strict=True):
            want = reference_search(reference, prompt, params, params.stop_token_ids)
            assert told(ended[name].outputs) == want.token_ids
            assert [one.score for one in ended[name].outputs] == pytest.approx(want.scores, abs=1e-4)


# -- what it costs ----------------------------------------------------------------------------------------


def test_a_beam_that_goes_on_moves_nothing() -> None:
    """Each step computes a row a beam, a slot holds a token that no other does, and a beam keeps its slots."""
    params = BeamSearchParams(beam_width=6, max_tokens=14)
    prompt = some(12, vocab=24)
    computed, alone, forked = prefixes([prompt]), 0, 0
    with serve() as engine:
        engine.submit(prompt, params, request_id="search")
        engine.step()
        request = engine._core.requests["search"]
        while not request.finished:
            before, beams = engine.stats(), list(request.sequences)
            held = {beam: (beam.cursor, beam.cursor.held, slots_of(beam.cursor.held)) for beam in beams}
            computed |= prefixes([beam.tokens().tolist() for beam in beams])
            engine.step()
            engine.check()
            stats = engine.stats()
            assert stats.computed_rows - before.computed_rows == len(beams) == params.beam_width
            assert stats.kv_tokens_used == len(computed)
            if not request.finished:
                live = prefixes([beam.tokens().tolist()[:-1] for beam in request.sequences])
                assert stats.kv_tokens_used - stats.kv_tokens_cached == len(live)
            for beam in set(beams) & set(request.sequences):
                cursor, node, slots = held[beam]
                assert beam.cursor is cursor and slots_of(cursor.held)[: len(slots)] == slots
                alone += cursor.held is node
            forked += not request.finished and len(set(request.sequences) - set(beams))
        assert stats.preemptions == 0 and stats.computed_rows == len(prompt) + params.beam_width * (
            params.max_tokens - 1
        )
    assert alone > 5 and forked > 5


def prefixes(texts: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(text[:stop]) for text in texts for stop in range(1, len(text) + 1)}


def slots_of(node: Any) -> list[int]:
    """The slots of a path's computed tokens."""
    return [slot for part in node.path() for slot in part.slots(0, part.computed).tolist()]


def test_the_second_search_computes_nothing() -> None:
    prompt, params = some(12, vocab=24), BeamSearchParams(beam_width=4, max_tokens=8)
    with serve() as engine:
        first = engine.beam_search(prompt, params)[0]
        used = engine.stats().kv_tokens_used
        second = engine.beam_search(prompt, params)[0]
        assert engine.stats().kv_tokens_used == used
        assert second.outputs == first.outputs and second.num_cached_tokens == len(prompt)


def test_one_beam_at_a_time_where_no_more_fit() -> None:
    """A pool that holds one beam serves eight, by preemption; one that does not hold it refuses the request."""
    prompt, params = some(12, vocab=24), BeamSearchParams(beam_width=8, max_tokens=9)
    with serve() as engine:
        want = engine.beam_search(prompt, params)[0].outputs
    with serve(kv_tokens=20) as engine:
        assert engine.beam_search(prompt, params)[0].outputs == want
        assert engine.stats().computed_rows > 8 * 8
    with serve(kv_tokens=19) as engine, pytest.raises(PromptTooLong, match="max_tokens"):
        engine.beam_search(prompt, params)


def test_no_step_of_a_search_is_begun_ahead() -> None:
    with serve() as engine:
        engine.beam_search(some(9, vocab=24), BeamSearchParams(beam_width=4, max_tokens=8))
        assert engine._model.rows_ahead == engine.stats().wasted_rows == 0
        engine.generate(some(9, vocab=24), SamplingParams(max_tokens=8))
        assert engine._model.rows_ahead > 0


# -- among others -----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data(), slots=st.integers(24, 90), budget=st.sampled_from([1, 4, 16, 64]), seats=st.integers(6, 12))
def test_searches_and_requests_do_not_disturb_each_other(
    data: st.DataObject, slots: int, budget: int, seats: int
) -> None:
    """In a pool that is always full, with cancels and failed steps: everything ends once, as it would alone."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=10)
    asks = data.draw(
        st.lists(st.tuples(tokens, st.sampled_from([BeamSearchParams, SamplingParams])), min_size=2, max_size=6)
    )
    cancelled = data.draw(st.dictionaries(st.integers(1, 40), st.integers(0, len(asks) - 1), max_size=2))
    failing = data.draw(st.lists(st.integers(1, 40), max_size=2))
    limits = Limits(max_num_seqs=seats)
    ways = {
        BeamSearchParams: BeamSearchParams(beam_width=4, max_tokens=10, stop_token_ids=(3,), early_stopping=True),
        SamplingParams: SamplingParams(n=2, seed=5, max_tokens=10),
    }
    with serve(vocab=6) as engine:
        want = [told(engine.generate(prompt, ways[kind])[0].outputs) for prompt, kind in asks]
    logging.getLogger("radixgen.engine.core").disabled = True
    with serve(vocab=6, kv_tokens=slots, max_step_tokens=budget, limits=limits) as engine:
        names = [engine.submit(prompt, ways[kind], output_kind="final") for prompt, kind in asks]
        ended: dict[str, RequestOutput] = {}
        steps = 0
        while engine.has_unfinished:
            steps += 1
            engine._model.fail_next = RuntimeError("planted") if steps in failing else None
            if steps in cancelled and names[cancelled[steps]] in engine._core.requests:
                engine.cancel(names[cancelled[steps]])
            for output in engine.step():
                assert output.finished and output.request_id not in ended
                ended[output.request_id] = output
            engine.check()
            assert steps < 2_000, "stuck"
        engine._core.tree.reset()
        assert engine._core.tree.pool.free == engine._core.tree.pool.capacity
    logging.getLogger("radixgen.engine.core").disabled = False
    assert ended.keys() == set(names)
    for name, expected, (_, kind) in zip(names, want, asks, strict=True):
        outputs = ended[name].outputs
        if {one.finish_reason for one in outputs} <= {"stop", "length"}:
            assert told(outputs) == expected
        elif kind is BeamSearchParams:
            assert len({one.finish_reason for one in outputs}) == 1 and 1 <= len(outputs) <= 4
    untouched = set(names) - {names[place] for place in cancelled.values()}
    if not failing:
        assert all(one.finish_reason in ("stop", "length") for name in untouched for one in ended[name].outputs)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("reason", ["cancel", "deadline"])
def test_a_search_that_is_ended_tells_how_far_it_came(steps: int, reason: str) -> None:
    now = 0.0
    prompt, params = some(9, vocab=24), BeamSearchParams(beam_width=4, max_tokens=20, stop_token_ids=(4, 5))
    with serve(clock=lambda: now) as engine:
        name = engine.submit(prompt, params, timeout=10.0)
        for _ in range(steps):
            assert engine.step() == []
        if reason == "cancel":
            engine.cancel(name)
        now = 11.0
        (output,) = engine.step()
        engine.check()
        assert not engine.has_unfinished and output.finished
        assert {one.finish_reason for one in output.outputs} == {"abort"}
        assert {one.stop_reason for one in output.outputs} == {"deadline" if reason == "deadline" else None}
        assert max(len(one.token_ids) for one in output.outputs) == steps
        scores = [one.score for one in output.outputs]
        assert scores == sorted(scores, reverse=True) and len(scores) == (4 if steps else 1)


def test_a_search_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What its candidates' choice raises is its own error."""
    plain = core_module.likeliest
    params = BeamSearchParams(beam_width=3, max_tokens=6)

    def likeliest(logits: torch.Tensor, rows: Sequence[int], count: int, drawable: None) -> list[Choices]:
        if count == 5:
            raise RuntimeError("planted")
        return plain(logits, rows, count)

    monkeypatch.setattr(core_module, "likeliest", likeliest)
    with serve() as engine:
        good, bad = engine.submit([1, 2, 3], params), engine.submit([1, 2, 3], BeamSearchParams(beam_width=5))
        other = engine.submit([1, 2], SamplingParams(max_tokens=6), output_kind="final")
        ended = finish(engine)
        assert [one.stop_reason for one in ended[bad].outputs] == ["RuntimeError('planted')"]
        assert len(ended[good].outputs) == 3 and len(ended[other].outputs[0].token_ids) == 6
    assert "could not go on" in caplog.text


def test_logits_that_are_no_numbers_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as engine:
        run, steps = engine._model.run, iter(range(99))

        def spoil(*args: Any) -> torch.Tensor:
            logits = run(*args)
            return logits * torch.nan if next(steps) == 3 else logits

        monkeypatch.setattr(engine._model, "run", spoil)
        output = engine.beam_search([1, 2, 3], BeamSearchParams(beam_width=3))[0]
        assert {one.stop_reason for one in output.outputs} == {"the model's logits are not finite"}
        assert {one.finish_reason for one in output.outputs} == {"error"}
        engine.check()


# -- how it is asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0),
        ("beam_width", 129),
        ("beam_width", True),
        ("beam_width", 2.0),
        ("length_penalty", float("nan")),
        ("length_penalty", 11.0),
        ("length_penalty", "1"),
        ("early_stopping", "always"),
        ("early_stopping", 1.0),
        ("early_stopping", None),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("stop_token_ids", 3),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", 1),
    ],
)
def test_bad_params_are_refused_by_name(field: str, value: Any) -> None:
    with serve() as engine:
        for ask in (engine.submit, engine.beam_search, engine.generate):
            with pytest.raises(InvalidRequest) as caught:
                ask([1, 2], BeamSearchParams(**{"beam_width": 2, field: value}))
            assert caught.value.field == field
        assert not engine.has_unfinished


def test_wider_than_there_are_seats_is_refused() -> None:
    with serve(limits=Limits(max_num_seqs=3)) as engine:
        assert len(engine.beam_search([1], BeamSearchParams(beam_width=3))[0].outputs) == 3
        with pytest.raises(InvalidRequest, match="beam_width=4"):
            engine.beam_search([1], BeamSearchParams(beam_width=4))


def test_other_params_are_no_search() -> None:
    with serve() as engine, pytest.raises(InvalidRequest, match="must be BeamSearchParams"):
        engine.beam_search([1], SamplingParams())  # type: ignore[arg-type]


def test_a_search_is_not_forked() -> None:
    with serve() as engine:
        name = engine.submit([1, 2], BeamSearchParams(beam_width=2))
        with pytest.raises(InvalidRequest, match="not forked"):
            engine.fork(name)
        assert len(finish(engine)[name].outputs) == 2


def test_a_stream_of_a_search_is_its_end() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=5)
    with serve() as engine:
        want = engine.beam_search([1, 2], params)[0].outputs
        (output,) = engine.stream([1, 2], params)
        assert output.outputs == want
        both = engine.generate([[1, 2], [1, 2]], [params, SamplingParams(temperature=0.0, max_tokens=5)])
        assert both[0].outputs == want and len(both[1].outputs) == 1


def test_text_of_hypotheses() -> None:
    """The token that ends one is among its tokens and not in its text."""
    with Engine(families.build("llama"), tokenizer=tokenizer(), kv_tokens=512) as engine:
        params = BeamSearchParams(beam_width=4, max_tokens=6, stop_token_ids=range(20, 60))
        with pytest.raises(InvalidRequest, match="stop_token_ids"):
            engine.beam_search("hello", params)
        params = BeamSearchParams(beam_width=4, max_tokens=6, stop_token_ids=tuple(range(20, 60)))
        outputs = engine.beam_search("hello", params)[0].outputs
        assert {one.finish_reason for one in outputs} >= {"stop"}
        for one in outputs:
            shown = one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
            assert one.text == engine.decode(shown)


def test_beams_by_their_short_name() -> None:
    prompt, engine = some(9, vocab=24), serve()
    (whole,) = engine.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=5, length_penalty=0.5))
    assert beam(engine, prompt, 3, max_tokens=5, length_penalty=0.5) == whole.outputs

    async def search() -> list[CompletionOutput]:
        async with AsyncEngine(serve()) as served:
            return await beam_async(served, prompt, 3, max_tokens=5, length_penalty=0.5)

    assert asyncio.run(search()) == whole.outputs


def test_async_searches_go_on_beside_others() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=6)
    with serve() as engine:
        want = [output.outputs for output in engine.beam_search([[1, 2, 3], [1, 2]], params)]

    async def main() -> None:
        async with AsyncEngine(serve()) as engine:
            one = asyncio.create_task(engine.beam_search([[1, 2, 3], [1, 2]], params))
            (last,) = [output async for output in engine.generate([1, 2], params)]
            assert [output.outputs for output in await one] == want and last.outputs == want[1]
            with pytest.raises(InvalidRequest, match="BeamSearchParams"):
                await engine.beam_search([1], SamplingParams())  # type: ignore[arg-type]
            left = asyncio.create_task(
                engine.beam_search([[1, 2, 3]] * 8, BeamSearchParams(beam_width=8, max_tokens=60))
            )
            await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            await engine.check()

    asyncio.run(main())


# -- numbers alone ----------------------------------------------------------------------------------------


def choices(*log_probs: float) -> Choices:
    order = np.argsort(-np.array(log_probs), kind="stable")
    return Choices(np.array(log_probs, np.float32)[order], order)


def test_equal_candidates_go_in_order() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2), 16, frozenset())
    assert [beam.token_ids for beam in search.select([choices(-1, -1, -1)])] == [[0], [1]]
    found = search.select([choices(-2, -1, -1), choices(-1, -1, -2)])
    assert [(beam.parent, beam.token_ids) for beam in found] == [(0, [0, 1]), (0, [0, 2])]


def test_fewer_tokens_than_beams() -> None:
    """Where transformers would fill up with copies, there are fewer beams."""
    search = BeamSearch(BeamSearchParams(beam_width=8), 2, frozenset())
    assert len(search.select([choices(-1, -2, -np.inf)])) == 2
    search.select([choices(-1, -2, -3)] * 2)
    assert search.done and len(search.hypotheses) == 6


def test_an_end_held_back_is_given_where_nothing_else_is_left() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, min_tokens=3), 8, frozenset([0, 1]))
    search.select([choices(-1, -2, -np.inf)])
    assert [one.token_ids for one in search.hypotheses] == [[0], [1]] and search.done


@pytest.mark.parametrize(
    ("early", "penalty", "done"), [(True, 1.0, True), (False, 1.0, True), ("never", 1.0, False), ("never", -1.0, True)]
)
def test_when_a_search_is_over(early: Any, penalty: float, done: bool) -> None:
    """Two hypotheses are at hand; the best beam is worse than both as it stands, and better had it 16 tokens."""
    params = BeamSearchParams(beam_width=2, early_stopping=early, length_penalty=penalty)
    search = BeamSearch(params, 16, frozenset([0]))
    search.select([choices(-1, -1.1, -3, -9)])
    assert not search.done
    search.select([choices(-1.9, -2.1, -9, -9), choices(-9, -9, -9, -9)])
    assert [one.token_ids for one in search.hypotheses] == [[0], [1, 0]] and search.done is done


@pytest.mark.parametrize("early", EARLY)
def test_a_search_of_width_one_is_greedy(early: Any) -> None:
    search = BeamSearch(BeamSearchParams(beam_width=1, early_stopping=early), 16, frozenset([0]))
    search.select([choices(-1, -1.1)])
    assert search.done and [one.token_ids for one in search.hypotheses] == [[0]]


@pytest.mark.parametrize("slots", [40, 400])
def test_only_hypotheses_are_saved_to_host_memory(slots: int) -> None:
    """Also where the beams take turns, because the pool has no room for all of them."""
    prompt, params = some(20, vocab=24), BeamSearchParams(beam_width=4, max_tokens=8)
    with serve(24, kv_tokens=slots, host_kv_tokens=2_000) as engine:
        (output,) = engine.beam_search(prompt, params)
        host = engine._core.host
        assert host is not None
        host.saves.complete()
        paths = [[*prompt, *one.token_ids] for one in output.outputs]
        for path in paths:
            match = host.tree.match_prefix(path)
            assert match is not None and match.computed >= (len(path) - 1 if slots == 400 else len(prompt))
        for node in host.tree.nodes():
            saved = node.path_tokens().tolist()
            assert any(path[: len(saved)] == saved for path in paths)
