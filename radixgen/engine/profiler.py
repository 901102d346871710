"""`StepProfiler`: writes a torch profiler trace of an engine's steps."""

import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch.autograd import profiler as autograd_profiler

from radixgen.core import InvalidRequest, check_integer

logger = logging.getLogger(__name__)

MAX_PROFILE_STEPS = 1_000
"""Events are kept in memory until the trace is written."""


def check_profile(directory: str | Path, num_steps: int) -> Path:
    """Create the directory of a profile if it does not exist, and return its absolute path.

    Raises `InvalidRequest` if nothing can be written there, or unless `num_steps` is from 1 to `MAX_PROFILE_STEPS`.
    """
    check_integer("profile_steps", num_steps, 1, MAX_PROFILE_STEPS)
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, ValueError) as error:
        limit = f"must be a directory that can be written to: {error}"
        raise InvalidRequest("profile", str(directory), limit) from error


class StepProfiler:
    """Writes one torch profiler trace (Chrome's JSON format): the CPU operators of the thread that runs the steps, and
    the kernels of the process on GPUs.

    Errors are logged and end the profile; no method raises them. torch has one profiler in a process, so a profile
    fails while another is recorded.
    """

    def __init__(self, directory: str | Path, num_steps: int = 10) -> None:
        """Takes the arguments of `check_profile`, and raises its errors."""
        self.path: Path | None = None
        """The trace, once it is written"""
        self._directory = check_profile(directory, num_steps)
        self._num_steps = num_steps
        self._num_recorded = 0
        self._trace: torch.profiler.profile | None = None
        self._thread = 0
        self._ended = False

    def span(self) -> AbstractContextManager[object]:
        """Mark a step in the trace, if it is recorded."""
        if self._trace is None:
            return nullcontext()
        return torch.profiler.record_function(f"step {self._num_recorded + 1}")

    def after_step(self) -> None:
        """Count a step that had work. Recording begins after the first, and ends when `num_steps` more were counted.

        Call this and `close` in the thread that runs the steps.
        """
        if self._ended:
            return
        if self._trace is None:
            self._attempt(self._start)
            return
        self._num_recorded += 1
        if self._num_recorded == self._num_steps:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far. May be called twice."""
        if not self._ended:
            self._ended = True
            self._attempt(self._write)
            self._trace = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:
            logger.exception("the profile failed")
            self._ended = True

    def _start(self) -> None:
        if autograd_profiler._is_profiler_enabled:
            raise RuntimeError("another torch profiler is active in this process")
        self._thread = threading.get_ident()
        self._trace = torch.profiler.profile()
        self._trace.start()

    def _write(self) -> None:
        if self._trace is not None:
            if self._thread != threading.get_ident():
                raise RuntimeError("a profile must end in the thread in which it began")
            self._trace.stop()
        if self._trace is None or not self._num_recorded:
            logger.warning("the profile is empty: no step followed the first")
            return
        path = self._directory / f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json"
        self._trace.export_chrome_trace(str(path))
        _check_complete(path)
        self.path = path
        logger.info("wrote the profile of %d steps to %s", self._num_recorded, path)


def _check_complete(path: Path) -> None:
    """Raise `OSError` if a trace ends early. torch reports no error if the disk is full."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 16, 0))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{path} is incomplete")
