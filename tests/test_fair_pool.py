"""Work of several callers on a few threads: nobody's waits behind another's."""

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from functools import partial

import pytest
from served import tiny

from radixgen import SamplingParams
from radixgen.core import EngineClosed, QueueFull
from radixgen.serve.fair_pool import FairPool
from radixgen.serve.zmq.service import Peer
from radixgen.serve.zmq.worker_thread import WorkerThread

SECONDS = 30.0


class Work:
    """Jobs that say when they begin, and end when they may."""

    def __init__(self, pool: FairPool) -> None:
        self.begun: list[str] = []
        self._pool = pool
        self._more = threading.Condition()
        self._may: set[str] = set()

    def give(self, caller: str, name: str, share: str = "") -> "Future[str]":
        return self._pool.submit(caller, partial(self._run, name), share=share)

    def end(self, *names: str) -> None:
        with self._more:
            self._may.update(names)
            self._more.notify_all()

    def wait(self, count: int) -> None:
        """Until so many have begun."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.begun) >= count, SECONDS)

    def _run(self, name: str) -> str:
        with self._more:
            self.begun.append(name)
            self._more.notify_all()
            assert self._more.wait_for(lambda: name in self._may, SECONDS)
        return name


def test_one_caller_never_has_the_last_thread() -> None:
    work = Work(FairPool(2, "test", most_waiting=8))
    many = [work.give("a", f"a{i}") for i in range(4)]
    work.wait(1)
    other = work.give("b", "b0")
    work.wait(2)
    assert work.begun == ["a0", "b0"]
    work.end("b0", "a0", "a1", "a2", "a3")
    assert other.result(SECONDS) == "b0"
    assert [one.result(SECONDS) for one in many] == ["a0", "a1", "a2", "a3"]


def test_callers_take_turns_and_so_do_their_shares() -> None:
    work = Work(FairPool(1, "test", most_waiting=8))
    work.give("a", "first")
    work.wait(1)
    names = [("a", "a0", "x"), ("a", "a1", "x"), ("a", "a2", "y"), ("b", "b0", ""), ("b", "b1", "")]
    jobs = [work.give(caller, name, share) for caller, name, share in names]
    work.end("first", *(name for _, name, _ in names))
    for job in jobs:
        job.result(SECONDS)
    assert work.begun == ["first", "a0", "b0", "a2", "b1", "a1"]


def test_what_was_cancelled_is_dropped() -> None:
    work = Work(FairPool(1, "test", most_waiting=2))
    running = work.give("a", "a0")
    work.wait(1)
    dropped, kept = work.give("a", "a1"), work.give("a", "a2")
    with pytest.raises(QueueFull, match="at most 2 per caller"):
        work.give("a", "a3")
    other = work.give("b", "b0")
    assert dropped.cancel() and not running.cancel()
    last = work.give("a", "a4")
    work.end("a0", "a1", "a2", "a4", "b0")
    for one in (running, kept, other, last):
        one.result(SECONDS)
    assert "a1" not in work.begun


def test_what_work_raises_is_its_callers() -> None:
    pool = FairPool(1, "test", most_waiting=2)
    with pytest.raises(ZeroDivisionError):
        pool.submit("a", lambda: 1 // 0).result(SECONDS)
    assert pool.submit("a", lambda: 1).result(SECONDS) == 1


def test_a_closed_pool_ends_what_waits() -> None:
    pool = FairPool(1, "test", most_waiting=2)
    work = Work(pool)
    running = work.give("a", "a0")
    work.wait(1)
    waiting = work.give("a", "a1")
    pool.close()
    with pytest.raises(EngineClosed):
        waiting.result(SECONDS)
    with pytest.raises(EngineClosed):
        work.give("a", "a2")
    work.end("a0")
    assert running.result(SECONDS) == "a0"


def test_a_full_pool_that_gets_nowhere_is_stalled() -> None:
    pool = FairPool(1, "test", most_waiting=2)
    work = Work(pool)
    running = work.give("a", "a0")
    work.wait(1)
    assert not pool.stalled(0.0), "nothing waits"
    waiting = work.give("a", "a1")
    with pytest.raises(Late):
        running.result(0.01)
    assert pool.stalled(0.001) and not pool.stalled(1e6)
    work.end("a0", "a1")
    waiting.result(SECONDS)
    assert not pool.stalled(0.0)


def test_a_worker_whose_compilers_get_nowhere_is_stalled() -> None:
    with tiny() as engine:
        thread, let_go = WorkerThread(engine, b"key", lambda: None), threading.Event()
        engine.inputs.grammar = lambda _: let_go.wait(SECONDS)  # type: ignore[assignment,method-assign]
        peer, params = Peer("front"), SamplingParams(regex="a")
        drop = [thread.compile_grammar(peer, "", params, lambda _: None) for _ in range(3)]
        while not thread.stalled(0.001):
            threading.Event().wait(0.001)
        assert not thread.stalled(1e6)
        for one in drop:
            one()
        let_go.set()
