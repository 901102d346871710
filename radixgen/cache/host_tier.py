"""KV in host memory: a second radix tree over slots of the host, which keeps what the device may evict.

When a path loses its last lock, what the host lacks of it is copied there in the background, so that evicting it from
the device loses nothing. If a prompt's prefix is cached in the host and not on the device, it is fetched while the
request waits for admission. Sequences never read the host: a plan names slots of the device only.

Both trees hold whole paths from position 0, so a path may be in one, in both or in none. A copy in flight locks its
path in both trees.

With a disk tier, what is saved to the host is then written to disk in the background, and a fetch may begin by reading
from disk to the host.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from radixgen.cache.disk_tier import DiskTier
from radixgen.cache.host_copies import KVCopies
from radixgen.cache.host_fetches import HostFetches
from radixgen.cache.host_saves import HostSaves
from radixgen.cache.node import Lock
from radixgen.cache.pool import ExtentPool
from radixgen.cache.tree import RadixTree

_MIN_FETCH = 32
"""Shorter prefixes are computed again: a fetch takes at least until the next step."""


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
        self.fetches = HostFetches(device, self.tree, copies, disk, min_fetch)
        self.saves = HostSaves(device, self.tree, copies, disk, self.fetches.reads)
        self._device = device
        self._copies = copies
        self._disk = disk
        device.on_idle = self.saves.save

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    @property
    def fetching(self) -> bool:
        """Whether a fetch is in flight."""
        return self.fetches.in_flight

    def locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the device."""
        yield from self.saves.device_locks()
        yield from self.fetches.device_locks()

    def poll(self, now: float, rows: int) -> None:
        """Complete the copies that have finished. Called between two steps, the last one of `rows` rows."""
        self.fetches.costs.stepped(now, rows)
        self.saves.poll()
        self.fetches.poll()

    def reset(self) -> int:
        """Wait for copies in flight, then evict everything from host and disk. Returns the number of tokens."""
        self.fetches.complete()
        self.saves.complete()
        self.saves.complete_writes()
        return self.tree.reset() + (self._disk.reset() if self._disk else 0)

    def figures(self) -> dict[str, Any]:
        """Return the tier's fields of `Stats`."""
        return {
            "kv_tokens_host_total": self.tree.pool.capacity,
            "kv_tokens_host_used": self.tree.pool.used,
            "host_saved_tokens": self.saves.saved_tokens,
            "host_fetched_tokens": self.fetches.fetched_tokens,
            "host_recomputed_tokens": self.fetches.recomputed_tokens,
            "host_evicted_tokens": self.tree.evicted_tokens,
            "host_fetch_seconds": self.fetches.fetch_seconds,
            "host_waited_seconds": self.fetches.waited_seconds,
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
        self.fetches.check()
        if self._disk is not None:
            self._disk.check()
        locks = Counter(lock.held for lock in (*self.saves.host_locks(), *self.fetches.host_locks()))
        for node in self.tree.nodes():
            assert node.lock_count == locks[node], f"{node} of the host has a lock without a copy"
