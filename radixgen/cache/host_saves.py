"""Copies of paths to the host, and from there to disk, so that evicting them from the device loses nothing."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from radixgen.cache.disk_tier import DiskJob, DiskTier
from radixgen.cache.host_copies import Copy, KVCopies
from radixgen.cache.loading import schedule_path
from radixgen.cache.node import PRIVATE, Lock, Node
from radixgen.cache.tokens import TokenArray
from radixgen.cache.tree import RadixTree


@dataclass(eq=False, slots=True)
class _Save:
    """A path on its way to the host."""

    copy: Copy
    device: Lock
    host: Lock


@dataclass(eq=False, slots=True)
class _DiskWrite:
    """A path of the host that is being written to disk."""

    job: DiskJob
    host: Lock


class HostSaves:
    """Saves to the tree of the host, and writes to disk, in flight. Both finish in the order in which they began."""

    def __init__(
        self,
        device: RadixTree,
        host: RadixTree,
        copies: KVCopies,
        disk: DiskTier | None,
        reads: Callable[[TokenArray, str], bool],
    ) -> None:
        """`reads`: as `HostFetches.reads`."""
        self.saved_tokens = 0
        self._device = device
        self._host = host
        self._copies = copies
        self._disk = disk
        self._reads = reads
        self._saves: deque[_Save] = deque()
        self._writes: deque[_DiskWrite] = deque()

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
        lock = self._host.insert(tokens, node.namespace, priority=node.priority)
        count = sum(part.known - part.scheduled for part in lock.held.unscheduled_path())
        if count > self._host.pool.free + self._host.evictable_tokens:
            self._host.unlock(lock)
            return
        if count:
            slots = node.path_slots(tokens.size - count, tokens.size)
            copy = self._copies.save(slots, schedule_path(self._host, lock.held))
            self.saved_tokens += count
            self._saves.append(_Save(copy, self._device.lock(node), self._host.lock(lock.held)))
        self._write_behind(tokens, lock)

    def _write_behind(self, tokens: TokenArray, lock: Lock) -> None:
        """Begin to write to disk what it lacks of a path of the host, and unlock the path when that is done."""
        chunks = self._disk.lacking(tokens, lock.held.namespace) if self._disk else []
        if self._disk is None or not chunks:
            self._host.unlock(lock)
            return
        ready = self._saves[-1].copy.wait if self._saves else _nothing
        job = self._disk.write(chunks, lock.held.path_slots(0, tokens.size), ready)
        self._writes.append(_DiskWrite(job, lock))

    def poll(self) -> None:
        """Complete what has finished."""
        while self._saves and self._saves[0].copy.done():
            self._complete_save()
        while self._writes and self._writes[0].job.done():
            self._complete_write()

    def complete(self) -> bool:
        """Wait for all saves, so that what they copied may be evicted. Returns whether there were any."""
        waiting = bool(self._saves)
        while self._saves:
            self._saves[0].copy.wait()
            self._complete_save()
        return waiting

    def complete_writes(self) -> None:
        """Wait until everything that the host began to write is on disk."""
        while self._writes:
            self._writes[0].job.wait()
            self._complete_write()

    def device_locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the device."""
        return (save.device for save in self._saves)

    def host_locks(self) -> Iterator[Lock]:
        """Iterate over the locks that are held in the tree of the host."""
        yield from (save.host for save in self._saves)
        yield from (write.host for write in self._writes)

    def _complete_save(self) -> None:
        save = self._saves.popleft()
        self._host.commit(save.host.held)
        self._host.unlock(save.host)
        self._device.unlock(save.device)

    def _complete_write(self) -> None:
        assert self._disk is not None
        write = self._writes.popleft()
        self._disk.complete_write(write.job)
        self._host.unlock(write.host)


def _nothing() -> None:
    pass
