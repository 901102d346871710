"""Process of a rank other than 0: `python -m radixgen.model.follower SOCKET MEMORY FRAMES TAKEN`.

It holds its shard of the weights and of the KV. Commands arrive on a ring, whose descriptors are the last three
arguments. Its job, frames too large for the ring, and its answers go over `SOCKET`. An exception in a step ends the
process, because ranks that no longer run the same step cannot be synchronized again.
"""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from radixgen.cache.storage import kv_room
from radixgen.core import Plan
from radixgen.model.frame_ring import RingReader
from radixgen.model.lockstep import Channel, ChannelClosed, ModelInput, RankCommand, RankJob, unpack, unpack_step
from radixgen.model.parallel import load_rank, run_ahead
from radixgen.model.rank_host_kv import FollowerHostKV
from radixgen.model.ranks import await_hangup, join
from radixgen.model.runner import ModelRunner
from radixgen.model.sharded_logits import RankLogits

T = TypeVar("T")
Receive = Callable[[], bytearray]
"""Returns rank 0's next frame; blocks."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Run a follower rank. Ignores SIGINT and SIGTERM, which terminals and supervisors send to all processes: rank 0
    decides when to end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor, *of_ring = map(int, sys.argv[1:])
    channel, ring = Channel(socket.socket(fileno=descriptor)), RingReader(*of_ring)
    try:
        job = RankJob.from_bytes(channel.receive())
    except ChannelClosed:
        return
    end = partial(_end, Path(job.store).parent)
    threading.Thread(target=await_hangup, args=([channel.socket.fileno()], end), daemon=True).start()
    try:
        channel.answer(started=1)
        join(job)
        receive = partial(_receive, ring, channel)
        runner, _, logits = load_rank(job, partial(_agree, channel, receive))
        channel.answer(kv_bytes_per_token=runner.kv_bytes_per_token, kv_room=kv_room(runner.device))
        follow(receive, channel, runner, logits)
    except ChannelClosed:
        end()
    except BaseException as error:
        logger.critical("rank %d ends", job.rank, exc_info=error)
        with suppress(ChannelClosed):
            channel.answer(raised=f"{type(error).__name__}: {error}")
        sys.exit(1)


def follow(receive: Receive, channel: Channel, model: ModelRunner, logits: RankLogits | None = None) -> None:
    """Execute the commands of rank 0 and answer on `channel`. `logits`: keeps those of the last step, if each rank has
    only its own.

    Raises `ChannelClosed` if `receive` does, and whatever a step of `model` raises.
    """
    origins: WeakValueDictionary[int, Plan] = WeakValueDictionary()
    host: FollowerHostKV | None = None
    while True:
        kind, arrays = unpack(receive())
        if kind in (RankCommand.RUN, RankCommand.WARM_UP, RankCommand.RUN_AHEAD):
            own = _run(kind, model, unpack_step(arrays, origins))
            if logits is not None and own is not None:
                logits.last = own
        elif kind is RankCommand.DRAW and logits is not None:
            logits.draw(*arrays)
        elif kind is RankCommand.GATHER and logits is not None:
            logits.gather()
        elif kind is RankCommand.ROOM:
            channel.answer(kv_room=kv_room(model.device))
        elif kind is RankCommand.ALLOCATE:
            _answer(channel, partial(model.allocate, int(arrays[0][0])))
        elif kind is RankCommand.ALLOCATE_HOST:
            host = _answer(channel, partial(_host_kv, model, int(arrays[0][0])))
        elif kind in (RankCommand.SAVE, RankCommand.SAVED, RankCommand.LOAD, RankCommand.LOADED) and host is not None:
            host.follow(kind, arrays)
        else:
            raise ValueError(f"{kind.name} is not a command to follow")


def _run(kind: RankCommand, model: ModelRunner, step: ModelInput) -> Tensor | None:
    """Take part in a step. Returns this rank's logits, or None if the step needs another command."""
    if kind is RankCommand.RUN_AHEAD:
        return run_ahead(model, step.plan, None, step.slots, step.logit_rows)
    return model.run(*step) if kind is RankCommand.RUN else model.warm_up(*step)


def _answer(channel: Channel, allocate: Callable[[], T]) -> T | None:
    """Allocate something, and answer whether there was memory for it."""
    try:
        result = allocate()
    except (MemoryError, OSError, RuntimeError, ValueError) as error:
        channel.answer(refused=f"{type(error).__name__}: {error}")
        return None
    channel.answer(allocated=1)
    return result


def _host_kv(model: ModelRunner, slots: int) -> FollowerHostKV:
    return FollowerHostKV(model.host_kv(slots))


def _receive(ring: RingReader, channel: Channel) -> bytearray:
    frame = ring.read()
    return channel.receive() if frame is None else frame


def _agree(channel: Channel, receive: Receive, fine: bool) -> bool:
    """As `radixgen.model.graphs.Agree`. Raises `ChannelClosed`."""
    channel.answer(fine=int(fine))
    kind, arrays = unpack(receive())
    if kind is not RankCommand.AGREED:
        raise ValueError(f"{kind.name} instead of {RankCommand.AGREED.name}")
    return bool(arrays[0][0])


def _end(store: Path) -> None:
    """Clean up and exit after rank 0 is gone, perhaps without having cleaned up itself."""
    shutil.rmtree(store, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
