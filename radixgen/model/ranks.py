"""The processes of a sharded model: rank 0 starts the others, and none outlives it.

Rank 0 is the process of the engine. Each other rank runs `radixgen.model.follower` over one channel to rank 0, and ends
when that channel does, whatever it is doing then. What rank 0 asks of it comes over a ring in shared memory, so that
rank 0 does not wait for a rank that is busy.
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
from radixgen.model.lockstep import Channel, ChannelClosed, RankCommand, RankJob, pack
from radixgen.model.peers import PEERS
from radixgen.model.ring import RingWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

logger = logging.getLogger(__name__)

START_SECONDS = 300.0
"""For a process to start and import what it needs, and for ranks to answer."""
LOAD_SECONDS = 1800.0
"""For ranks to wait for each other while they load."""
STEP_SECONDS = 120.0
"""For ranks to wait for each other within a step."""
_GIVE_UP_SECONDS = 10.0
"""For rank 0, when another rank has ended, to notice it where it waits for that rank."""
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 1.0
"""Between two looks at the clock of a step."""
_RING_BYTES = 1 << 24
"""Of the frames that rank 0 may be ahead; one of half as many bytes goes over the sockets."""
_NOTICE_SECONDS = 2.0
"""For a death to show."""

_leaving = threading.Lock()


class Followers:
    """All ranks but rank 0, seen from there."""

    def __init__(self, job: RankJob) -> None:
        """Start them. `stop` ends them and leaves the process group; so does the end of this object or process."""
        home = tempfile.mkdtemp(prefix="radixgen-")
        self.job = replace(job, store=str(Path(home) / "ranks"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._raised: dict[int, str] = {}
        self.ended = threading.Event()
        """One of them has; set before rank 0 leaves the others, which makes nonsense of what its device still does."""
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
        with suppress(ChannelClosed):  # `answers` finds that it has ended
            self._channels[-1].send(replace(self.job, rank=rank).as_bytes())

    def send(self, frame: bytes) -> None:
        """To each. Returns before it is read, unless it is very large or a rank is far behind. Raises `ChannelClosed`, and
        `TimeoutError` where a rank stays behind.
        """
        if self.ended.is_set():
            raise ChannelClosed("a rank has ended")
        if not self._ring.write(frame, self._wait_for_room):
            for channel in self._channels:
                channel.send(frame)

    def _wait_for_room(self, descriptors: Sequence[int]) -> None:
        poll = select.poll()
        for one in descriptors:
            poll.register(one, select.POLLIN)
        for channel in self._channels:
            poll.register(channel.socket, getattr(select, "POLLRDHUP", 0))
        ready = [one for one, _ in poll.poll(1e3 * STEP_SECONDS)]
        if not ready:
            raise TimeoutError(f"a rank has read nothing for {STEP_SECONDS:g} s")
        if not set(ready) & set(descriptors):
            raise ChannelClosed("a rank has ended")

    def answers(self, seconds: float) -> list[dict[str, Any]]:
        """What each has to say next, in the order of the ranks. Raises `TimeoutError`, and `ChannelClosed` as soon as one of
        them has failed.
        """
        end = time.monotonic() + seconds
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._channels):
            waiting = {one.socket: rank for rank, one in enumerate(self._channels, 1) if rank not in found}
            ready, _, _ = select.select(list(waiting), [], [], max(end - time.monotonic(), 0.0))
            if not ready:
                raise TimeoutError(f"no answer within {seconds:g} s of rank {min(waiting.values())}")
            for rank in (waiting[one] for one in ready):
                found[rank] = _read(self._channels[rank - 1], seconds)
                if "raised" in found[rank]:
                    self._raised[rank] = f"raised {found[rank]['raised']}"
                    raise ChannelClosed(f"rank {rank} {self._raised[rank]}")
        return [found[rank] for rank in sorted(found)]

    def agree(self, fine: bool) -> bool:
        """Whether all ranks are fine, rank 0 among them. Raises `ChannelClosed` and `TimeoutError`."""
        answers = self.answers(START_SECONDS)
        verdict = fine and all(answer["fine"] for answer in answers)
        self.send(pack(RankCommand.AGREED, [np.array([int(verdict)])]))
        return verdict

    def run_watched(self, call: Callable[[], T]) -> T:
        """Run `call`, which may wait for other ranks, in a thread, and return or raise what it does. Raises `ChannelClosed`,
        and abandons that thread, where a rank has ended and `call` does not end soon after.
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
        """Which of them have ended, and how; empty where all live. Waits a moment for a death to show."""
        select.select([channel.socket for channel in self._channels], [], [], _NOTICE_SECONDS)
        pairs = enumerate(zip(self._channels, self.processes, strict=True), 1)
        ends = {rank: self._raised.get(rank) or _end_of(*pair) for rank, pair in pairs}
        return "; ".join(f"rank {rank} {end}" for rank, end in ends.items() if end)

    def _on_end(self, call: Callable[[], None]) -> threading.Thread:
        """A thread that will `call`, which must not hold this object, when one of them has ended."""
        watched = [channel.socket.fileno() for channel in self._channels]
        thread = threading.Thread(target=await_hangup, args=(watched, call), name="radixgen-ranks", daemon=True)
        thread.start()
        return thread


def _note_end(ended: threading.Event, leave_too: bool) -> None:
    ended.set()
    if leave_too:
        leave()


def await_hangup(sockets: Sequence[int], call: Callable[[], None]) -> None:
    """Block until the other end of one of `sockets` is closed for writing, then `call`."""
    poll = select.poll()
    for one in sockets:
        poll.register(one, getattr(select, "POLLRDHUP", 0))
    poll.poll()
    call()


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """What `call` returns or raises, in a thread that the process does not wait for when it ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def join(job: RankJob) -> None:
    """Become a rank of the process group: gloo on the CPU, else NCCL with a GPU of its own."""
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
        PEERS.connect(cuda)


def bound_steps(model: "PreTrainedModel") -> None:
    """From now on the ranks of `model` wait for each other for `STEP_SECONDS` at the most.

    On GPUs for twice as long, after which PyTorch ends the process: `watch_steps` gives up before.
    """
    longest = timedelta(seconds=STEP_SECONDS * (2 if dist.get_backend() == "nccl" else 1))
    for group in (dist.group.WORLD, *model._device_mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(longest, group)


class StepDeadline:
    """When the device was given its last step, and whether it has done it."""

    def __init__(self) -> None:
        self._last: tuple[float, torch.cuda.Event] | None = None

    def begin(self) -> None:
        """The current stream of this thread has just been given one."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._last = time.monotonic(), event

    @property
    def is_late(self) -> bool:
        """Whether it has run for more than `STEP_SECONDS`."""
        if self._last is None or time.monotonic() - self._last[0] < STEP_SECONDS:
            return False
        return not self._last[1].query()  # type: ignore[no-untyped-call]


def watch_steps(last: StepDeadline, ended: threading.Event) -> None:
    """Until a rank has `ended`: if a step is late, say that one has, and leave. Captured collectives know no limit."""
    while not ended.wait(_LOOK_SECONDS):
        if last.is_late:
            ended.set()
            leave()


def leave() -> None:
    """Be no rank any more. On GPUs whatever this one still waits for is given up. May be called twice."""
    PEERS.stop_waiting()
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
    """End the ranks. `leavers` are the threads that leave the process group when the others have ended; NCCL may never
    come back from that, and no thread can be started where the process ends.
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
    """How a rank ended; empty where it lives."""
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
    """How a process of this exit code ended."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
