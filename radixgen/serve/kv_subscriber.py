"""The other end of `KVEvents`: follows which blocks workers hold, through gaps, replays and late beginnings."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import msgspec
import zmq
from msgspec import Struct

from radixgen.core import InvalidRequest, RadixgenError
from radixgen.serve.endpoint import Context, Interest, check_endpoint, ready
from radixgen.serve.kv_events import KVEventsConfig

logger = logging.getLogger(__name__)

_POLL_MS = 100
_BURST = 64
_QUIET_SECONDS = 1.0
"""Without a batch, after which a replay is asked for: the last batches may be what was missed."""
_PATIENCE_SECONDS = 30.0
"""For the next message of a replay"""
_WAITING_BATCHES = 1_000
_END = -1
_EVERYTHING = -1
_BATCH_BLOCKS = 1 << 14
_BLOCK_BYTES = 2_048
"""Of a block in an event besides its tokens, at the most: names of fields, hashes, a namespace"""


class BlocksStored(Struct, tag="BlockStored"):
    """Of what the event says, what tells which blocks: their tokens are passed over unread."""

    block_hashes: list[int]


class BlocksRemoved(Struct, tag="BlockRemoved"):
    """Blocks that are held no more."""

    block_hashes: list[int]


class AllCleared(Struct, tag="AllBlocksCleared"):
    """No block is held."""


Event = BlocksStored | BlocksRemoved | AllCleared
Apply = Callable[[Hashable, Sequence[Event]], None]


class _Batch(Struct, array_like=True):
    time: float
    events: list[Event]


class KVSubscriber:
    """Follows the cache events of any number of workers, in a thread of its own.

    Begins with everything that a worker holds, and asks for what it misses. What comes twice is told twice: the last
    event of a block says whether it is held.
    """

    def __init__(self, apply: Apply) -> None:
        """apply: is called with a worker and the events of one batch, in their order, from the thread."""
        self.batches = 0
        """Batches that were told"""
        self._apply = apply
        self._context: Context = zmq.Context()
        self._feeds: dict[Hashable, _Feed] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="radixgen-kv-subscriber", daemon=True)
        self._thread.start()

    def follow(self, worker: Hashable, config: KVEventsConfig, kv_tokens: int) -> None:
        """Follow `worker`, whose pool has so many tokens. Raises `InvalidRequest` and `InsecureEndpoint` where its
        events can't be had, or should not be trusted.
        """
        if config.replay_endpoint is None:
            raise InvalidRequest("replay_endpoint", None, "must be given for cache events to be followed")
        if config.encoding != "map":
            raise InvalidRequest("encoding", config.encoding, "must be map for cache events to be followed")
        for endpoint in (config.endpoint, config.replay_endpoint):
            check_endpoint(endpoint)

        def follow() -> None:
            self._feeds[worker] = _Feed(self._context, config, kv_tokens)

        self._post(follow)

    def leave(self, worker: Hashable) -> None:
        """Follow it no longer. A batch that is being told may still come."""

        def leave() -> None:
            if (feed := self._feeds.pop(worker, None)) is not None:
                feed.close()

        self._post(leave)

    def close(self) -> None:
        """May be called twice."""
        self._closing = True
        self._wake()
        self._thread.join()

    def _post(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # it is closed
            os.eventfd_write(self._wake_fd, 1)

    # -- in the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            watched: list[Interest] = [(self._wake_fd, zmq.POLLIN)]
            watched += [(socket, zmq.POLLIN) for feed in self._feeds.values() for socket in feed.sockets]
            if self._wake_fd in ready(watched, _POLL_MS):
                os.eventfd_read(self._wake_fd)
            while self._jobs:
                self._jobs.popleft()()
            for worker, feed in list(self._feeds.items()):
                self._hear(worker, feed)
        self._context.destroy(linger=0)
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)

    def _hear(self, worker: Hashable, feed: "_Feed") -> None:
        """Tell what has come of one worker. One that tells nonsense counts as holding nothing, and is not followed."""
        try:
            for _ in range(_BURST):
                events = feed.receive()
                if events is None:
                    break
                if events:
                    self._apply(worker, events)
                    self.batches += 1
            feed.attend(time.monotonic())
        except (RadixgenError, msgspec.MsgspecError, zmq.ZMQError, ValueError) as error:
            logger.error("cache events of worker %s can't be read, and are not followed: %s", worker, error)
            del self._feeds[worker]
            feed.close()
            self._apply(worker, [AllCleared()])


class _Feed:
    """One worker's batches in their order. While a replay is under way, what is new waits in its socket."""

    def __init__(self, context: Context, config: KVEventsConfig, kv_tokens: int) -> None:
        blocks = kv_tokens // config.block_size + _BATCH_BLOCKS
        self._context = context
        self._most_bytes = blocks * (_BLOCK_BYTES + 8 * config.block_size)
        self._replay_endpoint = str(config.replay_endpoint)
        self._next = 0
        self._replaying = False
        self._heard = 0.0
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._new = self._connect(zmq.SUB, config.endpoint)
        self._new.subscribe(config.topic.encode())
        self._replay = self._connect(zmq.DEALER, self._replay_endpoint)
        self._ask(_EVERYTHING)

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """Where something is waited for."""
        return [self._replay] if self._replaying else [self._new]

    def receive(self) -> list[Event] | None:
        """The events of the next message, none where it brings nothing new; None where no message has come."""
        try:
            frames = self.sockets[0].recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        self._heard = time.monotonic()
        _, sequence, payload = frames[-3:]
        return self._read_replay(sequence, payload) if self._replaying else self._read_new(sequence, payload)

    def attend(self, now: float) -> None:
        """Ask for what may have been missed; again, by a new connection, where the answer has stopped."""
        if self._replaying and now - self._heard > _PATIENCE_SECONDS:
            self._replay.close()
            self._replay = self._connect(zmq.DEALER, self._replay_endpoint)
            self._ask(_EVERYTHING)
        elif not self._replaying and now - self._heard > _QUIET_SECONDS:
            self._ask(self._next)

    def close(self) -> None:
        self._new.close()
        self._replay.close()

    def _read_new(self, sequence: bytes, payload: bytes) -> list[Event]:
        number = int.from_bytes(sequence, "big")
        if number > self._next:
            self._ask(self._next)
        if number != self._next:
            return []
        self._next += 1
        return self._decoder.decode(payload).events

    def _read_replay(self, sequence: bytes, payload: bytes) -> list[Event]:
        """A batch of a replay: the next one, or, after `AllBlocksCleared`, everything that is held."""
        number = int.from_bytes(sequence, "big", signed=True)
        if number == _END:
            self._replaying = False
            return []
        events = self._decoder.decode(payload).events
        if number != self._next and not (events and isinstance(events[0], AllCleared)):
            raise InvalidRequest("sequence", number, f"must be {self._next}, or of everything that is held")
        self._next = number + 1
        return events

    def _ask(self, start: int) -> None:
        self._replay.send_multipart([b"", start.to_bytes(8, "big", signed=True)], zmq.DONTWAIT)
        self._replaying, self._heard = True, time.monotonic()

    def _connect(self, kind: int, endpoint: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, _WAITING_BATCHES)
        socket.setsockopt(zmq.MAXMSGSIZE, self._most_bytes)
        socket.connect(endpoint)
        return socket
