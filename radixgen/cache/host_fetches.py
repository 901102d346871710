"""Copies of prefixes from the host, or from disk through the host, to the device, for requests that wait for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from radixgen.cache.disk_tier import DiskChunk, DiskJob, DiskTier
from radixgen.cache.fetch_costs import FetchCosts
from radixgen.cache.host_copies import Copy, KVCopies
from radixgen.cache.loading import begin_load, cancel_load, end_load, schedule_path
from radixgen.cache.match import Match
from radixgen.cache.node import PRIVATE, Lock
from radixgen.cache.pool import Extent, extent_slots
from radixgen.cache.tokens import TokenArray, common_prefix_len
from radixgen.cache.tree import RadixTree

_PATIENCE = 0.01
"""Seconds that one call waits for the disk when nothing else can run."""


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


class HostFetches:
    """Fetches in flight, and those that have arrived and whose paths are still locked for their waiters."""

    def __init__(
        self, device: RadixTree, host: RadixTree, copies: KVCopies, disk: DiskTier | None, min_fetch: int
    ) -> None:
        self.min_fetch = min_fetch
        self.costs = FetchCosts()
        self.fetched_tokens = 0
        self.recomputed_tokens = 0
        self.fetch_seconds = 0.0
        self.waited_seconds = 0.0
        self._device = device
        self._host = host
        self._copies = copies
        self._disk = disk
        self._fetches: list[Fetch] = []
        self._arrived: list[Fetch] = []

    @property
    def in_flight(self) -> bool:
        """Whether a fetch is in flight."""
        return bool(self._fetches)

    def begin(self, tokens: TokenArray, namespace: str, computed: int, known: int) -> Fetch | None:
        """Begin to fetch what host and disk have of `tokens` after the first `computed`, which the device has. A
        part of it that is computed in less time is left out.

        Joins a fetch in flight that brings more of them. Returns None if nothing is fetched, also for lack of room.
        Then those after the first `known`, which nobody computes yet, count as computed again.
        """
        for fetch in self._fetches:
            if fetch.namespace == namespace and common_prefix_len(fetch.tokens, tokens) > max(computed, fetch.first):
                fetch.waiters += 1
                return fetch
        match = self._host.match_prefix(tokens, namespace)
        in_host = match.computed if match else 0
        chunks = self._chunks_after(tokens, namespace, match)
        stop = chunks[-1].start + self._disk.chunk_tokens if self._disk and chunks else in_host
        if stop - computed < self.min_fetch:
            return None
        end = self._best_end(computed, in_host, stop)
        device = self._device.insert(tokens[:computed], namespace)
        extents = begin_load(self._device, end - computed) if end - computed >= self.min_fetch else None
        if extents is None:
            self._device.unlock(device)
            self.recomputed_tokens += max(stop - known, 0)
            return None
        prefix = tokens[:end]
        fetch = Fetch(prefix, namespace, computed, extents, device, self._host.insert(prefix, namespace), in_host)
        if self._disk and end > in_host:
            fetch.read = self._disk.read(chunks, in_host, schedule_path(self._host, fetch.host.held))
        else:
            self._load(fetch)
        self._fetches.append(fetch)
        return fetch

    def leave(self, fetch: Fetch) -> None:
        """Remove one waiter. The last one unlocks the path."""
        fetch.waiters -= 1
        if fetch.arrived and fetch.locks_path and not fetch.waiters:
            self._arrived.remove(fetch)
            self._device.unlock(fetch.device)

    def reads(self, tokens: TokenArray, namespace: str) -> bool:
        """Return whether some of these tokens are being read from disk. Nothing may be copied to the host behind them,
        because a read may fail.
        """
        return any(
            fetch.read and fetch.namespace == namespace and common_prefix_len(fetch.tokens, tokens) > fetch.first_read
            for fetch in self._fetches
        )

    # -- in flight ----------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take the next step of each fetch for which what it waits for has finished."""
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

    def complete(self) -> None:
        """Wait for all fetches."""
        while self._fetches:
            _wait(self._fetches[0], None)
            self.poll()

    def release_arrived(self) -> bool:
        """Unlock the paths that were fetched for waiting sequences. Returns whether there were any."""
        arrived, self._arrived = self._arrived, []
        for fetch in arrived:
            self._device.unlock(fetch.device)
        return bool(arrived)

    def device_locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the device."""
        return (fetch.device for fetch in (*self._fetches, *self._arrived))

    def host_locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the host."""
        return (fetch.host for fetch in self._fetches)

    def check(self) -> None:
        """Assert that slots are loaded for fetches in flight only, and that those that arrived lock their paths."""
        loading = sorted(extent for fetch in self._fetches for extent in fetch.extents)
        assert loading == sorted(self._device.loading), "slots are loaded that no fetch has"
        assert all(fetch.arrived and fetch.locks_path for fetch in self._arrived)

    # -- inside -------------------------------------------------------------------------------------------

    def _chunks_after(self, tokens: TokenArray, namespace: str, match: Match | None) -> list[DiskChunk]:
        """Return the chunks on disk that continue the host's match, as many as the host has room for."""
        if self._disk is None or PRIVATE in namespace or (match and match.length > match.computed):
            return []  # what follows in the host is still on its way there
        in_host = match.computed if match else 0
        room = self._host.pool.free + self._host.evictable_tokens - in_host
        chunks = self._disk.find(tokens, namespace, in_host)
        return [chunk for chunk in chunks if chunk.start + self._disk.chunk_tokens - in_host <= room]

    def _best_end(self, first: int, in_host: int, stop: int) -> int:
        queued = sum(fetch.num_tokens for fetch in self._fetches)
        reads = sum(fetch.num_read for fetch in self._fetches if fetch.read)
        return self.costs.best_end(first, in_host, stop, queued=queued, queued_reads=reads)

    def _load(self, fetch: Fetch) -> None:
        """Begin to copy what is fetched from the host to the device."""
        host_slots = fetch.host.held.path_slots(fetch.first, fetch.tokens.size)
        fetch.copy = self._copies.load(host_slots, extent_slots(fetch.extents))

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
            self.costs.read(fetch.num_read, read.seconds)
            self._host.commit(fetch.host.held)
            if fetch.waiters:
                self._load(fetch)
                return
        cancel_load(self._device, fetch.extents)
        self._host.unlock(fetch.host)
        self._device.unlock(fetch.device)
        fetch.arrived = True

    def _complete_fetch(self, fetch: Fetch, copy: Copy) -> None:
        """Give the fetched slots to the nodes of the path that still lack them."""
        self.fetch_seconds += copy.seconds
        self.fetched_tokens += fetch.num_tokens
        self.costs.fetched(fetch.num_tokens, copy.seconds)
        self._host.unlock(fetch.host)
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
