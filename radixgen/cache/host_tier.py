"""KV in host memory: a second radix tree over slots of the host, which keeps what the device may evict.

A path that its last lock leaves is copied to the host in the background, as far as the host lacks it, so that evicting
it from the device loses nothing. If a prompt's prefix is cached in the host and not on the device, it is fetched while
the request waits for admission. Sequences never read the host: a plan names slots of the device only.

Both trees hold whole paths from position 0, so a path may be in one, in both or in none. A copy in flight locks its
path in both trees.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.loading import begin_load, end_load
from radixgen.cache.node import PRIVATE, Lock, Node
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.tokens import TokenArray, common_prefix_len
from radixgen.cache.tree import RadixTree

_MIN_FETCH = 32
"""Shorter prefixes are computed again: a fetch takes at least until the next step."""
_MANY_ROWS = 256
"""Rows of a step that measures how long computing takes."""
_SMOOTHING = 0.25
"""Weight of the latest measurement in a rate."""


class Copy(Protocol):
    """A copy of KV in flight."""

    @property
    def seconds(self) -> float:
        """How long the copy took, once it has finished; without the copies before it."""

    def done(self) -> bool:
        """Whether the copy has finished."""

    def wait(self) -> None:
        """Block until the copy has finished."""


class KVCopies(Protocol):
    """Copies KV between slots of the device and slots of the host. Copies of one direction finish in order.

    Slots are int64 `[tokens]`, those of source and target in the same order.
    """

    num_slots: int
    """Slots of the host."""

    def save(self, slots: NDArray[np.int64], host_slots: NDArray[np.int64]) -> Copy:
        """Begin to copy from the device to the host, after all work that was submitted to the device so far."""

    def load(self, host_slots: NDArray[np.int64], slots: NDArray[np.int64]) -> Copy:
        """Begin to copy from the host to the device, after all work that was submitted to the device so far."""

    def release(self) -> None:
        """Free the memory of the host, once copies in flight have finished."""


@dataclass(eq=False, slots=True)
class _Save:
    """A path on its way to the host."""

    copy: Copy
    device: Lock
    host: Lock


@dataclass(eq=False, slots=True)
class Fetch:
    """A prefix on its way to the device, for `waiters` waiting sequences. When it has arrived, its path stays locked
    until all of them were admitted or are gone.
    """

    tokens: TokenArray
    namespace: str
    first: int
    """Position of the first token that is fetched."""
    extents: list[Extent]
    """Slots of the device for the tokens from `first` on."""
    copy: Copy
    device: Lock
    host: Lock
    waiters: int = 1
    arrived: bool = False

    @property
    def num_tokens(self) -> int:
        return self.tokens.size - self.first

    @property
    def locks_path(self) -> bool:
        return self.device.node is not None


class HostTier:
    """Moves KV between the tree of the device and a tree over slots of the host."""

    def __init__(
        self, device: RadixTree, copies: KVCopies, *, min_fetch: int = _MIN_FETCH, stamps: bool = False
    ) -> None:
        """`min_fetch`: prefixes of fewer tokens are computed again. `stamps` as for `RadixTree`."""
        self.tree = RadixTree(ExtentPool(copies.num_slots), stamps=stamps)
        self.saved_tokens = 0
        self.fetched_tokens = 0
        self.recomputed_tokens = 0
        self.fetch_seconds = 0.0
        self.waited_seconds = 0.0
        self._device = device
        self._copies = copies
        self._min_fetch = min_fetch
        self._saves: deque[_Save] = deque()
        self._fetches: deque[Fetch] = deque()
        self._arrived: list[Fetch] = []
        """Fetches that arrived and whose path is still locked for a waiting sequence."""
        self._seconds_per_fetched = 0.0
        self._seconds_per_computed = 0.0
        self._polled = 0.0
        device.on_idle = self.save

    @property
    def fetching(self) -> bool:
        """Whether a fetch is in flight."""
        return bool(self._fetches)

    def locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the device."""
        yield from (save.device for save in self._saves)
        yield from (fetch.device for fetch in (*self._fetches, *self._arrived))

    # -- to the host --------------------------------------------------------------------------------------

    def save(self, node: Node) -> None:
        """Begin to copy the path to a node that was unlocked to the host, as far as the host lacks it.

        Copies nothing if others lock the path, if it belongs to one sequence alone, or if it does not fit.
        """
        while not node.known and node.parent is not None:
            node = node.parent
        if node.locked or not node.known or PRIVATE in node.namespace:
            return
        tokens = node.path_tokens()
        lock = self.tree.insert(tokens, node.namespace, priority=node.priority)
        lacking = [part for part in lock.held.path() if part.scheduled < part.known]
        count = sum(part.known - part.scheduled for part in lacking)
        if not count or count > self.tree.pool.free + self.tree.evictable_tokens:
            self.tree.unlock(lock)
            return
        self.tree.evict(count - self.tree.pool.free)
        host_slots = [self.tree.schedule(part, part.known - part.scheduled) for part in lacking]
        slots = _path_slots(node, tokens.size - count, tokens.size)
        copy = self._copies.save(slots, np.concatenate(host_slots))
        self.saved_tokens += count
        self._saves.append(_Save(copy, self._device.lock(node), lock))

    # -- to the device ------------------------------------------------------------------------------------

    def fetch(self, tokens: TokenArray, namespace: str, computed: int) -> Fetch | None:
        """Begin to fetch what the host has of `tokens` after the first `computed`, which the device has.

        Joins a fetch in flight that brings more of them. Returns None if computing is sooner or if there is no room.
        """
        for fetch in self._fetches:
            if fetch.namespace == namespace and common_prefix_len(fetch.tokens, tokens) > max(computed, fetch.first):
                fetch.waiters += 1
                return fetch
        match = self.tree.match_prefix(tokens, namespace)
        count = match.computed - computed if match else 0
        if count < self._min_fetch:
            return None
        device = self._device.insert(tokens[:computed], namespace)
        extents = begin_load(self._device, count) if self._fetch_is_sooner(count) else None
        if extents is None:
            self._device.unlock(device)
            self.recomputed_tokens += count
            return None
        prefix = tokens[: computed + count]
        host = self.tree.insert(prefix, namespace)
        copy = self._copies.load(_path_slots(host.held, computed, prefix.size), _extent_slots(extents))
        fetch = Fetch(prefix, namespace, computed, extents, copy, device, host)
        self._fetches.append(fetch)
        return fetch

    def leave(self, fetch: Fetch) -> None:
        """Count one waiter less. The last unlocks the path."""
        fetch.waiters -= 1
        if fetch.arrived and fetch.locks_path and not fetch.waiters:
            self._arrived.remove(fetch)
            self._device.unlock(fetch.device)

    def _fetch_is_sooner(self, count: int) -> bool:
        """Return whether fetching `count` tokens, after those on their way, is sooner than computing them.

        Until both were measured, fetching is.
        """
        if not self._seconds_per_computed:
            return True
        queued = sum(fetch.num_tokens for fetch in self._fetches)
        return (queued + count) * self._seconds_per_fetched <= count * self._seconds_per_computed

    # -- copies in flight ---------------------------------------------------------------------------------

    def poll(self, now: float, rows: int) -> None:
        """Complete the copies that have finished. Called between two steps, the last one of `rows` rows."""
        if rows >= _MANY_ROWS:
            self._seconds_per_computed = _smoothed(self._seconds_per_computed, (now - self._polled) / rows)
        self._polled = now
        while self._saves and self._saves[0].copy.done():
            self._complete_save(self._saves.popleft())
        while self._fetches and self._fetches[0].copy.done():
            self._complete_fetch(self._fetches.popleft())

    def wait(self) -> bool:
        """Block until the first fetch in flight has finished. Returns False if there is none."""
        if not self._fetches:
            return False
        began = perf_counter()
        self._fetches[0].copy.wait()
        self.waited_seconds += perf_counter() - began
        return True

    def complete_saves(self) -> bool:
        """Wait for all saves, so that what they copied may be evicted. Returns whether there were any."""
        waiting = bool(self._saves)
        while self._saves:
            self._saves[0].copy.wait()
            self._complete_save(self._saves.popleft())
        return waiting

    def release_fetched(self) -> bool:
        """Unlock the paths that were fetched for waiting sequences. Returns whether there were any."""
        arrived, self._arrived = self._arrived, []
        for fetch in arrived:
            self._device.unlock(fetch.device)
        return bool(arrived)

    def reset(self) -> int:
        """Evict everything from the host once the copies in flight have finished. Returns the number of tokens."""
        for fetch in self._fetches:
            fetch.copy.wait()
        self.complete_saves()
        return self.tree.reset()

    def figures(self) -> dict[str, Any]:
        """Return the tier's fields of `Stats`."""
        return {
            "kv_tokens_host_total": self.tree.pool.capacity,
            "kv_tokens_host_used": self.tree.pool.used,
            "host_saved_tokens": self.saved_tokens,
            "host_fetched_tokens": self.fetched_tokens,
            "host_recomputed_tokens": self.recomputed_tokens,
            "host_evicted_tokens": self.tree.evicted_tokens,
            "host_fetch_seconds": self.fetch_seconds,
            "host_waited_seconds": self.waited_seconds,
        }

    def close(self) -> None:
        """Free the memory of the host."""
        self._device.on_idle = None
        self._copies.release()

    def check(self) -> None:
        """Assert the invariants of the host's tree, and that locks there belong to copies in flight."""
        self.tree.check()
        locks: dict[int, int] = {}
        for lock in [save.host for save in self._saves] + [fetch.host for fetch in self._fetches]:
            locks[lock.held.id] = locks.get(lock.held.id, 0) + 1
        for node in self.tree.nodes():
            assert node.lock_count == locks.get(node.id, 0), f"{node} of the host has a lock without a copy"
        loading = sorted(extent for fetch in self._fetches for extent in fetch.extents)
        assert loading == sorted(self._device.loading), "slots are loaded that no fetch has"
        assert all(fetch.arrived and fetch.locks_path for fetch in self._arrived)

    def _complete_save(self, save: _Save) -> None:
        self.tree.commit(save.host.held)
        self.tree.unlock(save.host)
        self._device.unlock(save.device)

    def _complete_fetch(self, fetch: Fetch) -> None:
        """Give the fetched slots to the nodes of the path that still lack them."""
        self.fetch_seconds += fetch.copy.seconds
        self.fetched_tokens += fetch.num_tokens
        self._seconds_per_fetched = _smoothed(self._seconds_per_fetched, fetch.copy.seconds / fetch.num_tokens)
        self.tree.unlock(fetch.host)
        lock = self._device.insert(fetch.tokens, fetch.namespace)
        end_load(self._device, lock.held, fetch.first, fetch.extents)
        self._device.unlock(fetch.device)
        fetch.device, fetch.arrived = lock, True
        if fetch.waiters:
            self._arrived.append(fetch)
        else:
            self._device.unlock(lock)


def _path_slots(node: Node, first: int, stop: int) -> NDArray[np.int64]:
    """Return the slots of the tokens at positions `[first, stop)` of the path to `node`."""
    pieces = []
    part: Node | None = node
    while part is not None and stop > first:
        begin = max(first, part.start)
        if begin < stop:
            pieces.append(part.slots(begin - part.start, stop - part.start))
            stop = begin
        part = part.parent
    return np.concatenate(pieces[::-1])


def _extent_slots(extents: list[Extent]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(extent.start, extent.end) for extent in extents])


def _smoothed(average: float, value: float) -> float:
    return average + _SMOOTHING * (value - average) if average else value
