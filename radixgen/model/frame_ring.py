"""Ring buffer of frames in shared memory, from rank 0 to the other ranks: one producer, one reader per rank, bounded.

The memory holds nothing but frames. Each reader has two eventfds, on which either side can sleep and which order memory
accesses between processors: `frames` counts those that the reader has not taken, and `taken` the bytes that it has
released since the producer last looked. The producer waits only if a reader is a whole ring behind.
"""

import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

_LENGTH = struct.Struct("<q")
_ALIGNMENT = 8
_ELSEWHERE = -1
"""Length value of a frame that is too large and is sent another way."""
_WRAP = -2
"""Length value that marks a jump to the start of the ring."""


@dataclass(slots=True)
class ReaderState:
    """The producer's state of one reader."""

    frames: int
    """Descriptor of an eventfd that each read decrements by one."""
    taken: int
    """Descriptor of an eventfd that each read resets to 0."""
    behind: int = 0
    """Bytes that the reader has not released."""


@dataclass(slots=True)
class RingWriter:
    """The producer's end. Not thread-safe."""

    capacity: int
    """Bytes, a multiple of 8."""
    memory: int = field(init=False)
    """Descriptor of the memory, inherited by the readers' processes."""
    _map: mmap.mmap = field(init=False)
    _readers: list[ReaderState] = field(init=False, default_factory=list)
    _at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.memory = os.memfd_create("radixgen-plans")
        os.ftruncate(self.memory, self.capacity)
        self._map = mmap.mmap(self.memory, self.capacity)

    @property
    def largest(self) -> int:
        """Maximum bytes of a frame: half of the ring, so that a frame fits wherever the last one ended."""
        return self.capacity // 2 - _LENGTH.size

    def add_reader(self) -> tuple[int, int, int]:
        """Return descriptors for a `RingReader` in a child process. Must be called before the first `write`."""
        kept_here = os.EFD_CLOEXEC
        reading = ReaderState(os.eventfd(0, kept_here | os.EFD_SEMAPHORE), os.eventfd(0, kept_here | os.EFD_NONBLOCK))
        self._readers.append(reading)
        return self.memory, reading.frames, reading.taken

    def write(self, frame: bytes, wait: Callable[[Sequence[int]], None]) -> bool:
        """Send a frame to all readers. Returns False if it exceeds `largest`; readers then expect it another way.

        `wait` blocks until one of some descriptors is readable, or raises if that cannot be expected.
        """
        fits = len(frame) <= self.largest
        body = frame if fits else b""
        size = _LENGTH.size + -(-len(body) // _ALIGNMENT) * _ALIGNMENT
        skipped = self.capacity - self._at if self._at + size > self.capacity else 0
        self._make_room(skipped + size, wait)
        if skipped:
            _LENGTH.pack_into(self._map, self._at, _WRAP)
            self._at = 0
        _LENGTH.pack_into(self._map, self._at, len(frame) if fits else _ELSEWHERE)
        start = self._at + _LENGTH.size
        self._map[start : start + len(body)] = body
        self._at = (self._at + size) % self.capacity
        for reader in self._readers:
            reader.behind += skipped + size
            os.eventfd_write(reader.frames, 1)
        return fits

    def close(self) -> None:
        """Release memory and descriptors. May be called twice."""
        with suppress(ValueError):
            self._map.close()
        descriptors = [self.memory, *(fd for reader in self._readers for fd in (reader.frames, reader.taken))]
        self._readers, self.memory = [], -1
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)

    def _make_room(self, size: int, wait: Callable[[Sequence[int]], None]) -> None:
        while late := [reader for reader in self._readers if reader.behind + size > self.capacity]:
            for reader in late:
                with suppress(BlockingIOError):
                    reader.behind -= os.eventfd_read(reader.taken)
            still = [reader.taken for reader in late if reader.behind + size > self.capacity]
            if still:
                wait(still)


class RingReader:
    """A reader's end, in its own process."""

    def __init__(self, memory: int, frames: int, taken: int) -> None:
        """Takes the descriptors returned by `add_reader`."""
        self._map = mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ)
        os.close(memory)
        self._frames, self._taken, self._at = frames, taken, 0

    def read(self) -> bytearray | None:
        """Return the next frame, or None if it is sent another way. Blocks."""
        os.read(self._frames, 8)  # goes on after a signal, unlike `eventfd_read`
        begun = self._at
        (length,) = _LENGTH.unpack_from(self._map, self._at)
        skipped = 0
        if length == _WRAP:
            skipped, begun = len(self._map) - begun, 0
            (length,) = _LENGTH.unpack_from(self._map, begun)
        start = begun + _LENGTH.size
        size = _LENGTH.size + -(-max(length, 0) // _ALIGNMENT) * _ALIGNMENT
        frame = None if length == _ELSEWHERE else bytearray(memoryview(self._map)[start : start + length])
        self._at = (begun + size) % len(self._map)
        os.eventfd_write(self._taken, skipped + size)
        return frame

    def close(self) -> None:
        self._map.close()
        os.close(self._frames)
        os.close(self._taken)
