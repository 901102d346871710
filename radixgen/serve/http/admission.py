"""How much is taken at the same time, of everybody and of each API key. What is beyond is refused at once."""

import math
import time
from collections import deque
from types import TracebackType
from typing import Self

from radixgen.core import InvalidRequest, QueueFull, check_integer

_RECENT = 32
_LONGEST_WAIT = 60


class Admission:
    """Counts sequences, running and waiting ones alike, from when a request was read to its end."""

    def __init__(self, most: int, most_of_key: int | None = None) -> None:
        """most_of_key: of requests with one API key; by default as many as of all."""
        check_integer("max_open", most, 1, 1 << 20)
        self.most = most
        self.most_of_key = most if most_of_key is None else min(most_of_key, most)
        self.open = 0
        self._open_of: dict[str, int] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def enter(self, key: str = "", begin: float | None = None) -> "Place":
        """A request that arrived at `begin` counts for one sequence until more is known of it. Raises `QueueFull`."""
        self.take(1, key)
        return Place(self, key, time.monotonic() if begin is None else begin)

    def check(self, sequences: int, key: str = "") -> None:
        """Raise `QueueFull` where so many more could not be taken now."""
        if self.open + sequences > self.most:
            raise QueueFull("open", self.open + sequences, f"at most {self.most} run and wait")
        of_key = self._open_of.get(key, 0) + sequences
        if of_key > self.most_of_key:
            raise QueueFull("open", of_key, f"at most {self.most_of_key} run and wait of one API key")

    def take(self, sequences: int, key: str = "") -> None:
        """Count so many more. Raises `QueueFull`."""
        self.check(sequences, key)
        self.open += sequences
        self._open_of[key] = self._open_of.get(key, 0) + sequences

    def leave(self, sequences: int, seconds: float | None = None, key: str = "") -> None:
        """So many are over; a request that was served took so many seconds."""
        self.open -= sequences
        self._open_of[key] -= sequences
        assert self.open >= 0 and self._open_of[key] >= 0
        if not self._open_of[key]:
            del self._open_of[key]
        if seconds is not None:
            self._recent.append(seconds)

    def retry_after(self) -> int:
        """Seconds after which a place may be free: what a request has taken lately, from 1 to 60."""
        mean = sum(self._recent) / len(self._recent) if self._recent else 0.0
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)


class Place:
    """What one request counts for. As a context it is given back in the end, unless it was kept for longer."""

    def __init__(self, admission: Admission, key: str, begin: float) -> None:
        self._admission = admission
        self._key = key
        self.begin = begin
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
        if sequences > self._admission.most_of_key:
            limit = f"at most {self._admission.most_of_key} sequences are served at a time"
            raise InvalidRequest("n × len(prompt)", sequences, limit)
        self._admission.take(sequences - self._held, self._key)
        self._held = sequences
        self._kept = True

    def leave(self) -> None:
        """May be called twice."""
        seconds = self.age if self._kept else None
        if self._held:
            self._admission.leave(self._held, seconds, self._key)
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._kept:
            self.leave()
