"""KV in host memory: a second radix tree over slots of the host, which keeps what the device may evict.

When a path loses its last lock, what the host lacks of it is copied there in the background, so that evicting it from
the device loses nothing. If a prompt's prefix is cached in the host and not on the device, it is fetched while the
request waits for admission. Sequences never read the host: a plan names slots of the device only.

Both trees hold whole paths from position 0, so a path may be in one, in both or in none. A copy in flight locks its
path in both trees.

With a disk tier, what is saved to the host is then written to disk in the background, and a fetch may begin by reading
from disk to the host.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.disk_tier import DiskChunk, DiskJob, DiskTier
from radixgen.cache.loading import begin_load, cancel_load, end_load
from radixgen.cache.match import Match
from radixgen.cache.node import PRIVATE, Lock, Node
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.tokens import TokenArray, common_prefix_len
from radixgen.cache.tree import RadixTree

_MIN_FETCH = 32
"""Shorter prefixes are computed again: a fetch takes at least until the next step."""
_MANY_ROWS = 256
"""Only steps of at least so many rows measure how long computing a token takes."""
_PATIENCE = 0.01
"""Seconds that one call waits for the disk when nothing else can run."""
_FORGET_SECONDS = 60.0
"""After this time, rates that spoke against a fetch are measured anew, so that one slow copy does not end fetching."""
_SMOOTHING = 0.25
"""Weight of the latest measurement in a rate."""


class Copy(Protocol):
    """A copy of KV in flight."""

    @property
    def seconds(self) -> float:
        """Duration of the copy once it has finished, without waiting for earlier copies."""

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
    """A prefix on its way to the device, for `waiters` sequences or hints. When it has arrived, its path stays locked
    until all of them have left.
    """

    tokens: TokenArray
    namespace: str
    first: int
    """Position of the first token that is fetched."""
    extents: list[Extent]
    """Slots of the device for the tokens from `first` on."""
    device: Lock
    host: Lock
    first_read: int
    """Position of the first token that is read from disk."""
    read: DiskJob | None = None
    """The read from disk to the host, while it lasts."""
    copy: Copy | None = None
    """The copy from the host to the device, once it has begun."""
    waiters: int = 1
    arrived: bool = False

    @property
    def num_tokens(self) -> int:
        return self.tokens.size - self.first

    @property
    def num_read(self) -> int:
        """Number of tokens that are read from disk."""
        return self.tokens.size - self.first_read

    @property
    def locks_path(self) -> bool:
        return self.device.node is not None


@dataclass(eq=False, slots=True)
class _DiskWrite:
    """A path of the host that is being written to disk."""

    job: DiskJob
    host: Lock


class HostTier:
    """Moves KV between the tree of the device and a tree over slots of the host, and between the host and the disk."""

    def __init__(
        self,
        device: RadixTree,
        copies: KVCopies,
        disk: DiskTier | None = None,
        *,
        min_fetch: int = _MIN_FETCH,
        stamps: bool = False,
    ) -> None:
        """`disk`: reads and writes the memory of `copies`; `close` closes both. `min_fetch`: shorter prefixes are
        computed again. `stamps`: as for `RadixTree`.
        """
        self.tree = RadixTree(ExtentPool(copies.num_slots), stamps=stamps)
        self.saved_tokens = 0
        self.fetched_tokens = 0
        self.recomputed_tokens = 0
        self.fetch_seconds = 0.0
        self.waited_seconds = 0.0
        self._device = device
        self._copies = copies
        self._disk = disk
        self._min_fetch = min_fetch
        self._saves: deque[_Save] = deque()
        self._writes: deque[_DiskWrite] = deque()
        self._fetches: list[Fetch] = []
        self._arrived: list[Fetch] = []
        """Fetches that have arrived, and whose paths are still locked for their waiters."""
        self._seconds_per_read = self._seconds_per_fetched = 0.0
        self._seconds_per_computed = 0.0
        self._polled = 0.0
        self._forget_at = math.inf
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
        """Begin to copy to the host what it lacks of the path to a node that was unlocked.

        Copies nothing if others lock the path, if it belongs to one sequence alone, or if it does not fit.
        """
        while not node.known and node.parent is not None:
            node = node.parent
        if node.locked or not node.known or PRIVATE in node.namespace:
            return
        tokens = node.path_tokens()
        if self._reads(tokens, node.namespace):
            return
        lock = self.tree.insert(tokens, node.namespace, priority=node.priority)
        count = sum(part.known - part.scheduled for part in lock.held.unscheduled_path())
        if count > self.tree.pool.free + self.tree.evictable_tokens:
            self.tree.unlock(lock)
            return
        if count:
            slots = node.path_slots(tokens.size - count, tokens.size)
            copy = self._copies.save(slots, self._schedule(lock.held))
            self.saved_tokens += count
            self._saves.append(_Save(copy, self._device.lock(node), self.tree.lock(lock.held)))
        self._write_behind(tokens, lock)

    def _write_behind(self, tokens: TokenArray, lock: Lock) -> None:
        """Begin to write to disk what it lacks of a path of the host, and unlock the path when that is done."""
        chunks = self._disk.lacking(tokens, lock.held.namespace) if self._disk else []
        if self._disk is None or not chunks:
            self.tree.unlock(lock)
            return
        ready = self._saves[-1].copy.wait if self._saves else _nothing
        job = self._disk.write(chunks, lock.held.path_slots(0, tokens.size), ready)
        self._writes.append(_DiskWrite(job, lock))

    def _schedule(self, node: Node) -> NDArray[np.int64]:
        """Give slots of the host to the tokens of the path to `node` that have none, and return the slots."""
        lacking = node.unscheduled_path()
        self.tree.evict(sum(part.known - part.scheduled for part in lacking) - self.tree.pool.free)
        return np.concatenate([self.tree.schedule(part, part.known - part.scheduled) for part in lacking])

    def _reads(self, tokens: TokenArray, namespace: str) -> bool:
        """Return whether some of these tokens are being read from disk. Nothing may be copied to the host behind them,
        because a read may fail.
        """
        return any(
            fetch.read and fetch.namespace == namespace and common_prefix_len(fetch.tokens, tokens) > fetch.first_read
            for fetch in self._fetches
        )

    # -- to the device ------------------------------------------------------------------------------------

    def fetch(self, tokens: TokenArray, namespace: str, computed: int) -> Fetch | None:
        """Begin to fetch what host and disk have of `tokens` after the first `computed`, which the device has.

        Joins a fetch in flight that brings more of them. Returns None if computing takes less time, or without room.
        """
        for fetch in self._fetches:
            if fetch.namespace == namespace and common_prefix_len(fetch.tokens, tokens) > max(computed, fetch.first):
                fetch.waiters += 1
                return fetch
        match = self.tree.match_prefix(tokens, namespace)
        in_host = match.computed if match else 0
        chunks = self._chunks_after(tokens, namespace, match)
        stop = chunks[-1].start + self._disk.chunk_tokens if self._disk and chunks else in_host
        count = stop - computed
        if count < self._min_fetch:
            return None
        device = self._device.insert(tokens[:computed], namespace)
        extents = begin_load(self._device, count) if self._fetch_is_sooner(count, stop - in_host) else None
        if extents is None:
            self._device.unlock(device)
            self.recomputed_tokens += count
            return None
        prefix = tokens[:stop]
        fetch = Fetch(prefix, namespace, computed, extents, device, self.tree.insert(prefix, namespace), in_host)
        if self._disk and chunks:
            fetch.read = self._disk.read(chunks, in_host, self._schedule(fetch.host.held))
        else:
            self._load(fetch)
        self._fetches.append(fetch)
        return fetch

    def _chunks_after(self, tokens: TokenArray, namespace: str, match: Match | None) -> list[DiskChunk]:
        """Return the chunks on disk that continue the host's match, as many as the host has room for."""
        if self._disk is None or PRIVATE in namespace or (match and match.length > match.computed):
            return []  # what follows in the host is still on its way there
        in_host = match.computed if match else 0
        room = self.tree.pool.free + self.tree.evictable_tokens - in_host
        chunks = self._disk.find(tokens, namespace, in_host)
        return [chunk for chunk in chunks if chunk.start + self._disk.chunk_tokens - in_host <= room]

    def _load(self, fetch: Fetch) -> None:
        """Begin to copy what is fetched from the host to the device."""
        host_slots = fetch.host.held.path_slots(fetch.first, fetch.tokens.size)
        fetch.copy = self._copies.load(host_slots, _extent_slots(fetch.extents))

    def leave(self, fetch: Fetch) -> None:
        """Remove one waiter. The last one unlocks the path."""
        fetch.waiters -= 1
        if fetch.arrived and fetch.locks_path and not fetch.waiters:
            self._arrived.remove(fetch)
            self._device.unlock(fetch.device)

    def _fetch_is_sooner(self, count: int, read: int) -> bool:
        """Estimate whether fetching `count` tokens, `read` of them from disk, takes less time than computing them.

        Fetches in flight come first. Returns True until all was measured, and again when rates are forgotten.
        """
        if not self._seconds_per_computed:
            return True
        queued = sum(fetch.num_tokens for fetch in self._fetches)
        reads = sum(fetch.num_read for fetch in self._fetches if fetch.read)
        seconds = (queued + count) * self._seconds_per_fetched
        if read:
            seconds += (reads + read) * self._seconds_per_read
        if seconds <= count * self._seconds_per_computed:
            return True
        self._forget_at = min(self._forget_at, self._polled + _FORGET_SECONDS)
        if self._polled < self._forget_at:
            return False
        self._seconds_per_read = self._seconds_per_fetched = 0.0
        self._forget_at = math.inf
        return True

    # -- copies in flight ---------------------------------------------------------------------------------

    def poll(self, now: float, rows: int) -> None:
        """Complete the copies that have finished. Called between two steps, the last one of `rows` rows."""
        if rows >= _MANY_ROWS:
            self._seconds_per_computed = _smoothed(self._seconds_per_computed, (now - self._polled) / rows)
        self._polled = now
        while self._saves and self._saves[0].copy.done():
            self._complete_save(self._saves.popleft())
        while self._writes and self._writes[0].job.done():
            self._complete_write(self._writes.popleft())
        self._fetches = [fetch for fetch in self._fetches if not self._go_on(fetch)]

    def wait(self) -> bool:
        """Block until a fetch in flight can go on, but only briefly for the disk. Returns whether one can."""
        if not self._fetches:
            return False
        began = perf_counter()
        fetch = next((fetch for fetch in self._fetches if fetch.copy), self._fetches[0])
        ready = _wait(fetch, _PATIENCE)
        self.waited_seconds += perf_counter() - began
        return ready

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
        """Wait for copies in flight, then evict everything from host and disk. Returns the number of tokens."""
        while self._fetches:
            _wait(self._fetches[0], None)
            self._fetches = [fetch for fetch in self._fetches if not self._go_on(fetch)]
        self.complete_saves()
        self.complete_writes()
        return self.tree.reset() + (self._disk.reset() if self._disk else 0)

    def complete_writes(self) -> None:
        """Wait until everything that the host began to write is on disk."""
        while self._writes:
            self._writes[0].job.wait()
            self._complete_write(self._writes.popleft())

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
            **(self._disk.figures() if self._disk else {}),
        }

    def close(self) -> None:
        """Finish writing to disk, and free the memory of the host."""
        self._device.on_idle = None
        if self._disk is not None:
            self._disk.close()
        self._copies.release()

    def check(self) -> None:
        """Assert the invariants of the host's tree, and that locks there belong to copies in flight."""
        self.tree.check()
        if self._disk is not None:
            self._disk.check()
        locks: dict[int, int] = {}
        held = [save.host for save in self._saves] + [write.host for write in self._writes]
        for lock in held + [fetch.host for fetch in self._fetches]:
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

    def _complete_write(self, write: _DiskWrite) -> None:
        assert self._disk is not None
        self._disk.complete_write(write.job)
        self.tree.unlock(write.host)

    def _go_on(self, fetch: Fetch) -> bool:
        """Take the next step of a fetch, if what it waits for has finished. Returns whether it was the last."""
        if fetch.read is not None and fetch.read.done():
            self._complete_read(fetch, fetch.read)
        elif fetch.copy is not None and fetch.copy.done():
            self._complete_fetch(fetch, fetch.copy)
        return fetch.arrived

    def _complete_read(self, fetch: Fetch, read: DiskJob) -> None:
        """Begin to copy what was read to the device, unless nobody waits any more or the read failed."""
        assert self._disk is not None
        fetch.read = None
        if self._disk.complete_read(read):
            self._seconds_per_read = _smoothed(self._seconds_per_read, read.seconds / fetch.num_read)
            self.tree.commit(fetch.host.held)
            if fetch.waiters:
                self._load(fetch)
                return
        cancel_load(self._device, fetch.extents)
        self.tree.unlock(fetch.host)
        self._device.unlock(fetch.device)
        fetch.arrived = True

    def _complete_fetch(self, fetch: Fetch, copy: Copy) -> None:
        """Give the fetched slots to the nodes of the path that still lack them."""
        self.fetch_seconds += copy.seconds
        self.fetched_tokens += fetch.num_tokens
        self._seconds_per_fetched = _smoothed(self._seconds_per_fetched, copy.seconds / fetch.num_tokens)
        self.tree.unlock(fetch.host)
        lock = self._device.insert(fetch.tokens, fetch.namespace)
        end_load(self._device, lock.held, fetch.first, fetch.extents)
        self._device.unlock(fetch.device)
        fetch.device, fetch.arrived = lock, True
        if fetch.waiters:
            self._arrived.append(fetch)
        else:
            self._device.unlock(lock)


def _wait(fetch: Fetch, seconds: float | None) -> bool:
    """Block until the read or copy of a fetch has finished, a read for at most `seconds`. Returns whether it has."""
    if fetch.read is not None:
        return fetch.read.wait(seconds)
    if fetch.copy is not None:
        fetch.copy.wait()
    return True


def _nothing() -> None:
    pass


def _extent_slots(extents: list[Extent]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(extent.start, extent.end) for extent in extents])


def _smoothed(average: float, value: float) -> float:
    return average + _SMOOTHING * (value - average) if average else value
