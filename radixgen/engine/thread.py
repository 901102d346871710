"""`EngineThread`: the thread that steps an engine, and runs commands between two steps."""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from radixgen.core import EngineClosed, EngineDead, RequestOutput
from radixgen.engine.engine import Engine
from radixgen.engine.throughput import ThroughputLog

T = TypeVar("T")
Command = Callable[[], Any]
logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.01
"""How long to wait for a command if requests are open but none can run, or if there are only fetches to go on with"""


class EngineThread:
    """Owns and steps an engine, and closes it at the end. Nothing else may call the engine once the thread has started.

    All methods may be called from any thread. Objects that exist when the thread starts are excluded from garbage
    collection until it ends (`gc.freeze`).
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[RequestOutput]], object],
        finish: Callable[[EngineClosed], object],
    ) -> None:
        """
        deliver: called in the engine's thread after each step, with its outputs. If it raises, the engine ends.
        finish: called in the engine's thread after the last step, with `end`.
        """
        self.engine = engine
        self.end: EngineClosed | None = None
        """Error for further commands, or None while they are accepted; `EngineDead` if the engine failed"""
        self.idle = True
        """Whether the thread has nothing to do"""
        self._progress_time = time.monotonic()
        """Time of the last progress, or when the thread was last idle"""
        self._throughput = ThroughputLog(engine.stats)
        self._deliver = deliver
        self._finish = finish
        self._commands: queue.SimpleQueue[tuple[Command, Future[Any] | None] | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        """Held while `end` is written, and while a command is queued that depends on it"""
        self._thread = threading.Thread(target=self._run, name="radixgen-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        """Run `command` between two steps. If it raises, the engine ends. After the end, commands are dropped.

        Takes no lock, so a finalizer may call this in any thread.
        """
        self._commands.put((command, None))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` between two steps, unless the future is cancelled before. Returns a future of its result.

        An exception goes to the future; a failed assertion also ends the engine. After the end, the future raises
        `end`.
        """
        future: Future[T] = Future()
        with self._gate:
            if self.end is None:
                self._commands.put((function, future))
                return future
        future.set_exception(self.end)
        return future

    def stop(self) -> None:
        """End the thread after the current step and the queued commands. Returns at once; see `join`."""
        self._commands.put(None)

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for the thread to end. Returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stalled(self, seconds: float) -> bool:
        """Whether there was work but no progress for this many seconds."""
        return not self.idle and time.monotonic() - self._progress_time > seconds

    # -- in the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        # A full garbage collection walks all of torch and transformers, in the middle of a step.
        gc.collect()
        gc.freeze()
        end = EngineClosed("the engine is closed")
        try:
            self._serve()
        except BaseException as error:
            logger.critical("the engine failed; every open request ends", exc_info=error)
            end = EngineDead(f"the engine failed: {error!r}")
            end.__cause__ = error
        with self._gate:
            self.end = end
        self._finish(end)
        self.idle = True
        while not self._commands.empty():
            _, future = self._commands.get() or (None, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(end)
        try:
            self.engine.close()
        except Exception:
            logger.exception("the engine could not be closed in order")
        gc.unfreeze()

    def _serve(self) -> None:
        stuck = False
        while self.run_commands(wait=stuck or not self.engine.has_unfinished):
            stuck = not self.step()

    def run_commands(self, *, wait: bool) -> bool:
        """Run queued commands; with `wait`, sleep until there is one. Returns False if the thread was stopped."""
        busy = self.engine.has_unfinished or self.engine.fetching
        self.idle = not busy
        if self.idle:
            self._throughput.pause()
        try:
            command = self._commands.get(block=wait, timeout=_PAUSE_SECONDS if busy else None)
            while command is not None:
                if self.idle:
                    self._progress_time, self.idle = time.monotonic(), False
                _run_command(*command)
                command = self._commands.get(block=False)
        except queue.Empty:
            return True
        return False

    def step(self) -> bool:
        """Run one step. Returns False if requests are open but none could run."""
        steps = self.engine.num_steps
        outputs = self.engine.step()
        self._deliver(outputs)
        moved = bool(outputs) or self.engine.num_steps > steps or not self.engine.has_unfinished
        if moved:
            self._progress_time = time.monotonic()
            self._throughput.step()
        return moved


def _run_command(command: Command, future: "Future[Any] | None") -> None:
    if future is None:
        command()
    elif future.set_running_or_notify_cancel():
        try:
            result = command()
        except BaseException as error:
            future.set_exception(error)
            if isinstance(error, AssertionError) or not isinstance(error, Exception):
                raise
        else:
            future.set_result(result)
