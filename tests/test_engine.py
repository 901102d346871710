"""Requests from submit to their last token: sharing counted, outputs told once, bad input refused."""

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import families
import numpy as np
import pytest
import torch
from oracle import StampModel
from torch import nn
from transformers import ByT5Tokenizer

from radixgen import (
    DuplicateRequest,
    Engine,
    EngineClosed,
    InvalidRequest,
    PromptTooLong,
    RequestOutput,
    SamplingParams,
    UnknownRequest,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
VOCAB = families.VOCAB


class RowCounter:
    """Counts the rows that go through a model's input embedding."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        self.hook = model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[torch.Tensor], __: torch.Tensor) -> None:
        self.rows += inputs[0].numel()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return families.build("llama")


@pytest.fixture
def engine(model: nn.Module) -> Iterator[Engine]:
    with Engine(model, kv_tokens=1024, debug=True) as engine:
        yield engine
        engine.check()


def some(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def distinct_positions(prompts: list[list[int]]) -> int:
    return len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})


def finish(engine: Engine) -> dict[str, list[RequestOutput]]:
    """Everything that the engine reports until it has nothing left, by request."""
    reports: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            reports.setdefault(output.request_id, []).append(output)
        engine.check()
    return reports


# -- once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_step_tokens", [2048, 13, 1])
def test_a_burst_computes_each_distinct_position_once(model: nn.Module, max_step_tokens: int) -> None:
    base = some(40)
    prompts = [base, base, base + some(9, 1), base[:17] + some(20, 2), some(5, 3), base[:39]]
    with Engine(model, kv_tokens=1024, max_step_tokens=max_step_tokens) as engine:
        counter = RowCounter(model)
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
        counter.hook.remove()
        stats = engine.stats()
    assert counter.rows == distinct_positions(prompts) == stats.computed_rows
    assert stats.computed_prompt_tokens == counter.rows
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.kv_tokens_used == distinct_positions(prompts)
    assert all(output.num_cached_tokens == 0 for output in outputs)


def test_a_cached_prompt_costs_one_row(engine: Engine, model: nn.Module) -> None:
    prompt = some(30)
    first = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=1))[0]
    counter = RowCounter(model)
    again = engine.generate([prompt, prompt[:20]], SamplingParams(temperature=0, max_tokens=1))
    counter.hook.remove()
    assert counter.rows == 2
    assert [output.num_cached_tokens for output in again] == [30, 20]
    assert again[0].outputs == first.outputs


def test_identical_greedy_requests_are_one_row(engine: Engine, model: nn.Module) -> None:
    prompt = some(30)
    counter = RowCounter(model)
    outputs = engine.generate([prompt] * 16, GREEDY)
    counter.hook.remove()
    assert counter.rows == 30 + GREEDY.max_tokens - 1 == engine.stats().computed_rows
    assert engine.stats().logit_rows == GREEDY.max_tokens
    assert engine.stats().generated_tokens == 16 * GREEDY.max_tokens
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_a_late_request_shares_a_prefill_under_way(model: nn.Module) -> None:
    prompt = some(60)
    with Engine(model, kv_tokens=256, max_step_tokens=16) as engine:
        engine.submit(prompt, GREEDY)
        engine.step()
        engine.submit(prompt, GREEDY)
        finish(engine)
        assert engine.stats().computed_rows == 60 + GREEDY.max_tokens - 1


def test_a_cached_continuation_is_followed_without_new_nodes(engine: Engine, model: nn.Module) -> None:
    """Pins that a sequence which walks along a cached answer does not cut it into single tokens."""
    prompt = some(30)
    whole = engine.generate(prompt, GREEDY)[0].outputs[0].token_ids
    before = engine._core.tree.num_nodes
    again = engine.generate(prompt, GREEDY)[0].outputs[0].token_ids
    assert again == whole
    assert engine._core.tree.num_nodes <= before + 1


def test_kv_bytes_are_those_of_the_segments(engine: Engine) -> None:
    base = some(64)
    engine.generate([base + [t] for t in range(5, 25)], GREEDY)
    stats = engine.stats()
    assert 0 < stats.kv_bytes_read < stats.kv_bytes_unshared
    with_plan = engine.explain_plan()
    assert "KV read" in with_plan and "level 1" in with_plan


def test_unshared_plans_read_what_unshared_reading_needs(model: nn.Module) -> None:
    with Engine(model, kv_tokens=1024, plan="unshared") as engine:
        engine.generate([some(64) + [t] for t in range(5, 25)], GREEDY)
        assert engine.stats().kv_bytes_read == engine.stats().kv_bytes_unshared


def test_sharing_off_computes_everything(model: nn.Module) -> None:
    prompts = [some(30)] * 3
    with Engine(model, kv_tokens=1024, share=False) as engine:
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
        assert engine.stats().computed_rows == 90
        assert engine.stats().kv_tokens_used == 0
        engine.check()


def test_namespaces_share_nothing(engine: Engine) -> None:
    prompt = some(30)
    for namespace in ("a", "b", "a"):
        engine.submit(prompt, GREEDY, namespace=namespace, request_id=f"{namespace}")
        finish(engine)
    assert engine.stats().cached_prompt_tokens == 30


# -- sampling ---------------------------------------------------------------------------------------------


def test_seeded_samples_are_the_same_alone_in_a_batch_and_as_one_of_n(model: nn.Module) -> None:
    prompt, params = (
        some(20),
        SamplingParams(temperature=1.5, max_tokens=12, n=4, seed=9, ignore_eos=True),
    )
    with Engine(model, kv_tokens=1024) as engine:
        alone = engine.generate(prompt, params)[0]
        crowd = engine.generate([some(9, 1), prompt, some(20, 2)], params)[1]
        fewer = engine.generate(prompt, SamplingParams(temperature=1.5, max_tokens=12, n=2, seed=9,
        ignore_eos=True))[0]  # fmt: skip
    with Engine(model, kv_tokens=40, debug=True, seed=5) as engine:
        cramped = engine.generate([prompt, some(7, 4)], params)[0]
        assert engine.stats().preemptions > 0
        engine.check()
    assert alone.outputs == crowd.outputs == cramped.outputs
    assert fewer.outputs == alone.outputs[:2]
    assert len({tuple(one.token_ids) for one in alone.outputs}) == 4


def test_unseeded_samples_differ_between_requests_and_follow_the_engine_seed(
    model: nn.Module,
) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        with Engine(model, kv_tokens=1024, seed=seed) as engine:
            runs.append([o.outputs[0].token_ids for o in engine.generate([some(9)] * 2, params)])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_logprobs(engine: Engine, model: nn.Module) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    prompt = some(10)
    one = engine.generate(prompt, params)[0].outputs[0]
    with torch.inference_mode():
        logits = families.build("llama")(torch.tensor([prompt + one.token_ids])).logits[0]
    expected = logits.log_softmax(-1)
    assert one.logprobs is not None and one.cumulative_logprob is not None
    total = 0.0
    for step, (token, found) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + step]
        assert len(found) == 3 and next(iter(found)) == token
        for candidate, value in found.items():
            assert value == pytest.approx(float(row[candidate]), abs=1e-4)
        total += float(row[token])
    assert one.cumulative_logprob == pytest.approx(total, abs=1e-3)


# -- ends -------------------------------------------------------------------------------------------------


def test_stop_tokens_and_lengths(engine: Engine) -> None:
    prompt = some(12)
    whole = engine.generate(prompt, GREEDY)[0].outputs[0]
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    stop = whole.token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    short = engine.generate(prompt, params)[0].outputs[0]
    assert (short.finish_reason, short.stop_reason) == ("stop", stop)
    assert short.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def test_end_of_sequence(model: nn.Module) -> None:
    with Engine(model, kv_tokens=128) as engine:
        first = engine.generate(some(12), GREEDY)[0].outputs[0].token_ids
    model.generation_config.eos_token_id = first[2]
    try:
        with Engine(model, kv_tokens=128) as engine:
            ends = engine.generate(some(12), SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
            goes_on = engine.generate(some(12), GREEDY)[0].outputs[0]
    finally:
        model.generation_config.eos_token_id = None
    assert ends.token_ids == first[: first.index(first[2]) + 1]
    assert (ends.finish_reason, ends.stop_reason) == ("stop", None)
    assert goes_on.token_ids == first


def test_output_ends_with_the_context(model: nn.Module) -> None:
    with Engine(model, kv_tokens=64, max_model_len=16) as engine:
        output = engine.generate(some(12), GREEDY)[0].outputs[0]
        assert len(output.token_ids) == 4 and output.finish_reason == "length"


def test_each_request_ends_once(engine: Engine) -> None:
    ids = [engine.submit(some(10 + i, i), GREEDY) for i in range(5)]
    engine.step()
    engine.cancel(ids[1])
    engine.cancel(ids[4])
    reports = finish(engine)
    assert Counter(i for i, r in reports.items() for o in r if o.finished) == Counter(ids)
    reasons = {i: reports[i][-1].outputs[0].finish_reason for i in ids}
    assert [reasons[i] for i in ids] == ["length", "abort", "length", "length", "abort"]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_leaves_the_others_alone(model: nn.Module, steps: int) -> None:
    prompts = [some(30), some(30) + some(4, 1), some(30) + some(4, 1) + some(3, 2)]
    with Engine(model, kv_tokens=256, max_step_tokens=16, debug=True) as engine:
        expected = [o.outputs for o in engine.generate(prompts, GREEDY)]
        engine.reset_prefix_cache()
        ids = [engine.submit(prompt, GREEDY) for prompt in prompts]
        for _ in range(steps):
            engine.step()
        engine.cancel(ids[0])
        engine.check()
        reports = finish(engine)
    assert [reports[i][-1].outputs for i in ids[1:]] == expected[1:]


def test_priority_goes_first(model: nn.Module) -> None:
    with Engine(model, kv_tokens=24) as engine:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.submit(some(20), params, request_id="runs")
        engine.step()
        engine.submit(some(20, 1), params, request_id="low")
        engine.submit(some(20, 2), params, request_id="high", priority=1)
        order = [i for i, r in finish(engine).items() if r[-1].finished]
    assert order.index("high") < order.index("low")


# -- faces ------------------------------------------------------------------------------------------------


def test_stream_gives_deltas_that_add_up(engine: Engine) -> None:
    prompt = some(10)
    whole = engine.generate(prompt, GREEDY)[0].outputs[0]
    engine.submit(some(11, 1), GREEDY, request_id="other")
    deltas = list(engine.stream(prompt, GREEDY))
    assert [t for d in deltas for t in d.outputs[0].token_ids] == whole.token_ids
    assert [d.finished for d in deltas] == [False] * 7 + [True]
    cumulative = list(engine.stream(prompt, GREEDY, cumulative=True))
    assert cumulative[-1].outputs[0].token_ids == whole.token_ids
    assert finish(engine)["other"][-1].finished


def test_leaving_a_stream_cancels_it(engine: Engine) -> None:
    stream = engine.stream(some(10), GREEDY)
    next(stream)
    stream.close()
    assert engine.stats().num_running == 0 and not engine.has_unfinished


class Collecting(StampModel):
    """The garbage collector runs in the middle of each step, and only there."""

    def run(self, *arguments: Any, **options: Any) -> torch.Tensor:
        gc.collect()
        return super().run(*arguments, **options)


@pytest.fixture
def held_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("held_garbage")
def test_streams_that_the_collector_drops_are_cancelled_between_steps() -> None:
    """One in a reference cycle is dropped at any moment."""

    class Chat:
        stream: Iterator[RequestOutput]
        me: "Chat"

    params = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    with Engine(Collecting(3, 200), kv_tokens=400, debug=True) as engine:
        engine.submit([1, 2, 0], params)
        for number in range(60):
            chat = Chat()
            chat.me, chat.stream = chat, engine.stream([1, number % 3, 0, 2], params)
            next(chat.stream)
            del chat
            if number % 20 == 0:
                engine.submit([1, 2, 0], params)
        engine.check()
        gc.collect()
        assert engine.stats().num_running < 10
        finish(engine)


def test_a_prompt_that_its_tokenizer_does_not_know_ends_alone() -> None:
    """A model's vocabulary may be larger than its tokenizer's."""
    params = SamplingParams(temperature=0.0, max_tokens=3)
    with Engine(StampModel(512, 64), tokenizer=ByT5Tokenizer(), kv_tokens=100, debug=True) as engine:
        for _ in range(2):
            (output,) = engine.generate([[70, 500]], params)
            assert output.outputs[0].finish_reason == "error"
            assert "bytes must be in range" in str(output.outputs[0].stop_reason)
        fine = SamplingParams(temperature=0.0, max_tokens=3, logit_bias=dict.fromkeys(range(259, 512), -100.0))
        assert engine.generate([[70, 71]], fine)[0].outputs[0].finish_reason == "length"
        engine.check()


def test_generate_keeps_reports_of_other_requests(engine: Engine) -> None:
    engine.submit(some(5, 1), SamplingParams(temperature=0, max_tokens=2), request_id="other")
    calls: list[tuple[int, int]] = []
    engine.generate([some(10), some(6)], GREEDY, progress=lambda *call: calls.append(call))
    assert calls[-1] == (2, 2) and len(calls) == GREEDY.max_tokens
    assert [output.finished for output in finish(engine)["other"]] == [False, True]


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    prompts = [some(n, n) for n in (30, 5, 17)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 9, 4)]
    outputs = engine.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 9, 4]


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([], "prompt"),
        ([1, -1], r"prompt\[1\]"),
        ([VOCAB], r"prompt\[0\]"),
        ([2**63], r"prompt\[0\]"),
        ([1.5], r"prompt\[0\]"),
        ([True], r"prompt\[0\]"),
        ([None], r"prompt\[0\]"),
        (np.array([-1], np.int32), "prompt"),
        (np.array([[1]], np.int32), "prompt"),
        (7, "prompt"),
        (None, "prompt"),
    ],
)
def test_bad_prompts_are_named_and_disturb_nothing(engine: Engine, prompt: object, field: str) -> None:
    running = engine.submit(some(5), GREEDY)
    engine.step()
    with pytest.raises(InvalidRequest, match=field):
        engine.submit(prompt, GREEDY)
    with pytest.raises(InvalidRequest):
        engine.generate([some(4), prompt], GREEDY)
    assert [*finish(engine)] == [running]


BAD = [-1, 2**63, float("nan"), float("inf"), "", None, 1.5, [1]]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [*BAD, 0, 129, True]),
        ("temperature", [-0.1, float("nan"), float("inf"), "", None]),
        ("top_p", [0, 0.0, -0.1, 1.1, float("nan"), "", None]),
        ("top_k", [-2, 2**31, 0.5, "", None]),
        ("max_tokens", [*BAD, 0]),
        ("stop_token_ids", [5, "ab", [-1], [1.5], [1] * 129]),
        ("ignore_eos", [1, "yes", None]),
        ("seed", [-1, 2**64, 0.5, ""]),
        ("logprobs", [-1, 21, 0.5, ""]),
    ],
)
def test_bad_parameters_are_named(engine: Engine, field: str, values: list) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=field):
            engine.submit(some(4), SamplingParams(**{field: value}))
    assert not engine.has_unfinished


def test_limits_are_inclusive(engine: Engine) -> None:
    engine.submit(some(4), SamplingParams(n=128, top_p=1.0, top_k=2**31 - 1, logprobs=20, max_tokens=1))
    assert len(finish(engine)) == 1


def test_what_can_never_fit_is_refused_at_submit(model: nn.Module) -> None:
    with Engine(model, kv_tokens=20, max_model_len=64) as engine:
        with pytest.raises(PromptTooLong, match="20 slots"):
            engine.submit(some(14), GREEDY)
        with pytest.raises(PromptTooLong, match="context holds 64"):
            engine.submit(some(64), GREEDY)
        assert len(engine.generate(some(13), GREEDY)[0].outputs[0].token_ids) == 8


def test_ids(engine: Engine) -> None:
    engine.submit(some(4), GREEDY, request_id="mine")
    with pytest.raises(DuplicateRequest, match="mine"):
        engine.submit(some(4), GREEDY, request_id="mine")
    with pytest.raises(UnknownRequest, match="yours"):
        engine.cancel("yours")
    finish(engine)
    with pytest.raises(UnknownRequest):
        engine.cancel("mine")
    engine.submit(some(4), GREEDY, request_id="mine")
    finish(engine)
    for field, value in (("request_id", "x" * 257), ("request_id", 5), ("namespace", None)):
        with pytest.raises(InvalidRequest, match=field):
            engine.submit(some(4), GREEDY, **{field: value})
    with pytest.raises(InvalidRequest, match="priority"):
        engine.submit(some(4), GREEDY, priority="high")


def test_use_after_close(model: nn.Module) -> None:
    engine = Engine(model, kv_tokens=64)
    engine.close()
    engine.close()
    for use in (lambda: engine.submit([1]), engine.step, lambda: engine.generate([1])):
        with pytest.raises(EngineClosed):
            use()


def test_a_failed_step_loses_nothing(model: nn.Module) -> None:
    """Pins that slots of a step which raised are taken again by the next one."""
    with Engine(model, kv_tokens=64, max_step_tokens=16, debug=True) as engine:
        expected = engine.generate(some(30), GREEDY)[0].outputs
        engine.reset_prefix_cache()
        request = engine.submit(some(30), GREEDY)
        plain, calls = model.forward, 0

        def flaky(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls in (2, 4):
                raise RuntimeError("the device went away")
            return plain(*args, **kwargs)

        model.forward = flaky
        outputs: list[RequestOutput] = []
        try:
            while engine.has_unfinished:
                outputs += engine.step()
                engine.check()
        finally:
            del model.forward
    assert calls > 4
    assert outputs[-1].request_id == request and outputs[-1].outputs == expected
