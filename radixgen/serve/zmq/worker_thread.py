"""Thread of a worker in which its engine steps: runs jobs between two steps, and queues messages for front ends."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from radixgen.core import EngineClosed, EngineDead, Grammar, RequestOutput, SamplingParams
from radixgen.engine.engine import Engine
from radixgen.engine.thread import EngineThread
from radixgen.serve.fair_pool import FairPool
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.service import Message, Peer, Service

Job = Callable[[], None]

_LOAD_SECONDS = 0.25
"""Least time between two readings of the load"""
_COMPILERS = 2
"""Threads that compile grammars"""


class WorkerThread:
    """Runs a service in an `EngineThread`, which does no I/O. Methods may be called from any thread.

    `wake` is called from the engine's thread whenever there are messages to take.
    """

    def __init__(self, engine: Engine, salt_key: bytes, wake: Callable[[], None]) -> None:
        """
        engine: closed by the thread in the end.
        salt_key: that of `Service`.
        """
        self.failure: EngineDead | None = None
        """Why the engine failed; all messages can be taken then."""
        self.load: wire.Load | None = None
        """The engine's load, where it was read since this was last taken"""
        self.service = Service(engine, salt_key, compile_grammar=self.compile_grammar)
        self._wake = wake
        self._messages: deque[tuple[Peer, Message]] = deque()
        self._load_time = 0.0
        """When the load was last read"""
        self._waiting = 0
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._compiler = FairPool(_COMPILERS, "radixgen-grammar", most_waiting=engine.limits.max_compiling)
        self.engine_thread = EngineThread(engine, self._deliver, self._finish)

    def post(self, job: Job, size: int = 0) -> None:
        """Have `job` run between two steps. `size`: the bytes that it holds on to."""
        with self._lock:
            self._waiting += 1
            self._waiting_bytes += size
        self.engine_thread.post(partial(self._run, job, size))

    def take(self) -> list[tuple[Peer, Message]]:
        """The messages since the last time, in order."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    @property
    def backlog(self) -> tuple[int, int]:
        """Jobs that wait, and the bytes that they hold."""
        return self._waiting, self._waiting_bytes

    @property
    def quiet(self) -> bool:
        """Whether all that was posted was done, nothing is open, and all messages can be taken."""
        return self._waiting == 0 and self.engine_thread.idle and not self.service.num_live

    def stalled(self, seconds: float) -> bool:
        """Whether there was work, steps or grammars, but no progress for `seconds`."""
        return self.engine_thread.stalled(seconds) or self._compiler.stalled(seconds)

    def compile_grammar(
        self, peer: Peer, share: str, params: SamplingParams, done: Callable[[Exception | None], None]
    ) -> Callable[[], object]:
        """Compile in a thread apart, then have `done` run between two steps. Front ends take turns, and so do the
        shares of each. Returns what drops it while it has not begun. Raises `QueueFull`.
        """

        def ended(future: "Future[Grammar | None]") -> None:
            fault = None if future.cancelled() else future.exception()
            if future.cancelled() or isinstance(fault, EngineClosed):
                return
            assert fault is None or isinstance(fault, Exception)
            self.post(partial(_finish, done, fault, future))

        inputs = self.service.engine.inputs

        def compile_it() -> Grammar | None:
            inputs.check_params(params)
            return inputs.grammar(params)

        future = self._compiler.submit(peer, compile_it, share=share)
        future.add_done_callback(ended)
        return future.cancel

    # -- in the engine's thread ---------------------------------------------------------------------------

    def _run(self, job: Job, size: int) -> None:
        try:
            job()
        finally:
            with self._lock:
                self._waiting -= 1
                self._waiting_bytes -= size

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Queue what front ends get of a step and of the jobs before it."""
        self.service.report(outputs)
        messages = self.service.take()
        if messages:
            self._messages.extend(messages)
            if (now := time.monotonic()) - self._load_time >= _LOAD_SECONDS:
                self._load_time, self.load = now, self.service.load()
            self._wake()

    def _finish(self, end: EngineClosed) -> None:
        if isinstance(end, EngineDead):
            self.service.fail(str(end)[:1_000])
        self._messages.extend(self.service.take())
        self._compiler.close()
        self.failure = end if isinstance(end, EngineDead) else None
        self._wake()


def _finish(done: Callable[[Exception | None], None], fault: Exception | None, _: "Future[Grammar | None]") -> None:
    """The future holds the grammar until its request is submitted, however many others are compiled meanwhile."""
    done(fault)
