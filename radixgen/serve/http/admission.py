"""How much is taken at the same time. What is beyond is refused at once, before its body is read."""

import math
import time
from collections import deque
from types import TracebackType
from typing import Self

from radixgen.core import InvalidRequest, QueueFull, check_integer

_RECENT = 32
_LONGEST_WAIT = 60


class Admission:
    """Counts sequences, running and waiting ones alike, from a request's arrival to its end."""

    def __init__(self, most: int) -> None:
        check_integer("max_open", most, 1, 1 << 20)
        self.most = most
        self.open = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def enter(self) -> "Place":
        """A request arrives, and counts for one sequence until more is known of it. Raises `QueueFull`."""
        self.take(1)
        return Place(self)

    def take(self, sequences: int) -> None:
        """Count so many more. Raises `QueueFull`."""
        if self.open + sequences > self.most:
            raise QueueFull("open", self.open + sequences, f"at most {self.most} run and wait")
        self.open += sequences

    def leave(self, sequences: int, seconds: float | None = None) -> None:
        """So many are over; a request that was served took so many seconds."""
        self.open -= sequences
        assert self.open >= 0
        if seconds is not None:
            self._recent.append(seconds)

    def retry_after(self) -> int:
        """Seconds after which a place may be free: what a request has taken lately, from 1 to 60."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)


class Place:
    """What one request counts for. As a context it is given back in the end, unless it was kept for longer."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.begin = time.monotonic()
        self._held = 1
        self._kept = False

    @property
    def age(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.begin

    def keep(self, sequences: int) -> None:
        """The request has so many, and they are counted until `leave`. Raises `InvalidRequest` where these are too many
        at any time, `QueueFull` where they are now.
        """
        if sequences > self._admission.most:
            limit = f"at most {self._admission.most} sequences are served at a time"
            raise InvalidRequest("n × len(prompt)", sequences, limit)
        self._admission.take(sequences - self._held)
        self._held = sequences
        self._kept = True

    def leave(self) -> None:
        """May be called twice."""
        seconds = self.age if self._kept else None
        self._admission.leave(self._held, seconds if self._held else None)
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._kept:
            self.leave()
