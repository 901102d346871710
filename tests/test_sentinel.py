"""Front ends of the wire hear of an end that the worker could not tell."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_front import FakeFront
from serving import greedy

SCRIPT = str(Path(__file__).parent / "stamp_worker.py")


@contextmanager
def worker(front: FakeFront) -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen([sys.executable, SCRIPT, front.address, "0"]) as child:
        try:
            front.accept()
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_an_end_that_comes_at_once_is_told(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM is sent again until it is the second."""
    front = FakeFront(tmp_path / "front")
    try:
        with worker(front) as child:
            front.add("open", [1], max_tokens=3_000)
            front.until(lambda: len(front.tokens.get("open", ())) > 5)
            front.until(lambda: bool(child.send_signal(number)) or front.dead)
            assert child.wait(30) != 0
            assert len(front.tokens["open"]) < 3_000 and not front.ends
        front.dead = False
        with worker(front):  # it may come back, and what it says is not mistaken for the first one's
            front.add("again", [2])
            front.ended("again")
            assert front.tokens["again"] == greedy([2]) and not front.dead
    finally:
        front.close()


def test_an_end_that_was_told_is_told_once(tmp_path: Path) -> None:
    front = FakeFront(tmp_path / "front")
    try:
        with worker(front) as child:
            child.terminate()
            front.until(lambda: front.dead)
            assert child.wait(30) == 0
        front.dead = False
        front.pump(500)
        assert not front.dead
    finally:
        front.close()
