"""Subscriber of `KVEvents`: follows which blocks workers have cached, by replays where it missed events."""

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
from radixgen.serve.zmq.endpoint import Context, Interest, check_endpoint, ready
from radixgen.serve.zmq.kv_event_fields import MEDIUM
from radixgen.serve.zmq.kv_events import KVEventsConfig

logger = logging.getLogger(__name__)

_POLL_MS = 100
_BURST = 64
_QUIET_SECONDS = 1.0
"""Seconds without a batch until a replay is requested: the last batches may have been lost"""
_PATIENCE_SECONDS = 30.0
"""Time limit for the next message of a replay"""
_WAITING_BATCHES = 1_000
_END = -1
_EVERYTHING = -1
_BATCH_BLOCKS = 1 << 14
_BLOCK_BYTES = 2_048
"""Maximum size of a block in an event without its tokens: field names, hashes, namespace"""


class BlockStored(Struct, tag="BlockStored"):
    """Blocks that were cached. Other fields of the event, such as token ids, are skipped."""

    block_hashes: list[int]
    medium: str | None = None


class BlockRemoved(Struct, tag="BlockRemoved"):
    """Blocks that are no longer cached."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(Struct, tag="AllBlocksCleared"):
    """No block is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared
Apply = Callable[[Hashable, Sequence[Event]], None]


class _Batch(Struct, array_like=True):
    time: float
    events: list[Event]


class KVSubscriber:
    """Follows the KV cache events of any number of workers, in its own thread.

    It starts with a snapshot of a worker's blocks and requests replays of missed batches. Events may repeat: the last
    event of a block decides whether it is cached. Only blocks in the pool count, not those in host memory alone.
    """

    def __init__(self, apply: Apply) -> None:
        """apply: called from the thread with a worker and the events of one batch, in order."""
        self.batches = 0
        """Number of batches that were applied"""
        self._apply = apply
        self._context: Context = zmq.Context()
        self._feeds: dict[Hashable, _Feed] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="radixgen-kv-subscriber", daemon=True)
        self._thread.start()

    def follow(self, worker: Hashable, config: KVEventsConfig, kv_tokens: int) -> None:
        """Follow a worker. Raises `InvalidRequest`, `InsecureEndpoint`.

        kv_tokens: size of the worker's KV cache, in tokens, host memory included.
        """
        if config.replay_endpoint is None:
            raise InvalidRequest("replay_endpoint", None, "is required to follow cache events")
        if config.encoding != "map":
            raise InvalidRequest("encoding", config.encoding, "must be map to follow cache events")
        for endpoint in (config.endpoint, config.replay_endpoint):
            check_endpoint(endpoint)

        def follow() -> None:
            self._feeds[worker] = _Feed(self._context, config, kv_tokens)

        self._post(follow)

    def leave(self, worker: Hashable) -> None:
        """Stop following a worker. A batch that is being applied is finished."""

        def leave() -> None:
            if (feed := self._feeds.pop(worker, None)) is not None:
                feed.close()

        self._post(leave)

    def close(self) -> None:
        """Stop the thread. May be called twice."""
        self._closing = True
        self._wake()
        self._thread.join()

    def _post(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # closed
            os.eventfd_write(self._wake_fd, 1)

    # -- in the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            interests: list[Interest] = [(self._wake_fd, zmq.POLLIN)]
            interests += [(socket, zmq.POLLIN) for feed in self._feeds.values() for socket in feed.sockets]
            if self._wake_fd in ready(interests, _POLL_MS):
                os.eventfd_read(self._wake_fd)
            while self._jobs:
                self._jobs.popleft()()
            for worker, feed in list(self._feeds.items()):
                self._receive(worker, feed)
        self._context.destroy(linger=0)
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)

    def _receive(self, worker: Hashable, feed: "_Feed") -> None:
        """Apply the batches of a worker. After a malformed one, its blocks count as removed, and it is not followed."""
        try:
            for _ in range(_BURST):
                events = feed.receive()
                if events is None:
                    break
                events = [event for event in events if _is_in_pool(event)]
                if events:
                    self._apply(worker, events)
                    self.batches += 1
            feed.attend(time.monotonic())
        except (RadixgenError, msgspec.MsgspecError, zmq.ZMQError, ValueError) as error:
            logger.error("malformed KV cache events of worker %s, no longer followed: %s", worker, error)
            del self._feeds[worker]
            feed.close()
            self._apply(worker, [AllBlocksCleared()])


class _Feed:
    """Batches of one worker in order. During a replay, new batches wait in their socket."""

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
        """Sockets to poll."""
        return [self._replay] if self._replaying else [self._new]

    def receive(self) -> list[Event] | None:
        """Events of the next message, empty if it has no new ones. None if there is no message."""
        try:
            frames = self.sockets[0].recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        self._heard = time.monotonic()
        _, sequence, payload = frames[-3:]
        return self._read_replay(sequence, payload) if self._replaying else self._read_new(sequence, payload)

    def attend(self, now: float) -> None:
        """Request a replay after a quiet period; restart a replay that has stopped, with a new connection."""
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
        """Decode a batch of a replay: the next batch, or a snapshot."""
        number = int.from_bytes(sequence, "big", signed=True)
        if number == _END:
            self._replaying = False
            return []
        events = self._decoder.decode(payload).events
        if number != self._next and not (events and isinstance(events[0], AllBlocksCleared)):
            raise InvalidRequest("sequence", number, f"must be {self._next}, or that of a snapshot")
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


def _is_in_pool(event: Event) -> bool:
    return isinstance(event, AllBlocksCleared) or event.medium in (None, MEDIUM)
