"""Frames come out of the ring as they went in, for each reader, and the producer never overtakes one."""

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixgen.model.frame_ring import RingReader, RingWriter

CAPACITY = 128


def wait(descriptors: Sequence[int]) -> None:
    assert select.select(descriptors, [], [], 10)[0], "no reader went on"


class Full(Exception):
    """Where the producer would have to wait."""


def refuse(_: Sequence[int]) -> None:
    raise Full


def ring(readers: int, capacity: int = CAPACITY) -> tuple[RingWriter, list[RingReader]]:
    writer = RingWriter(capacity)
    ends = [writer.add_reader() for _ in range(readers)]
    return writer, [RingReader(*map(os.dup, end)) for end in ends]


def close(writer: RingWriter, readers: list[RingReader]) -> None:
    writer.close()
    writer.close()
    for reader in readers:
        reader.close()


@pytest.fixture
def pair() -> Iterator[tuple[RingWriter, RingReader]]:
    writer, readers = ring(1)
    yield writer, readers[0]
    close(writer, readers)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, CAPACITY)), max_size=60))
def test_any_frames_at_any_pace(steps: list[tuple[int, int]]) -> None:
    """Each step sends a frame of some length and has one reader read; whoever is in the way reads too."""
    writer, readers = ring(2)
    due: list[deque[bytes]] = [deque(), deque()]

    def read(which: int) -> None:
        frame, expected = readers[which].read(), due[which].popleft()
        assert frame == (expected if len(expected) <= writer.largest else None)

    try:
        for count, (which, length) in enumerate(steps):
            frame = bytes([count]) * length
            while True:
                try:
                    assert writer.write(frame, refuse) == (length <= writer.largest)
                    break
                except Full:
                    read(max((0, 1), key=lambda one: len(due[one])))
            for one in due:
                one.append(frame)
            read(which)
        for which in 0, 1:
            while due[which]:
                read(which)
    finally:
        close(writer, readers)


def test_the_producer_is_ahead_by_a_ring_and_no_more(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    for count in range(4):
        writer.write(bytes([count]) * 24, refuse)  # 32 bytes each
    with pytest.raises(Full):
        writer.write(b"", refuse)
    assert reader.read() == bytes(24)
    writer.write(b"\4", refuse)
    assert [reader.read() for _ in range(4)] == [bytes([1]) * 24, bytes([2]) * 24, bytes([3]) * 24, b"\4"]


def test_both_sides_sleep_until_the_other_goes_on(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    sent = [bytes([count % 251]) * (count % 50) for count in range(2000)]
    found: list[bytearray | None] = []
    thread = threading.Thread(target=lambda: found.extend(reader.read() for _ in sent))
    thread.start()
    for frame in sent:
        writer.write(frame, wait)
    thread.join(10)
    assert found == sent


def test_a_signal_does_not_end_a_read(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))

    def disturb() -> None:
        for _ in range(3):
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGUSR1)
        writer.write(b"frame", wait)

    thread = threading.Thread(target=disturb)
    try:
        thread.start()
        assert reader.read() == b"frame" and received
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
