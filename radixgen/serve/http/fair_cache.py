"""`FairCache`: what a server keeps for its callers, within bounds that no caller can use up for the others."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import Generic, Protocol, TypeVar


class OwnedKey(Protocol):
    """Key of an entry that belongs to an API key."""

    @property
    def key_id(self) -> str:
        """`Caller.key_id` of its owner."""


K = TypeVar("K", bound=OwnedKey)
V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    num_bytes: int
    used: float
    """Time of the last write, in seconds"""


class FairCache(Generic[K, V]):
    """LRU cache bounded by count, bytes and age. If it is full, the API key with the most loses its oldest entry.

    Thread-safe. Age counts from the last `put` or `touch`.
    """

    def __init__(
        self,
        most: int,
        most_bytes: int,
        keep_seconds: float,
        on_removal: Callable[[K, V], object] = lambda key, value: None,
    ) -> None:
        """on_removal: called with each entry that is removed or replaced, while the cache is locked."""
        self._most = most
        self._most_bytes = most_bytes
        self._keep_seconds = keep_seconds
        self._on_removal = on_removal
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        with self._lock:
            return iter(list(self._entries))

    @property
    def num_bytes(self) -> int:
        """Size of all entries."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    def get(self, key: K) -> V | None:
        """Value of a key; None if there is none, or if it is too old."""
        entry = self._entries.get(key)
        return None if entry is None or entry.used < time.monotonic() - self._keep_seconds else entry.value

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Add or replace an entry, and remove what is too old or beyond the bounds."""
        now = time.monotonic()
        with self._lock:
            self.remove(key)
            self._entries[key] = _Entry(value, num_bytes, now)
            while self._entries and next(iter(self._entries.values())).used < now - self._keep_seconds:
                self.remove(next(iter(self._entries)))
            while len(self._entries) > self._most:
                self._remove_oldest(lambda _: 1)
            while self.num_bytes > self._most_bytes:
                self._remove_oldest(lambda entry: entry.num_bytes)

    def locked(self) -> AbstractContextManager[object]:
        """Context manager in which no other thread changes the cache."""
        return self._lock

    def touch(self, key: K) -> None:
        """Count an entry as new."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                self._entries[key].used = time.monotonic()

    def remove(self, key: K) -> V | None:
        """Remove an entry, and return its value; None if there is none."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return None
            self._on_removal(key, entry.value)
            return entry.value

    def _remove_oldest(self, weigh: Callable[[_Entry[V]], int]) -> None:
        """Remove the oldest entry of the API key with the most."""
        weights: Counter[str] = Counter()
        for key, entry in self._entries.items():
            weights[key.key_id] += weigh(entry)
        ((largest, _),) = weights.most_common(1)
        self.remove(next(key for key in self._entries if key.key_id == largest))
