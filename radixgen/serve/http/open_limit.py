"""Limits on concurrent work, in total and per API key. Requests beyond them are rejected at once."""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self

from radixgen.core import InvalidRequest, QueueFull, check_integer

_RECENT = 32
_LONGEST_WAIT = 60


class OpenLimit:
    """Limit on open sequences, running or waiting, counted from when a request was read until it ends."""

    def __init__(self, max_open: int, max_open_per_key: int | None = None) -> None:
        """
        max_open: maximum number of open sequences.
        max_open_per_key: maximum number of open sequences per API key; default: `max_open`.
        """
        check_integer("max_open", max_open, 1, 1 << 20)
        self.max_open = max_open
        self.max_open_per_key = max_open if max_open_per_key is None else min(max_open_per_key, max_open)
        self.open = 0
        self._open_by_key: dict[str, int] = {}
        self._recent: defaultdict[str, deque[float]] = defaultdict(partial(deque, maxlen=_RECENT))

    def enter(self, key_id: str = "", begin: float | None = None) -> "OpenCount":
        """Count one sequence for now; `OpenCount.keep` sets the real number. Raises `QueueFull`.

        begin: monotonic time when the request arrived; default: now.
        """
        self.take(1, key_id)
        return OpenCount(self, key_id, time.monotonic() if begin is None else begin)

    def check(self, sequences: int, key_id: str = "") -> None:
        """Raise `QueueFull` if `sequences` more would exceed a limit."""
        if self.open + sequences > self.max_open:
            raise QueueFull("open", self.open + sequences, f"at most {self.max_open} sequences run and wait")
        of_key = self._open_by_key.get(key_id, 0) + sequences
        if of_key > self.max_open_per_key:
            raise QueueFull("open", of_key, f"at most {self.max_open_per_key} sequences run and wait per API key")

    def take(self, sequences: int, key_id: str = "") -> None:
        """Count `sequences` more. Raises `QueueFull`."""
        self.check(sequences, key_id)
        self.open += sequences
        self._open_by_key[key_id] = self._open_by_key.get(key_id, 0) + sequences

    def leave(self, sequences: int, key_id: str = "", seconds: float | None = None) -> None:
        """Count `sequences` fewer.

        seconds: duration of their request, if it was served.
        """
        self.open -= sequences
        self._open_by_key[key_id] -= sequences
        assert self.open >= 0 and self._open_by_key[key_id] >= 0
        if not self._open_by_key[key_id]:
            del self._open_by_key[key_id]
        if seconds is not None:
            self._recent[key_id].append(seconds)

    def retry_after(self, key_id: str = "") -> int:
        """Value of the `Retry-After` header: mean duration of recent requests with this key, from 1 to 60 seconds.

        Requests with other keys are not considered: their durations are private.
        """
        recent = self._recent.get(key_id)
        mean = sum(recent) / len(recent) if recent else 0.0
        return min(max(math.ceil(mean), 1), _LONGEST_WAIT)


class OpenCount:
    """Number of open sequences of a request. As a context manager, it is released at the end unless it was kept."""

    def __init__(self, open_limit: OpenLimit, key_id: str, begin: float) -> None:
        self._limit = open_limit
        self._key_id = key_id
        self.begin = begin
        self._held = 1
        self._kept = False

    @property
    def age(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.begin

    def keep(self, sequences: int) -> None:
        """Count the actual number of sequences, until `leave`.

        Raises `InvalidRequest` if they exceed the limit of a key, `QueueFull` if they exceed what is free now.
        """
        if sequences > self._limit.max_open_per_key:
            limit = f"at most {self._limit.max_open_per_key} sequences are served at a time"
            raise InvalidRequest("n × len(prompt)", sequences, limit)
        self._limit.take(sequences - self._held, self._key_id)
        self._held = sequences
        self._kept = True

    def leave(self) -> None:
        """Stop counting the sequences. May be called twice."""
        seconds = self.age if self._kept else None
        if self._held:
            self._limit.leave(self._held, self._key_id, seconds)
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self._kept:
            self.leave()


class Quota:
    """Limit on an amount that requests hold, in total and per API key."""

    def __init__(self, field: str, unit: str, *, most: int | None = None, most_of_key: int | None = None) -> None:
        """
        field, unit: names of the amount in error messages.
        most: limit on the total.
        most_of_key: limit per key; a key that holds nothing may exceed it once.
        """
        self.total = 0
        self._field = field
        self._unit = unit
        self._most = most
        self._most_of_key = most_of_key
        self._of_key: Counter[str] = Counter()

    def take(self, amount: int, key: str) -> None:
        """Add to the amount of a key. Raises `QueueFull`."""
        held = self._of_key[key]
        if self._most_of_key is not None and held and held + amount > self._most_of_key:
            limit = f"at most {self._most_of_key} {self._unit} per API key"
            raise QueueFull(self._field, held + amount, limit)
        if self._most is not None and self.total + amount > self._most:
            raise QueueFull(self._field, self.total + amount, f"at most {self._most} {self._unit}")
        self.total += amount
        self._of_key[key] += amount

    @contextmanager
    def held_by(self, key: str) -> Iterator[Callable[[int], None]]:
        """Context manager that yields a function to take amounts, which are released at the end."""
        taken = 0

        def take(amount: int) -> None:
            nonlocal taken
            self.take(amount, key)
            taken += amount

        try:
            yield take
        finally:
            self.leave(taken, key)

    def leave(self, amount: int, key: str) -> None:
        """Subtract from the amount of a key."""
        self.total -= amount
        self._of_key[key] -= amount
        assert self._of_key[key] >= 0
        if not self._of_key[key]:
            del self._of_key[key]
