"""An interrupt, or any exception, at any line of a call leaves an engine that is right or says that it is dead."""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from oracle import StampCopy, StampModel, expected_logits
from sizes import size

from radixgen import AsyncEngine, Engine, EngineClosed, EngineDead, Limits, RequestOutput, SamplingParams
from radixgen.engine.core import EngineCore

VOCAB, CONTEXT = 3, 60


class Injection:
    """Raises before the `at`-th line of radixgen's own code that is run."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.error, self.left, self.raised = error, at, False

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        module = frame.f_globals.get("__name__", "")
        return self.line if module.startswith("radixgen.") else None

    def line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.raised = True
                sys.settrace(None)
                raise self.error("planted")
        return self.line

    def run(self, call: Callable[[], object]) -> None:
        """`call`, cut short where it has so many lines."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except (self.error, AssertionError):
            pass
        finally:
            sys.settrace(before)


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected_logits(tokens, VOCAB))))
    return tokens[len(prompt) :]


class History:
    """Some requests in a small pool, and steps until one call is cut short."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.engine = Engine(
            StampModel(VOCAB, CONTEXT, frozenset()),
            kv_tokens=self.draw.choice([70, 90, 200]),
            max_step_tokens=self.draw.choice([4, 16, 64]),
            limits=Limits(max_num_seqs=12),
        )
        self.base = [self.draw.randrange(VOCAB) for _ in range(8)]
        self.wanted: dict[str, list[int]] = {}
        self.got: dict[str, RequestOutput] = {}
        for _ in range(6):
            self.submit()
        for _ in range(self.draw.randrange(1, 5)):
            self.step()

    def submit(self) -> None:
        prompt = self.base[: self.draw.randrange(1, 9)] + [self.draw.randrange(VOCAB) for _ in range(5)]
        count = self.draw.randrange(2, 12)
        name = f"own-{len(self.wanted)}"
        self.engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=count), request_id=name)
        self.wanted[name] = greedy(prompt, count)

    def step(self) -> None:
        self.got |= {output.request_id: output for output in self.engine.step()}

    def fork(self) -> None:
        name = next((name for name in self.wanted if name not in self.got or not self.got[name].finished), None)
        if name is not None:
            (fork,) = self.engine.fork(name)
            self.wanted[fork] = self.wanted[name]

    def pin(self) -> None:
        self.engine.pin(self.base)

    def finish(self) -> str:
        """What became of it: `"right"` or `"refused"`."""
        try:
            self.engine.check()
            for _ in range(400):
                if not self.engine.has_unfinished:
                    break
                self.step()
            else:
                raise AssertionError("it never ends")
            self.engine.check()
        except EngineDead:
            assert_refuses(self.engine)
            return "refused"
        for name, tokens in self.wanted.items():
            output = self.got[name].outputs[0]
            failed = output.finish_reason == "error" and "planted" in str(output.stop_reason)
            assert output.token_ids == tokens[: len(output.token_ids)]
            assert failed or (len(output.token_ids) == len(tokens) and output.finish_reason == "length"), output
        return "right"


def assert_refuses(engine: Engine) -> None:
    """Every call says that the engine is dead, and it can be closed."""
    few = SamplingParams(max_tokens=1)
    calls: list[Callable[[], object]] = [
        engine.step, engine.stats, engine.check, engine.reset_prefix_cache,
        lambda: engine.submit([1]), lambda: engine.generate([1], few), lambda: engine.stream([1], few),
        lambda: engine.score([1], [[2]]), lambda: engine.pin([1]), lambda: engine.unpin(1),
        lambda: engine.preload([1]), lambda: engine.cancel("own-0"), lambda: engine.fork("own-0"),
    ]  # fmt: skip
    assert engine.has_unfinished
    for call in calls:
        with pytest.raises(EngineDead, match=r"planted|cut short"):
            call()
    engine.close()
    assert not engine.has_unfinished
    with pytest.raises(EngineClosed, match="closed"):
        engine.step()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", ["step", "submit", "fork", "pin"])
def test_cut_short_anywhere(call: str, error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    """Pins: of 244 interrupts of `step` 104 left a damaged engine, 16 of them one with wrong tokens."""
    caplog.set_level("CRITICAL", "radixgen")
    seen: Counter[str] = Counter()
    for seed in range(size(3, 20)):
        at, stride = 1 + seed, size(53, 7) if call == "step" else size(17, 3)
        while True:
            history, injection = History(seed), Injection(at, error)
            injection.run(getattr(history, call))
            if not injection.raised:
                break
            seen[history.finish()] += 1
            at += stride
    assert seen["right"] and seen["refused"] and seen.total() > 12, seen


def test_an_interrupt_of_the_model_undoes_the_step() -> None:
    """Ctrl-C while the model computes, which is most of the time, costs that step and nothing else."""
    history = History(0)
    model, plain = history.engine._model, history.engine._model.run

    def interrupted(*arguments: Any) -> Any:
        model.run = plain  # type: ignore[method-assign]
        raise KeyboardInterrupt

    model.run = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        history.step()
    history.engine.check()
    assert history.finish() == "right"


def waiting_for_a_fetch() -> tuple[Engine, list[int]]:
    """An engine, and a prompt of which only the host has the KV."""
    engine = Engine(StampModel(VOCAB, CONTEXT, frozenset()), kv_tokens=64, host_kv_tokens=200, debug=True)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
    engine.generate(prompt, SamplingParams(max_tokens=2))
    host = engine._core.host
    assert host is not None
    host.saves.complete()
    engine._core.tree.reset()
    host._copies.delay = 3  # type: ignore[attr-defined]
    return engine, prompt


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_of_a_wait_for_a_fetch_changes_nothing(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins: Ctrl-C while an engine waited only for KV from host memory killed it."""
    engine, prompt = waiting_for_a_fetch()
    for _ in range(2):
        engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=4))

    def interrupted(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(StampCopy, "wait", interrupted)
        for _ in range(2):
            with pytest.raises(error):
                engine.step()
            engine.check()
            assert engine.num_unfinished_requests == 2 and engine.stats().num_waiting == 2
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
    assert [output.outputs[0].token_ids for output in outputs.values()] == 2 * [greedy(prompt, 4)]
    assert engine.stats().host_fetched_tokens == 40
    engine.close()


def test_an_error_of_a_wait_for_a_fetch_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = waiting_for_a_fetch()
    engine.submit(prompt, SamplingParams(max_tokens=4))

    def failed(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(StampCopy, "wait", failed)
    with pytest.raises(RuntimeError):
        engine.step()
    with pytest.raises(EngineDead, match="planted"):
        engine.step()
    engine.close()


def test_a_stream_of_a_dead_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(StampModel(VOCAB, CONTEXT, frozenset()), kv_tokens=90)
    stream = engine.stream([1, 2], SamplingParams(max_tokens=9))
    next(stream)

    def fail(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(EngineCore, "_draw", fail)
    with pytest.raises(KeyError):
        next(stream)
    monkeypatch.undo()
    with pytest.raises(EngineDead, match="planted"):
        next(stream)
    stream.close()
    assert_refuses(engine)


def test_a_command_that_breaks_the_engine_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `AsyncEngine`: a call that was cut short fails, and so does all that is open."""

    async def whole() -> None:
        async with AsyncEngine(Engine(StampModel(VOCAB, 100_000, frozenset()), kv_tokens=100_000)) as engine:
            stream = engine.generate([1, 2], SamplingParams(max_tokens=90_000, ignore_eos=True))
            await anext(stream)

            def fail(*_: object) -> None:
                raise MemoryError("planted")

            monkeypatch.setattr(EngineCore, "add", fail)
            with pytest.raises((MemoryError, EngineDead)):
                await anext(engine.generate([1], SamplingParams(max_tokens=1)))
            with pytest.raises(EngineDead, match="planted"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDead, match="planted"):
                await engine.stats()

    asyncio.run(asyncio.wait_for(whole(), 60))
