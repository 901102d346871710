"""The thread that owns the engine: it takes what was posted, steps, and hands on what there is to tell."""

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from radixgen.core import EngineClosed, Grammar, SamplingParams
from radixgen.serve import wire
from radixgen.serve.fair_pool import FairPool
from radixgen.serve.service import Message, Peer, Service

logger = logging.getLogger(__name__)

Job = Callable[[], None]
Told = list[tuple[Peer, Message]]

_STALL_SECONDS = 0.01
"""How long to wait for a job where requests are open and none can run."""
_LOAD_SECONDS = 0.25
"""How often the load is told at the most."""
_COMPILERS = 2
"""Threads that compile grammars"""


class Stepper:
    """Steps a service in a thread of its own; that thread does no I/O. All else here may be called from any thread.

    `wake` is called whenever there is something to take, from the stepping thread.
    """

    def __init__(self, make: Callable[["Stepper"], Service], wake: Callable[[], None]) -> None:
        """make: the service; its engine is closed by the thread in the end."""
        self.failure: BaseException | None = None
        """What the engine failed of; the thread has ended then."""
        self.beat = time.monotonic()
        """When something was last done, or there was nothing to do."""
        self.load: wire.Load | None = None
        """The engine's load, where it was looked at since this was last taken"""
        self._wake = wake
        self._jobs: queue.SimpleQueue[tuple[Job, int] | None] = queue.SimpleQueue()
        self._told: deque[Told] = deque()
        self._looked = 0.0
        self._waiting = 0
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._idle = True
        self.service = make(self)
        most_waiting = self.service.engine.limits.max_compiling
        self._compiler = FairPool(_COMPILERS, "radixgen-grammar", most_waiting=most_waiting)
        self._thread = threading.Thread(target=self._run, name="radixgen-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, job: Job, size: int = 0) -> None:
        """Have `job` run between two steps. `size`: the bytes that it holds on to."""
        with self._lock:
            self._waiting += 1
            self._waiting_bytes += size
        self._jobs.put((job, size))

    def stop(self) -> None:
        """End the thread after the step that runs, and close the engine; `join` waits for it."""
        self._jobs.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def take(self) -> Told:
        """What is to be told since the last time, in order."""
        told: Told = []
        while self._told:
            told += self._told.popleft()
        return told

    @property
    def backlog(self) -> tuple[int, int]:
        """Jobs that wait, and the bytes that they hold."""
        return self._waiting, self._waiting_bytes

    @property
    def quiet(self) -> bool:
        """Whether all that was posted was done, nothing is open, and all there is to tell can be taken."""
        return self._waiting == 0 and self._idle and not self.service.num_live

    def stalled(self, seconds: float) -> bool:
        """Whether there has been something to do, steps or grammars, and nothing was done, for so long."""
        working = not self._idle or self._waiting > 0
        return (working and time.monotonic() - self.beat > seconds) or self._compiler.stalled(seconds)

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

    def _run(self) -> None:
        # A full garbage collection walks all of torch and transformers, in the middle of a step.
        gc.collect()
        gc.freeze()
        failure: BaseException | None = None
        try:
            self._serve()
        except BaseException as error:
            logger.critical("the engine failed; every open request ends", exc_info=error)
            self.service.fail(f"the engine failed: {error!r}"[:1_000])
            failure = error
        self._idle = True
        self._told.append(self.service.take())
        self.failure = failure
        self._compiler.close()
        self.service.engine.close()
        gc.unfreeze()
        self._wake()

    def _serve(self) -> None:
        service, engine, stuck = self.service, self.service.engine, False
        while self._run_jobs(wait=stuck or not service.busy):
            steps = engine.num_steps
            if service.busy:
                service.step()
            self._hand_on()
            stuck = service.busy and engine.num_steps == steps
            if not stuck:
                self.beat = time.monotonic()

    def _run_jobs(self, *, wait: bool) -> bool:
        """Run what was posted; with `wait`, sleep until there is something. False at the end."""
        self._idle = not self.service.busy
        try:
            posted = self._jobs.get(block=wait, timeout=_STALL_SECONDS if self.service.busy else None)
            while posted is not None:
                if self._idle:
                    self._idle, self.beat = False, time.monotonic()
                job, size = posted
                try:
                    job()
                finally:
                    with self._lock:
                        self._waiting -= 1
                        self._waiting_bytes -= size
                posted = self._jobs.get(block=False)
        except queue.Empty:
            return True
        return False

    def _hand_on(self) -> None:
        told = self.service.take()
        if told:
            self._told.append(told)
            if (now := time.monotonic()) - self._looked >= _LOAD_SECONDS:
                self._looked, self.load = now, self.service.load()
            self._wake()


def _finish(done: Callable[[Exception | None], None], fault: Exception | None, _: "Future[Grammar | None]") -> None:
    """The future holds the grammar until its request is submitted, however many others are compiled meanwhile."""
    done(fault)
