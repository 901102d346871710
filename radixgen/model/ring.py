"""A ring of frames in shared memory, from rank 0 to each other rank: one producer, a reader a rank, bounded.

The memory holds frames and nothing else. What is in it is counted by two eventfds a reader, on which either side can
sleep and which order what processors see: `frames`, one for each that the reader has not taken, and `bytes`, what it
has given back since the producer last looked. The producer waits only where a reader is a whole ring behind.
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
"""In the place of a length: the frame is too large, and comes another way."""
_WRAP = -2
"""In the place of a length: the next one is at the start."""


@dataclass(slots=True)
class ReaderState:
    """What the producer knows of one reader."""

    frames: int
    """Descriptor of an eventfd that counts down by one a read"""
    taken: int
    """Descriptor of an eventfd that is emptied by a read"""
    behind: int = 0
    """Bytes of the ring that are its to read"""


@dataclass(slots=True)
class RingWriter:
    """The producer's end. Not for several threads."""

    capacity: int
    """Bytes, a multiple of 8"""
    memory: int = field(init=False)
    """Descriptor of the memory, for a reader's process to inherit"""
    _map: mmap.mmap = field(init=False)
    _readers: list[ReaderState] = field(init=False, default_factory=list)
    _at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.memory = os.memfd_create("radixgen-plans")
        os.ftruncate(self.memory, self.capacity)
        self._map = mmap.mmap(self.memory, self.capacity)

    @property
    def largest(self) -> int:
        """Bytes of a frame that `write` takes: half the ring, so that one fits wherever the last one ended."""
        return self.capacity // 2 - _LENGTH.size

    def add_reader(self) -> tuple[int, int, int]:
        """Descriptors for `RingReader`, which a reader's process inherits. Not after a frame was written."""
        kept_here = os.EFD_CLOEXEC
        reading = ReaderState(os.eventfd(0, kept_here | os.EFD_SEMAPHORE), os.eventfd(0, kept_here | os.EFD_NONBLOCK))
        self._readers.append(reading)
        return self.memory, reading.frames, reading.taken

    def write(self, frame: bytes, wait: Callable[[Sequence[int]], None]) -> bool:
        """Send a frame to all. False where it is larger than `largest`: then each reader is told to look elsewhere.

        `wait` blocks until one of some descriptors can be read, or raises where that can't be hoped for.
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
        """Give back memory and descriptors. May be called twice."""
        with suppress(ValueError):
            self._map.close()
        open_ones = [self.memory, *(one for reader in self._readers for one in (reader.frames, reader.taken))]
        self._readers, self.memory = [], -1
        for one in open_ones:
            with suppress(OSError):
                os.close(one)

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
        """The descriptors that `add_reader` gave."""
        self._map = mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ)
        os.close(memory)
        self._frames, self._taken, self._at = frames, taken, 0

    def read(self) -> bytearray | None:
        """The next frame; None where it comes another way. Blocks."""
        os.eventfd_read(self._frames)
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
