"""Allocator of KV slots in extents. Works on integers only; `storage` has the tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedList

from radixgen.core import OutOfSlots


class Extent(NamedTuple):
    """The consecutive slots `[start, start + length)`."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class ExtentPool:
    """Allocates slots `0 … capacity - 1` as extents: best fit, coalescing, fenced frees.

    Every slot is free, fenced or used: `free + fenced + used == capacity`. A slot released while steps are in flight is
    fenced until the last step begun before the release has retired. Each operation costs O(log n) in the number of free
    extents.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be at least 1 slot")
        self.capacity = capacity
        self.free = 0
        self.fenced = 0
        self._length_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._by_length: SortedList[tuple[int, int]] = SortedList()
        self._fenced: list[tuple[int, Extent]] = []
        self.num_steps = 0
        """Steps begun so far; also the number of the last of them."""
        self._retired = 0
        self._add(0, capacity)

    @property
    def used(self) -> int:
        return self.capacity - self.free - self.fenced

    def allocate(self, count: int) -> list[Extent]:
        """Allocate `count` slots: one extent if one fits (the smallest such), else as few extents as possible.

        Raises `OutOfSlots`, and allocates nothing, if fewer than `count` slots are free.
        """
        if count > self.free:
            raise OutOfSlots(f"count={count}: only {self.free} of {self.capacity} slots are free")
        if count == self.free:
            return self._take_all()
        taken = []
        while count > 0:
            length, start = self._by_length[-1]
            if length > count:
                length, start = self._by_length[self._by_length.bisect_left((count, -1))]
            self._remove(start)
            if length > count:
                self._add(start + count, length - count)
                length = count
            taken.append(Extent(start, length))
            count -= length
        return taken

    def allocate_each(self, counts: Sequence[int]) -> list[list[Extent]]:
        """Allocate for several owners at once, side by side if one extent holds them all. Raises as `allocate`."""
        if not counts:
            return []
        extents = self.allocate(sum(counts))[::-1]
        taken: list[list[Extent]] = []
        for count in counts:
            own: list[Extent] = []
            while count:
                start, length = extents.pop()
                if length > count:
                    extents.append(Extent(start + count, length - count))
                    length = count
                own.append(Extent(start, length))
                count -= length
            taken.append(own)
        return taken

    def grow(self, end: int, count: int) -> int:
        """Allocate up to `count` free slots directly from `end` on, so that the extent before them grows in place.

        Returns the number of slots allocated, possibly 0.
        """
        length = self._length_at.get(end, 0)
        used = min(length, count)
        if used:
            self._remove(end)
            if used < length:
                self._add(end + used, length - used)
        return used

    def release(self, extent: Extent) -> None:
        """Release an extent. Its slots become free once the steps in flight have retired."""
        if extent.length == 0:
            return
        if self.num_steps > self._retired:
            self._fenced.append((self.num_steps, extent))
            self.fenced += extent.length
        else:
            self._coalesce(extent)

    def begin_step(self) -> int:
        """Begin a step: slots released from now on stay fenced until it retires. Returns the number of the step."""
        self.num_steps += 1
        return self.num_steps

    def retire_step(self, step: int) -> None:
        """Retire `step` and all earlier ones, and free the slots that were fenced for them."""
        self._retired = max(self._retired, step)
        waiting = []
        for fence, extent in self._fenced:
            if fence <= self._retired:
                self.fenced -= extent.length
                self._coalesce(extent)
            else:
                waiting.append((fence, extent))
        self._fenced = waiting

    def free_extents(self) -> list[Extent]:
        return sorted(Extent(start, length) for start, length in self._length_at.items())

    def fenced_extents(self) -> list[Extent]:
        return sorted(extent for _, extent in self._fenced)

    def check(self) -> None:
        """Assert that the free list is sorted, disjoint, coalesced and complete."""
        extents = self.free_extents()
        assert sum(e.length for e in extents) == self.free
        assert sum(e.length for e in self.fenced_extents()) == self.fenced
        assert all(a.end < b.start for a, b in zip(extents, extents[1:], strict=False)), extents
        assert list(self._by_length) == sorted((e.length, e.start) for e in extents)
        assert self._start_before == {e.end: e.start for e in extents}
        assert all(e.length > 0 and e.start >= 0 and e.end <= self.capacity for e in extents)

    def _take_all(self) -> list[Extent]:
        """Allocate every free extent, longest first: the usual case in a full pool, after an exact eviction."""
        taken = [Extent(start, length) for length, start in reversed(self._by_length)]
        self._length_at.clear()
        self._start_before.clear()
        self._by_length.clear()
        self.free = 0
        return taken

    def _coalesce(self, extent: Extent) -> None:
        start, length = extent
        following = self._length_at.get(start + length)
        if following is not None:
            self._remove(start + length)
            length += following
        before = self._start_before.get(start)
        if before is not None:
            length += start - before
            start = before
            self._remove(before)
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        assert start not in self._length_at, f"slot {start} was freed twice"
        self._length_at[start] = length
        self._start_before[start + length] = start
        self._by_length.add((length, start))
        self.free += length

    def _remove(self, start: int) -> None:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        self._by_length.remove((length, start))
        self.free -= length


def extent_slots(extents: list[Extent]) -> NDArray[np.int64]:
    """Return the slots of `extents`, int64 `[slots]`."""
    return np.concatenate([np.arange(extent.start, extent.end) for extent in extents])


def split_extents(extents: list[Extent], count: int) -> tuple[list[Extent], list[Extent]]:
    """Split `extents` after their first `count` slots."""
    if count == 0:
        return [], extents
    for index, (start, length) in enumerate(extents):
        if count < length:
            head, tail = extents[: index + 1], extents[index:]
            head[-1], tail[0] = Extent(start, count), Extent(start + count, length - count)
            return head, tail
        if count == length:
            return extents[: index + 1], extents[index + 1 :]
        count -= length
    return extents, []
