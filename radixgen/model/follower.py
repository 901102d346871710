"""A rank of a sharded model that is not rank 0: `python -m radixgen.model.follower SOCKET MEMORY FRAMES TAKEN`.

It holds its share of the weights and of the KV, and does what rank 0 says on a ring, of which the last three are the
descriptors, and answers on `SOCKET`, where it is also told its job and whatever is too large for the ring. What a step
raises ends it: ranks that no longer run the same step can't be brought together again.
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
from weakref import WeakValueDictionary

from radixgen.cache.storage import kv_room
from radixgen.core import Plan
from radixgen.model.lockstep import Channel, ChannelClosed, RankCommand, RankJob, unpack, unpack_step
from radixgen.model.parallel import load_rank, run_ahead
from radixgen.model.ranks import await_hangup, join
from radixgen.model.ring import RingReader
from radixgen.model.runner import ModelRunner

Receive = Callable[[], bytearray]
"""The next frame of rank 0's; blocks"""

logger = logging.getLogger(__name__)


def main() -> None:
    """Signals that a terminal or a supervisor sends to all processes are for rank 0, which decides when to end."""
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
        runner, _ = load_rank(job, partial(_agree, channel, receive))
        channel.answer(kv_bytes_per_token=runner.kv_bytes_per_token, kv_room=kv_room(runner.device))
        follow(receive, channel, runner)
    except ChannelClosed:
        end()
    except BaseException as error:
        logger.critical("rank %d ends", job.rank, exc_info=error)
        with suppress(ChannelClosed):
            channel.answer(raised=f"{type(error).__name__}: {error}")
        sys.exit(1)


def follow(receive: Receive, channel: Channel, model: ModelRunner) -> None:
    """Do as rank 0 says in what comes, and answer on `channel`. Raises `ChannelClosed` where `receive` does, and what `model`
    raises in a step.
    """
    origins: WeakValueDictionary[int, Plan] = WeakValueDictionary()
    while True:
        kind, arrays = unpack(receive())
        if kind is RankCommand.RUN:
            model.run(*unpack_step(arrays, origins))
        elif kind is RankCommand.WARM_UP:
            model.warm_up(*unpack_step(arrays, origins))
        elif kind is RankCommand.RUN_AHEAD:
            plan, _, slots, logit_rows = unpack_step(arrays, origins)
            run_ahead(model, plan, None, slots, logit_rows)
        elif kind is RankCommand.ROOM:
            channel.answer(kv_room=kv_room(model.device))
        elif kind is RankCommand.ALLOCATE:
            _allocate(channel, model, int(arrays[0][0]))
        else:
            raise ValueError(f"{kind.name} was not asked for")


def _allocate(channel: Channel, model: ModelRunner, slots: int) -> None:
    try:
        model.allocate(slots)
    except (MemoryError, RuntimeError, ValueError) as error:
        channel.answer(refused=f"{type(error).__name__}: {error}")
    else:
        channel.answer(allocated=1)


def _receive(ring: RingReader, channel: Channel) -> bytearray:
    frame = ring.read()
    return channel.receive() if frame is None else frame


def _agree(channel: Channel, receive: Receive, fine: bool) -> bool:
    """As `radixgen.model.graphs.Agree`. Raises `ChannelClosed`."""
    channel.answer(fine=int(fine))
    kind, arrays = unpack(receive())
    if kind is not RankCommand.AGREED:
        raise ValueError(f"{kind.name} came in place of an answer")
    return bool(arrays[0][0])


def _end(store: Path) -> None:
    """Rank 0 is gone, perhaps without a chance to tidy up."""
    shutil.rmtree(store, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
