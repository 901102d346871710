"""Requests with a deadline, the earliest first."""

import heapq
import math
from collections.abc import Iterator

from radixgen.scheduler.sequence import Request


class Deadlines:
    """A heap of requests. Finished ones are removed when it has doubled."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._next_cleanup = 64

    def add(self, request: Request) -> None:
        if request.deadline == math.inf:
            return
        heapq.heappush(self._heap, (request.deadline, request.serial, request))
        if len(self._heap) > self._next_cleanup:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapq.heapify(self._heap)
            self._next_cleanup = 2 * len(self._heap) + 64

    def take_expired(self, now: float) -> Iterator[Request]:
        """Remove and yield the requests whose deadline is not after `now`."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]
