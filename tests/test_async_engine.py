"""One engine thread, many coroutines: streams, aborts, slow readers, failures, the end."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import families
import numpy as np
import pytest
import texts
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
            assert not served._queues
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


def test_what_nobody_takes_is_one_output() -> None:
    """All that was generated, joined in the end; the engine does not wait for the reader."""
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, logprobs=1, n=2)

    async def test(engine: AsyncEngine) -> None:
        outputs = await engine.open([1, 2], params)
        first = await anext(outputs)
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.001)
        assert len(outputs._queue._pending) < 10
        (rest,) = [output async for output in outputs]
        for before, one in zip(first.outputs, sorted(rest.outputs, key=lambda one: one.index), strict=True):
            assert before.token_ids + one.token_ids == greedy([1, 2], 200)
            assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)

    run(test)


def test_a_cancelled_pin_holds_nothing() -> None:
    async def test(engine: AsyncEngine) -> None:
        await tokens_of(engine.generate([1, 2, 0, 1], GREEDY))
        for wait in (0, 0, 0.001, 0.002):
            task = asyncio.create_task(engine.pin([1, 2, 0, 1]))
            await asyncio.sleep(wait)
            task.cancel()
            with suppress(asyncio.CancelledError):
                pin = await task
                assert pin is not None and await engine.unpin(pin)
            assert (await engine.stats()).num_pins == 0
        # And where the pin was made before its caller was cancelled.
        made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        own = engine._engine.pin

        def pin(*arguments: Any, **options: Any) -> int | None:
            found = own(*arguments, **options)
            made.get_loop().call_soon_threadsafe(task.cancel)
            made.get_loop().call_soon_threadsafe(made.set_result, None)
            return found

        engine._engine.pin = pin  # type: ignore[method-assign]
        task = asyncio.create_task(engine.pin([1, 2, 0, 1]))
        await made
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.stats()).num_pins == 0

    run(test)


def test_a_cancelled_fork_leaves_nothing() -> None:
    async def test(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        outputs = await engine.open([1, 2], params, request_id="trunk")
        await anext(outputs)
        own = engine._engine.fork
        made: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

        def fork(*arguments: Any) -> list[str]:
            found = own(*arguments)
            made.get_loop().call_soon_threadsafe(task.cancel)
            made.get_loop().call_soon_threadsafe(made.set_result, found)
            return found

        engine._engine.fork = fork  # type: ignore[method-assign]
        task = asyncio.create_task(engine.fork("trunk", 2))
        names = await made
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.stats()).num_running <= 1 and engine._queues.keys().isdisjoint(names)
        await outputs.aclose()

    run(test)


def test_tokens_are_queued_in_the_order_of_their_calls() -> None:
    """So that engines of one seed draw alike, whatever threads do."""
    params = SamplingParams(max_tokens=8, temperature=1.0)
    prompts = [np.array([1, number % VOCAB], np.int32) for number in range(24)]

    async def test(engine: AsyncEngine) -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine.generate(prompt, params)) for prompt in prompts))

    assert run(test) == run(test)


def test_text_is_tokenized_elsewhere() -> None:
    """Not in the thread that steps: it may take seconds."""
    threads: set[str] = set()

    def tokenize(own: Callable[..., Any]) -> Callable[..., Any]:
        def note(text: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(text, str):
                threads.add(threading.current_thread().name)
            return own(text, *arguments, **options)

        return note

    async def test(engine: AsyncEngine) -> None:
        inputs: Any = engine.inputs
        inputs.tokenize, inputs.tokenize_continuation = (
            tokenize(inputs.tokenize),
            tokenize(inputs.tokenize_continuation),
        )
        await engine.score("abc", ["def", "x"])
        await tokens_of(engine.generate("abc", GREEDY))
        await engine.pin("abc")
        assert threads and "radixgen-engine" not in threads
        await engine.reset_prefix_cache()

    run(test, StampModel(families.VOCAB, 256), tokenizer=texts.tokenizer())


def test_the_end_is_told_again_and_again() -> None:
    async def test() -> None:
        async with AsyncEngine(Engine(StampModel(VOCAB, 4096), kv_tokens=4096)) as engine:
            outputs = await engine.open([1, 2], SamplingParams(max_tokens=4000, ignore_eos=True))
            await anext(outputs)
        for _ in range(3):
            with pytest.raises(EngineClosed):
                await asyncio.wait_for(tokens_of(outputs), 10)

    asyncio.run(test())


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


def test_a_refusal_that_nobody_awaits_any_more_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise QueueFull("waiting", 2, "at most 1 requests wait")

    async def test(engine: AsyncEngine) -> None:
        gate = threading.Event()
        blocked = asyncio.create_task(engine._call(lambda: gate.wait(10)))
        refused = asyncio.create_task(engine._call(refuse))
        await asyncio.sleep(0.01)
        refused.cancel()
        await asyncio.gather(refused, return_exceptions=True)
        gate.set()
        assert await blocked
        await engine.check()

    run(test)
    gc.collect()
    assert not caplog.records


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
        stream = engine.generate([1], SamplingParams(max_tokens=250, logprobs=0))  # so that no step is begun ahead
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
