"""Steps that are begun before their tokens are known: used where they turned out as expected, and never wrong."""

from dataclasses import replace

import numpy as np
import pytest
from oracle import StampModel

from radixgen import Engine, SamplingParams
from radixgen.scheduler import planner as planner_module
from radixgen.scheduler.admission import Admission
from radixgen.scheduler.batch import Batch
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.scheduler import Scheduler

VOCAB = 50


def serve(
    params: list[SamplingParams], *, ahead: bool, slots: int = 4_000
) -> tuple[list[list[int]], Engine, StampModel]:
    """Outputs for prompts with a common beginning, by the oracle that checks every slot that is read."""
    model = StampModel(VOCAB, 256, frozenset({0}))
    engine = Engine(model, kv_tokens=slots, async_scheduling=ahead, debug=True)
    outputs = engine.generate([[5, 6, 7, index % VOCAB] for index in range(len(params))], params)
    engine.check()
    return [output.outputs[0].token_ids for output in outputs], engine, model


def many(count: int, **options: object) -> list[SamplingParams]:
    return [SamplingParams(**({"max_tokens": 20 + 3 * index, "seed": index} | options)) for index in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.0},
        {"temperature": 1.3},
        {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logprobs": 2},
    ],
)
@pytest.mark.parametrize("slots", [60, 200, 4_000])
def test_tokens_are_the_same(options: dict, slots: int) -> None:
    expected, plain, _ = serve(many(9, **options), ahead=False, slots=slots)
    found, engine, _ = serve(many(9, **options), ahead=True, slots=slots)
    assert found == expected
    assert plain.stats().wasted_rows == 0
    assert plain.stats().computed_rows == engine.stats().computed_rows


def test_most_steps_of_steady_decoding_were_begun_before() -> None:
    _, engine, model = serve(many(8, max_tokens=100, temperature=0.0, ignore_eos=True), ahead=True)
    assert model.rows_ahead > 0.8 * engine.stats().computed_rows
    assert engine.stats().wasted_rows <= 8


def test_rows_of_sequences_that_ended_by_a_token_are_wasted_and_no_others() -> None:
    """One ends at a time; the others' rows of the same step are used, and they go on ahead of the host."""
    _, engine, model = serve(many(8, temperature=0.0, ignore_eos=True), ahead=True)
    assert engine.stats().wasted_rows == 0
    assert model.rows_ahead > 0.9 * engine.stats().computed_rows
    _, engine, model = serve(many(8, temperature=0.0), ahead=True)
    assert 0 < engine.stats().wasted_rows <= 8
    assert model.rows_ahead > 0.9 * engine.stats().computed_rows


def test_while_only_lengths_grow_nothing_is_planned_or_laid_out(monkeypatch) -> None:
    model = StampModel(VOCAB, 256)
    with Engine(model, kv_tokens=4_000) as engine:
        for index in range(5):
            engine.submit([1, index], SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True))
        while model.rows_ahead < 20:
            engine.step()
        begun = model.rows_ahead
        for owner, name in (
            (Planner, "build_plan"),
            (planner_module, "revise"),
            (Admission, "admit"),
            (Scheduler, "_make_room"),
            (Scheduler, "_schedule_path"),
        ):
            monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(name))
        for _ in range(8):
            assert len(engine.step()) == 5
        assert model.rows_ahead - begun == 8 * 5


def test_leaves_run_out_of_room_together() -> None:
    """Sequences that began at any step: most steps need no new slots, so they are begun before."""
    model = StampModel(VOCAB, 512)
    with Engine(model, kv_tokens=20_000, debug=True) as engine:
        for index in range(40):
            engine.submit([1, index], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
            for _ in range(1 + index % 3):
                engine.step()
        before = model.rows_ahead
        for _ in range(100):
            engine.step()
        assert model.rows_ahead - before >= 0.85 * 100 * 40


def test_a_request_that_arrives_waits_for_one_step_at_most() -> None:
    model = StampModel(VOCAB, 256)
    with Engine(model, kv_tokens=4_000, debug=True) as engine:
        engine.submit([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True))
        for _ in range(5):
            engine.step()
        engine.submit([4, 5, 6], SamplingParams(max_tokens=3, ignore_eos=True), request_id="late")
        told = [output.request_id for _ in range(2) for output in engine.step()]
        assert "late" in told


def test_a_request_cancelled_in_flight_leaves_the_others_as_they_were() -> None:
    alone = serve(many(1, max_tokens=30, temperature=0.0, ignore_eos=True), ahead=False)[0][0]
    model = StampModel(VOCAB, 256)
    with Engine(model, kv_tokens=4_000, debug=True) as engine:
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        kept, gone = engine.submit([5, 6, 7, 0], params), engine.submit([5, 6, 7, 1], params)
        for _ in range(6):
            engine.step()
        engine.cancel(gone)
        outputs = {}
        while engine.has_unfinished:
            outputs |= {output.request_id: output for output in engine.step()}
            engine.check()
        assert outputs[kept].outputs[0].token_ids == alone


def test_a_model_that_fails_ahead_is_asked_again(monkeypatch, caplog) -> None:
    expected, _, _ = serve(many(3, temperature=0.0), ahead=False)
    monkeypatch.setattr(StampModel, "run_ahead", lambda *_: np.zeros(1) / "x")
    found, engine, _ = serve(many(3, temperature=0.0), ahead=True)
    assert found == expected and engine.stats().wasted_rows == 0
    assert "could not be begun" in caplog.text


def plans_and_rows_ahead(engine: Engine, model: StampModel, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Plans made and rows begun before their step, while 16 requests with answers of 100 tokens are served."""
    made, begun, freeze = [], model.rows_ahead, Scheduler.freeze
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "freeze", lambda *arguments: made.append(1) or freeze(*arguments))
        engine.generate([[5, 6, 7, index, 8] for index in range(16)], many(16, max_tokens=100, ignore_eos=True))
    engine.check()
    return len(made), model.rows_ahead - begun


def test_a_row_that_reads_what_is_not_its_own_spoils_no_other() -> None:
    """Sequences that follow what is cached end by another token, while the rows beside them are computed ahead."""
    answers = []
    for ahead in (False, True):
        model = StampModel(4, 64, frozenset({3}))
        with Engine(model, kv_tokens=4_000, async_scheduling=ahead, debug=True) as engine:
            params = [SamplingParams(n=3, max_tokens=30, seed=seed // 2) for seed in range(200)]
            outputs = [engine.generate([1, 2], one)[0].outputs for one in params]
            answers.append([(one.token_ids, one.finish_reason) for some in outputs for one in some])
    assert answers[0] == answers[1]


def test_what_is_cached_is_read_ahead_as_it_was_computed(monkeypatch) -> None:
    """The same requests once more, in as many passes, of which as many were begun before and as few were planned."""
    model = StampModel(500, 256)
    with Engine(model, kv_tokens=4_000, debug=True) as engine:
        plans, begun = plans_and_rows_ahead(engine, model, monkeypatch)
        steps, rows = engine.num_steps, engine.stats().computed_rows
        for _ in range(2):
            again, begun_again = plans_and_rows_ahead(engine, model, monkeypatch)
            assert again <= plans and begun_again >= begun - 5 * 16  # but where a run of slots ends, and at first
        assert engine.num_steps == 3 * steps
        assert engine.stats().wasted_rows <= 32
        assert engine.stats().computed_rows < 3 * rows
        assert engine.stats().kv_tokens_cached == 16 * (1 + 99 + 1) + 3  # nothing was stored twice


@pytest.mark.parametrize("slots", [40, 120, 4_000])
@pytest.mark.parametrize("vocab", [2, 4])
def test_answers_that_leave_what_is_cached_are_right(vocab: int, slots: int) -> None:
    """Few tokens to draw from, so that most draws follow cached ones for a while."""
    answers = []
    for ahead in (False, True):
        model = StampModel(vocab, 256)
        with Engine(model, kv_tokens=slots, async_scheduling=ahead, debug=True) as engine:
            outputs = []
            for seed in range(6):
                params = [SamplingParams(max_tokens=9 + 2 * i, seed=seed + i, ignore_eos=True) for i in range(5)]
                outputs += engine.generate([[1, 0, i % vocab] for i in range(5)], params)
                engine.check()
            answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1]
    assert slots < 4_000 or model.rows_ahead > 0


def test_one_who_leaves_what_is_cached_wastes_one_step() -> None:
    model = StampModel(500, 256)
    prompt, greedy = [5, 6, 7], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with Engine(model, kv_tokens=4_000, debug=True) as engine:
        (first,) = engine.generate([prompt], greedy)
        expected = first.outputs[0].token_ids
        wasted = engine.stats().wasted_rows
        other = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logit_bias={expected[8]: -100})
        (left,) = engine.generate([prompt], other)
        assert left.outputs[0].token_ids[:8] == expected[:8] and left.outputs[0].token_ids[8] != expected[8]
        assert engine.stats().wasted_rows - wasted <= 2
        engine.check()


def test_what_is_evicted_to_make_room_is_not_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking, schedule_ahead = [], Scheduler.schedule_ahead

    def watched(self: Scheduler, batch: Batch) -> Batch | None:
        expected = schedule_ahead(self, batch)
        if expected is not None:
            rows = zip(expected.nodes, expected.row_slots, strict=True)
            lacking.extend(node for node, slot in rows if slot < 0 and not node.children)
        return expected

    monkeypatch.setattr(Scheduler, "schedule_ahead", watched)
    greedy = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with Engine(StampModel(500, 256), kv_tokens=157, debug=True) as engine:
        engine.generate([[5, 6, 7]], greedy)
        engine.generate([[8, 8, 8]], replace(greedy, max_tokens=100))
        engine.generate([[5, 6, 7], [9, 9, 9]], replace(greedy, max_tokens=60))
        engine.check()
    assert not lacking
