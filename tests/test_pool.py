"""The pool of slots: best fit, growth in place, coalescing, and fences that hold."""

import pytest

from radixgen.cache import ExtentPool
from radixgen.cache.pool import Extent
from radixgen.core import OutOfSlots


def test_the_tightest_extent_is_taken() -> None:
    pool = ExtentPool(30)
    whole = pool.allocate(30)[0]
    for start, length in ((0, 9), (10, 4), (20, 6)):
        pool.release(Extent(start, length))
    assert whole.length == 30
    assert pool.allocate(5) == [Extent(20, 5)]
    assert pool.allocate(4) == [Extent(10, 4)]
    assert pool.allocate(10) == [Extent(0, 9), Extent(25, 1)]
    with pytest.raises(OutOfSlots, match="count=1: only 0 of 30"):
        pool.allocate(1)
    pool.check()


def test_neighbours_coalesce_on_both_sides() -> None:
    pool = ExtentPool(12)
    pool.allocate(12)
    for start in (0, 8, 4):
        pool.release(Extent(start, 4))
    assert pool.free_extents() == [Extent(0, 12)]


def test_growth_takes_what_is_free_there() -> None:
    pool = ExtentPool(12)
    pool.allocate(4)
    assert pool.grow(4, 3) == 3 and pool.grow(7, 99) == 5 and pool.grow(12, 1) == 0
    assert pool.free == 0 and pool.used == 12


def test_a_slot_freed_in_flight_waits_for_the_last_step_that_could_touch_it() -> None:
    pool = ExtentPool(8)
    pool.allocate(8)
    first = pool.begin_step()
    pool.release(Extent(0, 2))
    second = pool.begin_step()
    pool.release(Extent(2, 3))
    assert (pool.free, pool.fenced, pool.used) == (0, 5, 3)
    with pytest.raises(OutOfSlots):
        pool.allocate(1)
    pool.retire_step(first)
    assert (pool.free, pool.fenced) == (2, 3) and pool.fenced_extents() == [Extent(2, 3)]
    pool.retire_step(second)
    assert (pool.free, pool.fenced) == (5, 0)
    pool.release(Extent(5, 3))
    assert pool.free_extents() == [Extent(0, 8)]


def test_a_later_step_that_retires_lowers_the_earlier_fence_too() -> None:
    pool = ExtentPool(4)
    pool.allocate(4)
    pool.begin_step()
    pool.release(Extent(0, 1))
    last = pool.begin_step()
    pool.retire_step(last)
    assert (pool.free, pool.fenced) == (1, 0)


def test_a_double_free_is_seen() -> None:
    pool = ExtentPool(4)
    pool.allocate(4)
    pool.release(Extent(1, 2))
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(Extent(1, 2))
