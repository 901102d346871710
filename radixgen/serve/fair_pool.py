"""`FairPool`: a few threads for work that takes long, shared out evenly among those who give it."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from radixgen.core import EngineClosed, QueueFull

T = TypeVar("T")
Job = tuple["Future[Any]", Callable[[], Any]]


class FairPool:
    """Callers take turns, whatever they have waiting. One caller never has the last thread, so that another's work
    begins at once; of a single thread they take turns. May be used from any thread.

    A caller may part its work further, by `share`: its shares take turns within its own.
    """

    def __init__(self, threads: int, name: str, *, most_waiting: int) -> None:
        """most_waiting: jobs of one caller that have not begun. The threads are daemons: none holds up the process."""
        self._threads = threads
        self._name = name
        self._most_waiting = most_waiting
        self._waiting: OrderedDict[Hashable, OrderedDict[Hashable, deque[Job]]] = OrderedDict()
        self._running: dict[Hashable, int] = {}
        self._started = 0
        self._moved = time.monotonic()
        """When work last began or ended, or came where none waited"""
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, caller: Hashable, work: Callable[[], T], *, share: Hashable = None) -> "Future[T]":
        """Have `work` run. A future that is cancelled before it begins is dropped. Raises `QueueFull`, and
        `EngineClosed` after `close`.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise EngineClosed("the server is closed")
            if not self._waiting:
                self._moved = time.monotonic()
            shares = self._waiting.setdefault(caller, OrderedDict())
            waiting = sum(map(len, shares.values()))
            if waiting >= self._most_waiting:
                raise QueueFull(
                    f"waiting ({self._name})", waiting + 1, f"at most {self._most_waiting} of one caller wait"
                )
            shares.setdefault(share, deque()).append((future, work))
            self._start_thread()
            self._changed.notify()
        future.add_done_callback(lambda done: self._forget(caller, share, done) if done.cancelled() else None)
        return future

    def stalled(self, seconds: float) -> bool:
        """Whether work waits, and none has begun or ended for so long."""
        with self._changed:
            return bool(self._waiting) and time.monotonic() - self._moved > seconds

    def close(self) -> None:
        """What has not begun ends with `EngineClosed`. What runs goes on, and nobody waits for it."""
        with self._changed:
            self._closed = True
            waiting = [job for shares in self._waiting.values() for jobs in shares.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineClosed("the server is closed"))

    # -- inside -------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        if self._started < self._threads:
            self._started += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            caller, (future, work) = taken
            try:
                if future.set_running_or_notify_cancel():
                    _settle(future, work)
            finally:
                self._done(caller)
            del taken, future, work

    def _take(self) -> tuple[Hashable, Job] | None:
        """The next job; None at the end."""
        with self._changed:
            while (caller := self._next_caller()) is None:
                if self._closed:
                    return None
                self._changed.wait()
            shares = self._waiting.pop(caller)
            share, jobs = shares.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                shares[share] = jobs
            if shares:
                self._waiting[caller] = shares
            self._running[caller] = self._running.get(caller, 0) + 1
            self._moved = time.monotonic()
            return caller, job

    def _next_caller(self) -> Hashable | None:
        """Of those that may have a thread more, the one whose turn was longest ago."""
        most = max(self._threads - 1, 1)
        return next((caller for caller in self._waiting if self._running.get(caller, 0) < most), None)

    def _done(self, caller: Hashable) -> None:
        with self._changed:
            self._running[caller] -= 1
            if not self._running[caller]:
                del self._running[caller]
            self._moved = time.monotonic()
            self._changed.notify()

    def _forget(self, caller: Hashable, share: Hashable, future: "Future[Any]") -> None:
        """Nobody waits for it any more."""
        with self._changed:
            shares = self._waiting.get(caller, OrderedDict())
            jobs = deque(job for job in shares.get(share, ()) if job[0] is not future)
            shares[share] = jobs
            if not jobs:
                del shares[share]
            if not shares:
                self._waiting.pop(caller, None)


def _settle(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
