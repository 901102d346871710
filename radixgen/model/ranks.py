"""Processes of a sharded model. Rank 0 starts the others, and none outlives it.

Rank 0 is the engine's process. Each other rank runs `radixgen.model.follower` with a channel to rank 0, and exits when
the channel closes, whatever it is doing. Commands arrive through a ring in shared memory, so that rank 0 does not wait
for a busy rank.
"""

import json
import logging
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from radixgen.core.settings import rank_environment
from radixgen.model.frame_ring import RingWriter
from radixgen.model.lockstep import Channel, ChannelClosed, RankCommand, RankJob, pack
from radixgen.model.rank_all_reduce import RANK_ALL_REDUCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Time for a process to start and import, and for ranks to answer."""
LOAD_SECONDS = 1800.0
"""Maximum time that ranks wait for each other while loading."""
STEP_SECONDS = 120.0
"""Maximum time that ranks wait for each other within a step."""
_GIVE_UP_SECONDS = 10.0
"""Time for rank 0 to notice the end of a rank that it waits for."""
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 1.0
"""Interval of checks for late steps."""
_RING_BYTES = 1 << 24
"""Size of the ring. A frame of more than half of it goes over the sockets."""
_NOTICE_SECONDS = 2.0
"""Time for the end of a process to become visible."""

_leaving = threading.Lock()


class Followers:
    """All ranks but rank 0, as seen from rank 0."""

    def __init__(self, job: RankJob) -> None:
        """Start the processes. `stop` ends them and leaves the process group; so does the end of this object or
        process.
        """
        home = tempfile.mkdtemp(prefix="radixgen-")
        self.job = replace(job, store=str(Path(home) / "ranks"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._raised: dict[int, str] = {}
        self.ended = threading.Event()
        """Set once any of them has ended, before rank 0 leaves the process group and its device's results become
        invalid.
        """
        leavers: list[threading.Thread] = []
        self._ring = RingWriter(_RING_BYTES)
        self.stop = weakref.finalize(self, _stop, self.processes, self._channels, self._ring, leavers, home)
        try:
            for rank in range(1, job.size):
                self._start(rank)
            leave_too = job.device == "cuda"
            watcher = self._on_end(partial(_note_end, self.ended, leave_too))
            if leave_too:
                leavers.append(watcher)
        except BaseException:
            self.stop()
            raise

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self._channels.append(Channel(ours))
        descriptors = [theirs.fileno(), *self._ring.add_reader()]
        with theirs:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "radixgen.model.follower", *map(str, descriptors)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    env=rank_environment(rank),
                )
            )
        with suppress(ChannelClosed):  # `answers` will report its end
            self._channels[-1].send(replace(self.job, rank=rank).as_bytes())

    def send(self, frame: bytes) -> None:
        """Send a frame to all. Returns before it is read, unless it is very large or a rank is far behind.

        Raises `ChannelClosed`, and `TimeoutError` if a rank does not catch up.
        """
        if self.ended.is_set():
            raise ChannelClosed("a rank has ended")
        if not self._ring.write(frame, self._wait_for_room):
            for channel in self._channels:
                channel.send(frame)

    def _wait_for_room(self, descriptors: Sequence[int]) -> None:
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        for channel in self._channels:
            poll.register(channel.socket, getattr(select, "POLLRDHUP", 0))
        ready = [descriptor for descriptor, _ in poll.poll(1e3 * STEP_SECONDS)]
        if not ready:
            raise TimeoutError(f"a rank has read nothing for {STEP_SECONDS:g} s")
        if not set(ready) & set(descriptors):
            raise ChannelClosed("a rank has ended")

    def answers(self, seconds: float) -> list[dict[str, Any]]:
        """Return the next answer of each, in the order of ranks.

        Raises `TimeoutError`, and `ChannelClosed` as soon as any of them fails.
        """
        end = time.monotonic() + seconds
        received: dict[int, dict[str, Any]] = {}
        while len(received) < len(self._channels):
            waiting = {channel.socket: rank for rank, channel in enumerate(self._channels, 1) if rank not in received}
            ready, _, _ = select.select(list(waiting), [], [], max(end - time.monotonic(), 0.0))
            if not ready:
                raise TimeoutError(f"no answer within {seconds:g} s of rank {min(waiting.values())}")
            for rank in (waiting[readable] for readable in ready):
                received[rank] = _read(self._channels[rank - 1], seconds)
                if "raised" in received[rank]:
                    self._raised[rank] = f"raised {received[rank]['raised']}"
                    raise ChannelClosed(f"rank {rank} {self._raised[rank]}")
        return [received[rank] for rank in sorted(received)]

    def agree(self, fine: bool) -> bool:
        """Return whether all ranks succeeded, rank 0 included. Raises `ChannelClosed` and `TimeoutError`."""
        answers = self.answers(START_SECONDS)
        verdict = fine and all(answer["fine"] for answer in answers)
        self.send(pack(RankCommand.AGREED, [np.array([int(verdict)])]))
        return verdict

    def run_watched(self, call: Callable[[], T]) -> T:
        """Run `call`, which may wait for other ranks, in a thread, and return or raise its result.

        Raises `ChannelClosed`, abandoning the thread, if a rank ends and `call` does not return soon after.
        """
        over = threading.Event()
        work = in_thread(call, "radixgen-rank-0")
        work.add_done_callback(lambda _: over.set())
        self._on_end(over.set)
        over.wait()
        wait([work], _GIVE_UP_SECONDS)
        if not work.done():
            wait([in_thread(leave, "radixgen-leave")], _STOP_SECONDS)
            raise ChannelClosed("a rank ended while the others waited for it")
        return work.result()

    def describe_exits(self) -> str:
        """Describe which ranks have ended and how; empty if all live. Waits briefly for an exit to become visible."""
        select.select([channel.socket for channel in self._channels], [], [], _NOTICE_SECONDS)
        pairs = enumerate(zip(self._channels, self.processes, strict=True), 1)
        ends = {rank: self._raised.get(rank) or _end_of(*pair) for rank, pair in pairs}
        return "; ".join(f"rank {rank} {end}" for rank, end in ends.items() if end)

    def _on_end(self, call: Callable[[], None]) -> threading.Thread:
        """Start a thread that calls `call` when any of them ends. `call` must not refer to this object."""
        watched = [channel.socket.fileno() for channel in self._channels]
        thread = threading.Thread(target=await_hangup, args=(watched, call), name="radixgen-ranks", daemon=True)
        thread.start()
        return thread


def _note_end(ended: threading.Event, leave_too: bool) -> None:
    ended.set()
    if leave_too:
        leave()


def await_hangup(sockets: Sequence[int], call: Callable[[], None]) -> None:
    """Block until the other end of one of `sockets` is closed for writing, then run `call`."""
    poll = select.poll()
    for descriptor in sockets:
        poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    poll.poll()
    call()


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Run `call` in a daemon thread and return a future of its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def join(job: RankJob) -> None:
    """Join the process group: gloo on the CPU, else NCCL with one GPU per rank."""
    torch.set_num_threads(job.threads)
    cuda = torch.device("cuda", job.rank) if job.device == "cuda" else None
    if cuda:
        torch.cuda.set_device(cuda)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(job.store, job.size),  # type: ignore[attr-defined]
        rank=job.rank,
        world_size=job.size,
        timeout=timedelta(seconds=LOAD_SECONDS),
        device_id=cuda,
    )
    if cuda:
        RANK_ALL_REDUCE.connect(cuda)


def bound_steps(model: "PreTrainedModel") -> None:
    """Set the timeout of the ranks' collectives to `STEP_SECONDS`.

    On GPUs it is twice as long, because PyTorch then ends the process; `watch_steps` gives up earlier.
    """
    longest = timedelta(seconds=STEP_SECONDS * (2 if dist.get_backend() == "nccl" else 1))
    for group in (dist.group.WORLD, *model._device_mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(longest, group)


class StepDeadline:
    """When the last step was launched on the device, and whether it is late."""

    def __init__(self) -> None:
        self._last: tuple[float, torch.cuda.Event] | None = None

    def begin(self) -> None:
        """Record that a step was launched on this thread's current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._last = time.monotonic(), event

    @property
    def is_late(self) -> bool:
        """Whether the step has been running for more than `STEP_SECONDS`."""
        if self._last is None or time.monotonic() - self._last[0] < STEP_SECONDS:
            return False
        return not self._last[1].query()  # type: ignore[no-untyped-call]


def watch_steps(last: StepDeadline, ended: threading.Event) -> None:
    """Set `ended` and leave the process group if a step is late. Returns when `ended` is set.

    Collectives in CUDA graphs have no timeout of their own.
    """
    while not ended.wait(_LOOK_SECONDS):
        if last.is_late:
            ended.set()
            leave()


def leave() -> None:
    """Leave the process group. On GPUs, pending collectives are aborted. May be called twice."""
    RANK_ALL_REDUCE.stop_waiting()
    with _leaving:
        if not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _stop(
    processes: Sequence["subprocess.Popen[bytes]"],
    channels: Sequence[Channel],
    ring: RingWriter,
    leavers: Sequence[threading.Thread],
    home: str,
) -> None:
    """End the ranks. `leavers`: threads that leave the process group when a rank ends.

    NCCL may hang in that, and threads cannot be started while the process exits.
    """
    for channel in channels:
        with suppress(OSError):
            channel.socket.shutdown(socket.SHUT_WR)
    end = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
    for leaver in leavers:
        leaver.join(_STOP_SECONDS)
        if leaver.is_alive():
            logger.critical("NCCL did not end within %g s: this process can't shard a model again", _STOP_SECONDS)
    if not leavers:
        leave()
    for channel in channels:
        channel.close()
    ring.close()
    shutil.rmtree(home, ignore_errors=True)


def _read(channel: Channel, seconds: float) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(channel.receive(seconds))
    return facts


def _end_of(channel: Channel, process: "subprocess.Popen[bytes]") -> str:
    """Describe how a rank ended; empty if it lives."""
    try:
        while (raised := _read(channel, 0.01).get("raised")) is None:
            pass
        return f"raised {raised}"
    except TimeoutError:
        return ""
    except ChannelClosed:
        with suppress(subprocess.TimeoutExpired):
            return describe_exit(process.wait(_NOTICE_SECONDS))
        return "hung up"


def describe_exit(code: int) -> str:
    """Describe the exit code of a process."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
