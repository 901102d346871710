"""`FairPool`: a thread pool that serves its callers in turn."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

from radixgen.core import EngineClosed, QueueFull

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[[], Any]]


class FairPool:
    """Thread pool in which callers take turns, however much work each has queued. Thread-safe.

    No caller occupies all threads (unless there is only one), so that another caller's work starts at once. A caller
    may divide its work into shares, which take turns as well.
    """

    def __init__(self, threads: int, name: str, *, most_waiting: int) -> None:
        """most_waiting: maximum number of queued tasks per caller. The threads are daemons."""
        self._threads = threads
        self._name = name
        self._most_waiting = most_waiting
        self._waiting: OrderedDict[Hashable, OrderedDict[Hashable, deque[Task]]] = OrderedDict()
        self._running: dict[Hashable, int] = {}
        self._started = 0
        self._moved = time.monotonic()
        """Time of the last progress: a task started or ended, or came to an empty queue"""
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, caller: Hashable, work: Callable[[], T], *, share: Hashable = None) -> "Future[T]":
        """Queue `work`; cancelling its future before it starts removes it from the queue.

        Raises `QueueFull`, and `EngineClosed` after `close`.
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
                raise QueueFull(f"waiting ({self._name})", waiting + 1, f"at most {self._most_waiting} per caller")
            shares.setdefault(share, deque()).append((future, work))
            self._start_thread()
            self._changed.notify()
        future.add_done_callback(lambda done: self._forget(caller, share, done) if done.cancelled() else None)
        return future

    def stalled(self, seconds: float) -> bool:
        """Whether tasks wait, and none has started or ended for `seconds`."""
        with self._changed:
            return bool(self._waiting) and time.monotonic() - self._moved > seconds

    def close(self) -> None:
        """Fail queued tasks with `EngineClosed`, without waiting for running tasks."""
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

    def _take(self) -> tuple[Hashable, Task] | None:
        """Wait for the next task. Returns None when the pool is closed."""
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
        """The caller whose turn it is, among those that may occupy another thread."""
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
        """Remove a cancelled task from the queue."""
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
