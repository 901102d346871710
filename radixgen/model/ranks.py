"""The processes of a sharded model: rank 0 starts the others, and none outlives it.

Rank 0 is the process of the engine. Each other rank runs `radixgen.model.follower` over one channel to rank 0, and ends
when that channel does, whatever it is doing then.
"""

import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from radixgen.core.settings import rank_environment, use_loopback
from radixgen.model.lockstep import Channel, Closed, Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

START_SECONDS = 300.0
"""For a process to start and import what it needs, and for ranks to answer."""
LOAD_SECONDS = 1800.0
"""For ranks to wait for each other while they load."""
STEP_SECONDS = 120.0
"""For ranks to wait for each other within a step."""
_STOP_SECONDS = 5.0
_NOTICE_SECONDS = 2.0
"""For a death to show."""

_leaving = threading.Lock()


class Followers:
    """All ranks but rank 0, seen from there."""

    def __init__(self, job: Job) -> None:
        """Start them. `stop` ends them and leaves the process group; so does the end of this object or process."""
        home = tempfile.mkdtemp(prefix="radixgen-")
        self.job = replace(job, store=str(Path(home) / "ranks"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self.stop = weakref.finalize(self, _stop, self.processes, self._channels, home)
        try:
            for rank in range(1, job.size):
                self._start(rank)
        except BaseException:
            self.stop()
            raise

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self._channels.append(Channel(ours))
        with theirs:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "radixgen.model.follower", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=rank_environment(rank),
                )
            )
        self._channels[-1].send(replace(self.job, rank=rank).as_bytes())

    def send(self, frame: bytes) -> None:
        """To each. Raises `Closed`."""
        for channel in self._channels:
            channel.send(frame)

    def answers(self, seconds: float) -> list[dict[str, Any]]:
        """What each has to say next, in the order of the ranks. Raises `Closed` or `TimeoutError`."""
        return [_read(channel, seconds) for channel in self._channels]

    def obituary(self) -> str:
        """Which of them have ended, and how; empty where all live. Waits a moment for a death to show."""
        select.select([channel.socket for channel in self._channels], [], [], _NOTICE_SECONDS)
        ends = [_end_of(channel, process) for channel, process in zip(self._channels, self.processes, strict=True)]
        return "; ".join(f"rank {rank} {end}" for rank, end in enumerate(ends, 1) if end)

    def on_end(self, call: Callable[[], None]) -> None:
        """Have a thread `call` when one of them has ended. It must not hold this object."""
        watched = [channel.socket.fileno() for channel in self._channels]
        threading.Thread(target=await_hangup, args=(watched, call), name="radixgen-ranks", daemon=True).start()


def await_hangup(sockets: Sequence[int], call: Callable[[], None]) -> None:
    """Block until the other end of one of `sockets` is closed for writing, then `call`."""
    poll = select.poll()
    for one in sockets:
        poll.register(one, getattr(select, "POLLRDHUP", 0))
    poll.poll()
    call()


def join(job: Job) -> None:
    """Become a rank of the process group: gloo on the CPU, else NCCL with a GPU of its own."""
    torch.set_num_threads(job.threads)
    use_loopback()
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


def bound_steps(model: "PreTrainedModel") -> None:
    """From now on the ranks of `model` wait for each other for `STEP_SECONDS` at the most."""
    for group in model._device_mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=STEP_SECONDS), group)


def leave() -> None:
    """Be no rank any more. On GPUs whatever this one still waits for is given up. May be called twice."""
    with _leaving:
        if not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _stop(processes: Sequence["subprocess.Popen[bytes]"], channels: Sequence[Channel], home: str) -> None:
    for channel in channels:
        with suppress(OSError):
            channel.socket.shutdown(socket.SHUT_WR)
    for process in processes:
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for channel in channels:
        channel.close()
    leave()
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
    except Closed:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(_NOTICE_SECONDS)
            return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return "hung up"
