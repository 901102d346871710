"""One engine thread, many coroutines: streams, aborts, slow readers, failures, the end."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import StampModel, expected_logits

from radixgen import (
    AsyncEngine,
    DuplicateRequest,
    Engine,
    EngineClosed,
    EngineDead,
    InvalidRequest,
    Limits,
    QueueFull,
    RequestOutput,
    SamplingParams,
    UnknownRequest,
)

VOCAB = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def run(test: Callable[[AsyncEngine], Awaitable[Any]], model: StampModel | None = None, **options: Any) -> Any:
    """Run `test` on an engine of its own, and see that nothing is left of it in the end."""
    engine = Engine(model or StampModel(VOCAB, 256), **({"kv_tokens": 512, "debug": True} | options))

    async def whole() -> Any:
        async with AsyncEngine(engine) as served:
            result = await test(served)
            while (await served.stats()).num_running:
                await asyncio.sleep(0.001)
            await served.check()
            assert not served._streams
        return result

    return asyncio.run(asyncio.wait_for(whole(), 60))


def greedy(prompt: list[int], count: int = GREEDY.max_tokens) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected_logits(tokens, VOCAB))))
    return tokens[len(prompt) :]


async def tokens_of(outputs: Any) -> list[int]:
    return [token async for delta in outputs for one in delta.outputs for token in one.token_ids]


def test_many_streams_at_once() -> None:
    prompts = [[1, 2, 3, i % VOCAB, i // VOCAB] for i in range(40)]

    async def test(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine.generate(prompt, GREEDY)) for prompt in prompts))

    assert run(test) == [greedy(prompt) for prompt in prompts]


def test_deltas_and_cumulative_outputs() -> None:
    async def test(engine: AsyncEngine) -> None:
        deltas = [output async for output in engine.generate([1, 2], GREEDY)]
        assert [d.finished for d in deltas[:-1]] == [False] * (len(deltas) - 1) and deltas[-1].finished
        whole = [output async for output in engine.generate([1, 2], GREEDY, cumulative=True)]
        assert whole[-1].outputs[0].token_ids == greedy([1, 2])

    run(test)


def test_a_slow_reader_gets_everything_in_few_outputs() -> None:
    """Pins that what is not read is merged rather than queued."""

    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=100, logprobs=0, n=2)
        outputs: list[RequestOutput] = []
        async for output in engine.generate([5], params):
            outputs.append(output)
            while (await engine.stats()).num_running:
                await asyncio.sleep(0.001)
        assert len(outputs) <= 3
        for index in range(2):
            pieces = [one for output in outputs for one in output.outputs if one.index == index]
            assert [t for piece in pieces for t in piece.token_ids] == greedy([5], 100)
            assert sum(len(piece.logprobs) for piece in pieces) == 100

    run(test)


def test_leaving_early_aborts() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate([1, 2], SamplingParams(temperature=0.0, max_tokens=200))
        async for _ in stream:
            break
        await stream.aclose()
        stats = await engine.stats()
        assert stats.num_running == 0 and stats.generated_tokens < 200

    run(test)


def test_a_cancelled_task_leaves_nothing() -> None:
    async def test(engine: AsyncEngine) -> None:
        for delay in (0, 0, 0.001, 0.01):
            task = asyncio.create_task(tokens_of(engine.generate([1], SamplingParams(max_tokens=250))))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.001)

    run(test)


def test_abort() -> None:
    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate([1, 2], SamplingParams(temperature=0.0, max_tokens=200), request_id="mine")
        outputs = [await anext(stream)]
        assert await engine.abort("mine")
        outputs += [output async for output in stream]
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert not await engine.abort("mine") and not await engine.abort("never")

    run(test)


def test_refusals_reach_their_caller_alone() -> None:
    async def test(engine: AsyncEngine) -> None:
        going = asyncio.create_task(tokens_of(engine.generate([1], GREEDY)))
        for prompt, params, error in (
            ([], GREEDY, InvalidRequest),
            ([VOCAB], GREEDY, InvalidRequest),
            ("text", GREEDY, InvalidRequest),
            ([1], SamplingParams(n=0), InvalidRequest),
            ([1] * 256, GREEDY, InvalidRequest),
        ):
            with pytest.raises(error):
                await tokens_of(engine.generate(prompt, params))
        with pytest.raises(UnknownRequest):
            await engine.fork("never")
        assert await going == greedy([1])

    run(test)


def test_two_requests_of_one_name() -> None:
    async def test(engine: AsyncEngine) -> None:
        first = engine.generate([1], SamplingParams(temperature=0.0, max_tokens=100), request_id="same")
        begun = (await anext(first)).outputs[0].token_ids
        with pytest.raises(DuplicateRequest):
            await tokens_of(engine.generate([2], GREEDY, request_id="same"))
        assert begun + await tokens_of(first) == greedy([1], 100)

    run(test)


def test_a_full_queue_refuses_at_once() -> None:
    async def test(engine: AsyncEngine) -> None:
        tasks = [tokens_of(engine.generate([i % VOCAB], GREEDY)) for i in range(200)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        assert refused and len(refused) < 200
        assert all(result == greedy([i % VOCAB]) for i, result in enumerate(results) if isinstance(result, list))

    run(test, limits=Limits(max_waiting=4, max_num_seqs=2))


def test_score_and_fork() -> None:
    async def test(engine: AsyncEngine) -> None:
        scores, busy = await asyncio.gather(
            engine.score([1, 2], [[3, 4], [3, 5], [6]]), tokens_of(engine.generate([7], GREEDY))
        )
        for continuation, found in zip([[3, 4], [3, 5], [6]], scores, strict=True):
            for at, (token, score) in enumerate(zip(continuation, found, strict=True)):
                logits = torch.from_numpy(expected_logits([1, 2, *continuation[:at]], VOCAB))
                assert score == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
        assert busy == greedy([7])
        stream = engine.generate([1], SamplingParams(temperature=0.0, max_tokens=60), request_id="trunk")
        first = await anext(stream)
        forks = await engine.fork("trunk", 2)
        results = await asyncio.gather(tokens_of(stream), *(tokens_of(fork) for fork in forks))
        expected = greedy([1], 60)
        assert first.outputs[0].token_ids + results[0] == results[1] == results[2] == expected

    run(test)


def test_pins() -> None:
    async def test(engine: AsyncEngine) -> None:
        await tokens_of(engine.generate([1, 2, 3], GREEDY))
        pin = await engine.pin([1, 2, 3], ttl=60)
        assert await engine.reset_prefix_cache() > 0
        assert (await engine.stats()).kv_tokens_pinned == 3
        assert pin is not None and await engine.unpin(pin) and not await engine.unpin(pin)

    run(test)


def test_timeout() -> None:
    async def test(engine: AsyncEngine) -> None:
        outputs = [o async for o in engine.generate([1], SamplingParams(max_tokens=250), timeout=1e-9)]
        assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("abort", "deadline")

    run(test)


def test_an_invariant_that_fails_ends_every_request_loudly() -> None:
    model = StampModel(VOCAB, 256)

    async def test(engine: AsyncEngine) -> None:
        stream = engine.generate([1], SamplingParams(max_tokens=250))
        await anext(stream)
        model.fail_next = AssertionError("planted")
        with pytest.raises(EngineDead, match="planted"):
            await tokens_of(stream)
        with pytest.raises(EngineDead):
            await tokens_of(engine.generate([1]))

    async def whole() -> None:
        async with AsyncEngine(Engine(model, kv_tokens=512)) as engine:
            await test(engine)

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_one_poisoned_request_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model = StampModel(VOCAB, 256)
    plain = model.run

    def picky(plan: Any, token_ids: Any, slots: Any, logit_rows: Any) -> Any:
        if 7 in token_ids and 7 in token_ids[plan.row_positions == 0]:
            raise RuntimeError("a seven at the front")
        return plain(plan, token_ids, slots, logit_rows)

    monkeypatch.setattr(model, "run", picky)

    async def test(engine: AsyncEngine) -> None:
        good = [tokens_of(engine.generate([i, 7], GREEDY)) for i in range(5)]
        bad = [output async for output in engine.generate([7, 1], GREEDY)]
        assert bad[-1].outputs[0].finish_reason == "error" and "a seven" in bad[-1].outputs[0].stop_reason
        assert await asyncio.gather(*good) == [greedy([i, 7]) for i in range(5)]

    run(test, model)


def test_close_while_serving() -> None:
    async def whole() -> None:
        engine = AsyncEngine(Engine(StampModel(VOCAB, 256), kv_tokens=512))
        stream = engine.generate([1], SamplingParams(max_tokens=250))
        await anext(stream)
        await asyncio.gather(engine.close(), engine.close())
        with pytest.raises(EngineClosed):
            await tokens_of(stream)
        with pytest.raises(EngineClosed):
            await engine.stats()
        await engine.close()

    asyncio.run(asyncio.wait_for(whole(), 60))
