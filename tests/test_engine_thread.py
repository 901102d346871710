"""`EngineThread`: commands run between two steps, and what they raise goes where it belongs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from oracle import StampCopy, StampModel

from radixgen import CacheHint, Engine, EngineClosed, EngineDead, RequestOutput, SamplingParams
from radixgen.engine.thread import EngineThread

SECONDS = 30.0


class Running:
    """An engine's thread, and what it delivered."""

    def __init__(self, host_kv_tokens: int = 0) -> None:
        self.engine = Engine(StampModel(4, 64), kv_tokens=256, host_kv_tokens=host_kv_tokens)
        self.outputs: list[RequestOutput] = []
        self.ends: list[EngineClosed] = []
        self.finished = threading.Event()
        self.thread = EngineThread(self.engine, self.deliver, self.ends.append)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        self.outputs += outputs
        if any(output.finished for output in outputs):
            self.finished.set()


@contextmanager
def running(host_kv_tokens: int = 0) -> Iterator[Running]:
    thread = Running(host_kv_tokens)
    thread.thread.start()
    yield thread
    thread.thread.stop()
    assert thread.thread.join(SECONDS) and len(thread.ends) == 1
    with pytest.raises(EngineClosed):
        thread.engine.submit([1])


def test_outputs_are_delivered_until_all_requests_have_ended() -> None:
    with running() as run:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        name = run.thread.call(lambda: run.engine.submit([1, 2], params, output_kind="delta")).result(SECONDS)
        assert run.finished.wait(SECONDS)
        assert {output.request_id for output in run.outputs} == {name}
        assert sum(len(output.outputs[0].token_ids) for output in run.outputs) == 5
    assert type(run.ends[0]) is EngineClosed


def test_an_exception_of_a_call_is_its_callers() -> None:
    with running() as run:
        with pytest.raises(ZeroDivisionError):
            run.thread.call(lambda: 1 // 0).result(SECONDS)
        assert run.thread.call(lambda: 7).result(SECONDS) == 7
        assert run.thread.end is None


def fail() -> Any:
    raise AssertionError("planted")


def test_a_failed_assertion_of_a_call_ends_the_engine() -> None:
    with running() as run:
        with pytest.raises(AssertionError, match="planted"):
            run.thread.call(fail).result(SECONDS)
        assert run.thread.join(SECONDS)
        with pytest.raises(EngineDead, match="planted"):
            run.thread.call(lambda: 7).result(SECONDS)
    assert isinstance(run.ends[0], EngineDead)


def test_what_is_posted_and_raises_ends_the_engine() -> None:
    with running() as run:
        run.thread.post(lambda: 1 // 0)
        assert run.thread.join(SECONDS)
        ran: list[int] = []
        run.thread.post(lambda: ran.append(1))
        assert isinstance(run.thread.end, EngineDead) and not ran


def test_commands_run_in_their_order_and_before_the_end() -> None:
    with running() as run:
        ran: list[int] = []
        first, may_go = threading.Event(), threading.Event()
        run.thread.post(lambda: (first.set(), may_go.wait(SECONDS)))
        assert first.wait(SECONDS)
        for number in range(5):
            run.thread.post(lambda number=number: ran.append(number))
        cancelled = run.thread.call(lambda: ran.append(5))
        last = run.thread.call(lambda: ran.append(6))
        run.thread.stop()
        after = run.thread.call(lambda: ran.append(7))
        assert cancelled.cancel() and not run.thread.idle
        may_go.set()
        last.result(SECONDS)
        with pytest.raises(EngineClosed):
            after.result(SECONDS)
        assert ran == [0, 1, 2, 3, 4, 6]


def run_then_prefetch(run: Running, polls: int) -> None:
    """Have only the host keep a prompt, and begin to prefetch it by a copy that finishes at the given poll."""
    prompt = list(range(4)) * 10
    run.thread.call(lambda: run.engine.submit(prompt, SamplingParams(max_tokens=1))).result(SECONDS)
    assert run.finished.wait(SECONDS)
    run.finished.clear()

    def prefetch() -> None:
        run.engine.inspect(lambda core: core.host.saves.complete())
        run.engine.inspect(lambda core: core.tree.reset())
        run.engine.inspect(lambda core: setattr(core.host._copies, "delay", polls))
        (result,) = run.engine.apply_hints(prompt, [CacheHint("prefetch")])
        assert result.status == "accepted" and run.engine.fetching and not run.engine.pins

    run.thread.call(prefetch).result(SECONDS)


def test_a_prefetch_goes_on_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins: on an idle engine it was pinned only when the next request came. The thread sleeps between two polls."""
    with running(400) as run:
        steps: list[float] = []
        step = run.thread.step
        monkeypatch.setattr(run.thread, "step", lambda: (steps.append(time.monotonic()), step())[1])
        run_then_prefetch(run, polls=4)
        begin, until = len(steps), time.monotonic() + SECONDS
        while not run.thread.idle and time.monotonic() < until:
            time.sleep(0.001)
        assert run.thread.idle and len(run.engine.pins) == 1 and not run.engine.fetching
        waits = np.diff(steps[begin:])
        assert waits.size in (4, 5, 6) and waits.min() > 0.005
        assert run.engine.stats().host_fetched_tokens == 40


def test_a_request_does_not_wait_for_a_prefetch_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a step waits for the prefetch")

    with running(400) as run:
        run_then_prefetch(run, polls=10**9)
        monkeypatch.setattr(StampCopy, "wait", fail)
        run.thread.call(lambda: run.engine.submit([3, 2, 1], SamplingParams(max_tokens=4))).result(SECONDS)
        assert run.finished.wait(SECONDS) and run.engine.fetching and not run.thread.idle


def test_a_thread_with_work_that_does_nothing_is_stalled() -> None:
    with running() as run:
        assert not run.thread.stalled(0.0)
        began, may_go = threading.Event(), threading.Event()
        run.thread.post(lambda: (began.set(), may_go.wait(SECONDS)))
        assert began.wait(SECONDS)
        while not run.thread.stalled(0.0):
            pass
        assert not run.thread.stalled(1e6)
        may_go.set()
        run.thread.call(lambda: None).result(SECONDS)
