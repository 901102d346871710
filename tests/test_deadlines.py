"""`Deadlines`: requests come out in time, and finished ones take no room."""

import math

import numpy as np

from radixgen import SamplingParams
from radixgen.engine.deadlines import Deadlines
from radixgen.scheduler.sequence import Request


def request(serial: int, deadline: float) -> Request:
    made = Request(f"r{serial}", serial, np.zeros(1, np.int32), SamplingParams(), max_output=1, deadline=deadline)
    made.unfinished = 1
    return made


def test_those_that_have_expired_come_earliest_first_and_once() -> None:
    deadlines = Deadlines()
    for serial, deadline in enumerate([5.0, 1.0, math.inf, 3.0, 1.0]):
        deadlines.add(request(serial, deadline))
    assert [taken.serial for taken in deadlines.take_expired(0.5)] == []
    assert [taken.serial for taken in deadlines.take_expired(3.0)] == [1, 4, 3]
    assert [taken.serial for taken in deadlines.take_expired(9.0)] == [0]
    assert not deadlines._heap


def test_finished_requests_are_removed() -> None:
    deadlines, live = Deadlines(), [request(serial, 1e9 - serial) for serial in range(50)]
    for one in live:
        deadlines.add(one)
    for serial in range(50, 5_000):
        done = request(serial, float(serial))
        deadlines.add(done)
        done.unfinished = 0
    assert len(deadlines._heap) <= 2 * len(live) + 66
    unfinished = [taken.serial for taken in deadlines.take_expired(1e9) if not taken.finished]
    assert unfinished == list(range(49, -1, -1))
