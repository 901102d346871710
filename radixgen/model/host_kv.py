"""KV in host memory, one record per token, and copies between it and the pool of a device.

With a GPU, host memory is pinned, and each direction has a stream and a staging buffer of its own. A kernel packs the
KV of all layers into the buffer, which is then copied in few large pieces; loading does the same in reverse.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache import Copy
from radixgen.cache.storage import KVStorage
from radixgen.core.plan import consecutive_ranges
from radixgen.kernels.kv_records import KVRecords
from radixgen.kernels.upload import upload

_STAGING_BYTES = 32 << 20

Slots = NDArray[np.int64]


class HostKV:
    """The KV of `slots` tokens in host memory, with copies from and to `storage`."""

    def __init__(self, storage: KVStorage, slots: int, device: torch.device) -> None:
        """Raises `OSError` or `RuntimeError` if there is no memory for it."""
        pools = [pool for pair in zip(storage.keys, storage.values, strict=True) for pool in pair]
        self.num_slots = slots
        self._bounds = storage.bounds
        self._records = KVRecords(pools)
        self._records.warm_up()  # so that the first save does not compile within a step
        self.record_bytes = self._records.size
        self._host = _host_memory(slots, self._records.size, pinned=device.type == "cuda")
        self._save = _Direction(self._records.size, device)
        self._load = _Direction(self._records.size, device)

    def save(self, slots: Slots, host_slots: Slots) -> Copy:
        """As `KVCopies.save`."""
        with self._save.begin() as copy:
            for part, records, indices in self._save.chunks(slots):
                self._records.pack(indices, records)
                for first, start, length in _extents(host_slots[part]):
                    self._host[start : start + length].copy_(records[first : first + length], non_blocking=True)
        return copy

    def load(self, host_slots: Slots, slots: Slots) -> Copy:
        """As `KVCopies.load`."""
        self._bounds.forget(slots)
        with self._load.begin() as copy:
            for part, records, indices in self._load.chunks(slots):
                for first, start, length in _extents(host_slots[part]):
                    records[first : first + length].copy_(self._host[start : start + length], non_blocking=True)
                self._records.unpack(records, indices)
        return copy

    def read_records(self, host_slots: Slots) -> NDArray[np.uint8]:
        """As `HostRecords.read_records`."""
        records = np.empty((host_slots.size, self.record_bytes), np.uint8)
        memory = self._host.numpy()
        for first, start, length in _extents(host_slots):
            records[first : first + length] = memory[start : start + length]
        return records

    def write_records(self, host_slots: Slots, records: NDArray[np.uint8]) -> None:
        """As `HostRecords.write_records`."""
        memory = self._host.numpy()
        for first, start, length in _extents(host_slots):
            memory[start : start + length] = records[first : first + length]

    def join(self, copy: Copy) -> None:
        """Have later work of the current stream wait for a copy."""
        if isinstance(copy, _StreamCopy):
            torch.cuda.current_stream().wait_event(copy.end)

    def release(self) -> None:
        """Wait for copies in flight and free the memory."""
        if self._host.is_pinned():
            torch.cuda.synchronize()
            _check_cuda(_cudart().cudaHostUnregister(self._host.data_ptr()))
        self._host = self._host.new_empty(0)


class _Direction:
    """Copies in one direction: asynchronous in a stream of their own on a GPU, otherwise synchronous."""

    def __init__(self, record: int, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        tokens = max(_STAGING_BYTES // record, 1)
        self._staging = torch.empty((tokens, record), dtype=torch.uint8, device=device)

    @contextmanager
    def begin(self) -> Iterator[Copy]:
        """Enter the stream, after all work of the current stream. Yields the copy that the block begins."""
        if self._stream is None:
            finished = _FinishedCopy()
            yield finished
            finished.seconds = perf_counter() - finished.began
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy = _StreamCopy()
            yield copy
            copy.end.record()

    def chunks(self, slots: Slots) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each part of `slots` that fits the staging buffer, with that much of the buffer and the slots on the
        device.
        """
        size = self._staging.shape[0]
        for first in range(0, slots.size, size):
            part = slice(first, min(first + size, slots.size))
            yield part, self._staging[: part.stop - first], upload(slots[part], self._device)


class _FinishedCopy:
    """A copy that has finished when it is returned."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.seconds = 0.0

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class _StreamCopy:
    """A copy in a stream of a GPU."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._begin.record()

    @property
    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self.end)) / 1e3

    def done(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.end.synchronize()


def _host_memory(tokens: int, record: int, *, pinned: bool) -> Tensor:
    """Return uint8 `[tokens, record]`. PyTorch would round the size of pinned memory up to a power of two."""
    memory = torch.frombuffer(mmap.mmap(-1, tokens * record), dtype=torch.uint8).view(tokens, record)
    if pinned:
        _check_cuda(_cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    return memory


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_cuda(status: int) -> None:
    if int(status):
        raise RuntimeError(f"CUDA could not pin or unpin host memory: error {int(status)}")


def _extents(slots: Slots) -> Iterator[tuple[int, int, int]]:
    """Yield extents: the index of the first of `slots`, the first slot, and the number."""
    for first, stop in consecutive_ranges(slots).tolist():
        yield first, int(slots[first]), stop - first
