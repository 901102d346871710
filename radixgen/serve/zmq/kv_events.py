"""KV cache events over ZeroMQ, in vLLM's format, which SGLang, Dynamo and llm-d consume too.

    PUB     [topic, sequence (8 bytes, big-endian), payload]
    ROUTER  [b"", start (8 bytes)]  ->  [b"", topic, sequence, payload] …, [b"", b"", -1, b""]
    payload [time, [event, …], rank]  as MessagePack

An event is `BlockStored`, `BlockRemoved` or `AllBlocksCleared`: a map with its name under `type`, or the same values as
an array. The `medium` of the first two is `GPU` for the pool and `CPU` for host memory; a block may be in both. A batch
holds the events of one interval and one medium in order; the sequence number counts batches from 0.

A subscriber that misses batches sees a gap in the sequence numbers and requests a replay from there. If batch `start`
is no longer buffered, or lies beyond the last batch (after a restart of the worker; -1 requests it explicitly), the
replay is a snapshot: a single batch with the last sequence number that holds `AllBlocksCleared`, then all cached
blocks. A late subscriber requests 0 or -1. Repeated events do no harm: the last event of a block decides.

The engine's thread only appends to a bounded queue. The publisher's thread sends batches, buffers them for replays, and
tracks all cached blocks for snapshots.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import msgspec
import zmq

from radixgen.cache import BlockEvent, BlockProjection, BlocksAdded, BlocksDropped, BlocksReset, TokenArray
from radixgen.core import InvalidRequest
from radixgen.core.errors import check_integer
from radixgen.serve.zmq.kv_event_fields import HOST_MEDIUM, MEDIUM, fields_of, joined_events

if TYPE_CHECKING:
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.core import EngineCore
    from radixgen.engine.engine import Engine

logger = logging.getLogger(__name__)

_INTERVAL_MS = 10
_MAX_BATCH_BLOCKS = 4_096
_LINGER_MS = 500
_END = (-1).to_bytes(8, "big", signed=True)
_LOOPBACK = {"127.0.0.1", "localhost", "[::1]", "::1"}
_EVERYWHERE = {"*", "0.0.0.0", "[::]", "::"}


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to publish and where. Field names are those of vLLM's `--kv-events-config` where it has them."""

    enable_kv_cache_events: bool = True
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    """`ipc://…`, loopback and `tcp://*:port` are bound, other hosts connected to; port `*` picks a free port"""
    replay_endpoint: str | None = None
    topic: str = ""
    block_size: int = 16
    encoding: Literal["map", "array"] = "map"
    rank: int = 0
    """Data-parallel rank of this engine"""
    buffer_steps: int = 10_000
    """Maximum number of batches that are buffered for replays"""
    buffer_bytes: int = 1 << 26
    """Maximum number of bytes that are buffered for replays"""
    hwm: int = 10_000
    """Maximum number of unsent batches per subscriber; a subscriber that lags further behind misses some"""
    max_queue_size: int = 100_000
    """Maximum number of blocks in the queue from the engine to the publisher, but at least twice the pool"""
    allow_insecure_tcp: bool = False
    """Allow unencrypted TCP beyond loopback, by which anyone can read token ids"""

    @classmethod
    def parse(cls, text: str) -> "KVEventsConfig":
        """Parse JSON. Raises `InvalidRequest`."""
        try:
            return msgspec.json.decode(text.encode("utf-8", "surrogatepass"), type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequest("kv_events_config", text, str(error)) from error

    @property
    def enabled(self) -> bool:
        return self.enable_kv_cache_events and self.publisher != "null"

    def check(self) -> None:
        """Raise `InvalidRequest` for a field out of its range, or an endpoint that requires `allow_insecure_tcp`."""
        check_integer("block_size", self.block_size, 1, 1 << 16)
        check_integer("rank", self.rank, 0, 1 << 16)
        for field in ("buffer_steps", "hwm", "max_queue_size"):
            check_integer(field, getattr(self, field), 1, 1 << 24)
        check_integer("buffer_bytes", self.buffer_bytes, 1, 1 << 40)
        if self.encoding not in ("map", "array"):
            raise InvalidRequest("encoding", self.encoding, "must be map or array")
        if len(self.topic) > 256:
            raise InvalidRequest("topic", self.topic, "must be text of at most 256 characters")
        for field in ("endpoint", "replay_endpoint"):
            where = getattr(self, field)
            if where is not None:
                _check_endpoint(field, where, self.allow_insecure_tcp)


@dataclass(frozen=True, slots=True)
class KVEventsStats:
    """Counters of a publisher."""

    batches: int
    events: int
    blocks: int
    """Blocks in the pool according to the batches sent so far"""
    host_blocks: int
    """The same of host memory"""
    dropped_events: int
    """Events that were not sent; after a queue overflow all cached blocks are published again"""
    lags: int
    """Times that a subscriber lagged too far behind, and missed batches"""
    replays: int
    snapshots: int
    """Replays that were snapshots"""
    cut_replays: int
    """Replays that were cut off because the subscriber left or did not read"""
    bad_requests: int
    """Malformed replay requests"""


class KVEvents:
    """Publishes the KV cache events of an engine until `close`.

    ```python
    engine = Engine("smollm2")
    with KVEvents(engine, KVEventsConfig(endpoint="tcp://127.0.0.1:5557")) as events:
        engine.generate("Hello")
    ```
    """

    def __init__(self, engine: "Engine | AsyncEngine", config: KVEventsConfig | None = None) -> None:
        """Start with `AllBlocksCleared` and all cached blocks. Raises `InvalidRequest`, also for an address in use."""
        self.config = config or KVEventsConfig()
        self.config.check()
        self._engine = engine
        self._queue = _Queue(self.config.max_queue_size)
        self._host_queue = _Queue(self.config.max_queue_size, HOST_MEDIUM)
        self._projections: list[BlockProjection] = []
        self._publisher = _Publisher(self.config, self._queue, self._host_queue)
        try:
            engine.inspect(self._listen)
        except BaseException:
            self._publisher.close()
            raise

    @property
    def bound_config(self) -> KVEventsConfig:
        """The configuration, with actual ports in place of `*`."""
        return msgspec.structs.replace(self.config, endpoint=self.endpoint, replay_endpoint=self.replay_endpoint)

    @property
    def endpoint(self) -> str:
        """Address for subscribers, with its actual port."""
        return self._publisher.endpoint

    @property
    def replay_endpoint(self) -> str | None:
        """Address for replay requests, with its actual port."""
        return self._publisher.replay_endpoint

    def stats(self) -> KVEventsStats:
        return self._publisher.stats()

    def close(self) -> None:
        """Publish the queued events, and stop. May be called twice."""
        self._engine.inspect(self._leave)
        self._publisher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self, core: "EngineCore") -> None:
        if any(isinstance(listener, BlockProjection) for listener in core.tree.listeners):
            logger.error("the KV cache events of this engine are published already")
            raise InvalidRequest("engine", self._engine, "its cache events are published already")
        trees = [(core.tree, self._queue)] + ([(core.host.tree, self._host_queue)] if core.host is not None else [])
        for tree, queue in trees:
            queue.limit = max(queue.limit, 2 * tree.pool.capacity // self.config.block_size)
            self._projections.append(BlockProjection(tree, queue.put, self.config.block_size))

    def _leave(self, core: "EngineCore") -> None:
        while self._projections:
            self._projections.pop().close()


class _Queue:
    """Queue of at most `limit` blocks of one medium, from the engine's thread to the publisher's. Neither thread ever
    waits.
    """

    def __init__(self, limit: int, medium: str = MEDIUM) -> None:
        self.limit = limit
        self.medium = medium
        self.dropped = 0
        self._events: deque[BlockEvent] = deque()
        # Only the engine's thread writes the first two, only the publisher's thread the third.
        self._put = 0
        self._cut = 0
        self._taken = 0

    def put(self, event: BlockEvent) -> bool:
        """Add an event. If the queue is full, clears it and returns False: then publish all cached blocks again."""
        if self._put - self._cut - self._taken < self.limit:
            self._put += _num_blocks(event)
            self._events.append(event)
            return True
        dropped = 1
        with suppress(IndexError):
            while True:
                self._cut += _num_blocks(self._events.popleft())
                dropped += 1
        self.dropped += dropped
        logger.warning("dropped %d KV cache events: the publisher is too slow; publishing all blocks again", dropped)
        return False

    def take(self) -> list[BlockEvent]:
        """Remove the oldest events, up to the size of a batch."""
        events: list[BlockEvent] = []
        blocks = 0
        with suppress(IndexError):
            while blocks < _MAX_BATCH_BLOCKS:
                events.append(self._events.popleft())
                blocks += _num_blocks(events[-1])
        self._taken += blocks
        return events


class _Block(NamedTuple):
    """A cached block."""

    parent: int | None
    tokens: TokenArray
    namespace: str


class _Publisher:
    """Sockets, and the thread that uses them once it has started."""

    def __init__(self, config: KVEventsConfig, *queues: _Queue) -> None:
        self._config = config
        self._queues = queues
        self._topic = config.topic.encode("utf-8", "replace")
        self._held: dict[str, dict[int, _Block]] = {MEDIUM: {}, HOST_MEDIUM: {}}
        """Cached blocks by medium, according to the batches sent so far; each follows its parent"""
        self._sent: deque[tuple[int, bytes]] = deque()
        self._sent_bytes = 0
        self._snapshot: tuple[int, bytes] | None = None
        self._batches = self._events = self._failed = 0
        self._lags = self._replays = self._snapshots = self._cut_replays = self._bad_requests = 0
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._replay: zmq.Socket[bytes] | None = None
        self.replay_endpoint: str | None = None
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set(zmq.SNDHWM, config.hwm)
            self._pub.set(zmq.XPUB_NODROP, 1)
            self.endpoint = _open(self._pub, "endpoint", config.endpoint)
            if config.replay_endpoint is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.set(zmq.ROUTER_MANDATORY, 1)
                self._replay.set(zmq.SNDHWM, config.buffer_steps + 2)
                self._replay.set(zmq.MAXMSGSIZE, 1024)
                self.replay_endpoint = _open(self._replay, "replay_endpoint", config.replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        if config.allow_insecure_tcp:
            logger.warning("KV cache events, which contain all prompts, are sent unencrypted from %s", self.endpoint)
        self._thread = threading.Thread(target=self._run, name="radixgen-kv-events", daemon=True)
        self._thread.start()

    def stats(self) -> KVEventsStats:
        return KVEventsStats(
            batches=self._batches,
            events=self._events,
            blocks=len(self._held[MEDIUM]),
            host_blocks=len(self._held[HOST_MEDIUM]),
            dropped_events=sum(queue.dropped for queue in self._queues) + self._failed,
            lags=self._lags,
            replays=self._replays,
            snapshots=self._snapshots,
            cut_replays=self._cut_replays,
            bad_requests=self._bad_requests,
        )

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    # -- in the sender's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        open_ = True
        while open_:
            open_ = not self._closing.is_set()
            self._wait()
            for queue in self._queues:
                while events := queue.take():
                    self._publish(events, queue.medium)
            if self._replay is not None and self._replay.poll(0):
                try:
                    self._answer(self._replay)
                except Exception:
                    logger.exception("a replay of KV cache events failed")
        self._context.destroy(linger=_LINGER_MS)

    def _wait(self) -> None:
        """Wait for a replay request, up to one interval."""
        if self._replay is not None:
            self._replay.poll(_INTERVAL_MS)
        else:
            self._closing.wait(_INTERVAL_MS / 1_000)

    def _publish(self, events: list[BlockEvent], medium: str) -> None:
        """Send one batch. If that fails, its sequence number is skipped, and replays start with a snapshot."""
        try:
            fields = [*self._fields([self._apply(event, medium) for event in events], medium)]
            if not fields:
                return
            payload = self._encode(fields)
            self._send([self._topic, self._batches.to_bytes(8, "big"), payload])
            self._keep(payload)
        except Exception:
            logger.exception("could not send %d KV cache events", len(events))
            self._failed += len(events)
            self._sent.clear()
            self._sent_bytes = 0
        self._batches += 1
        self._events += len(events)

    def _keep(self, payload: bytes) -> None:
        """Buffer a payload for replays."""
        self._sent.append((self._batches, payload))
        self._sent_bytes += len(payload)
        while len(self._sent) > self._config.buffer_steps or self._sent_bytes > self._config.buffer_bytes:
            self._sent_bytes -= len(self._sent.popleft()[1])

    def _apply(self, event: BlockEvent, medium: str) -> BlockEvent:
        """Update the cached blocks, and return the event to send: `AllBlocksCleared` has no medium, so a medium is
        cleared by removing its blocks while another has some.
        """
        held, others = self._held[medium], [blocks for name, blocks in self._held.items() if name != medium]
        if isinstance(event, BlocksReset):
            event = BlocksDropped([*reversed(held)]) if any(others) else event
            held.clear()
        elif isinstance(event, BlocksDropped):
            for block in event.hashes:
                held.pop(block, None)
        else:
            parent, size = event.parent, self._config.block_size
            for index, block in enumerate(event.hashes):
                held[block] = _Block(parent, event.tokens[index * size : (index + 1) * size], event.namespace)
                parent = block
        return event

    def _send(self, frames: list[bytes]) -> None:
        """Send to all subscribers that keep up. ZeroMQ reports when one falls behind, but not what it misses then."""
        try:
            self._pub.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self._lags += 1
            logger.warning("a subscriber of KV cache events lags, and misses batches from %d on", self._batches)
            self._pub.set(zmq.XPUB_NODROP, 0)
            self._pub.send_multipart(frames, zmq.NOBLOCK)
            self._pub.set(zmq.XPUB_NODROP, 1)

    def _answer(self, replay: "zmq.Socket[bytes]") -> None:
        """Receive and answer one replay request."""
        frames = replay.recv_multipart(zmq.NOBLOCK)
        if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
            self._bad_requests += 1
            logger.warning("malformed replay request, %d so far", self._bad_requests)
            return
        peer, start = frames[0], int.from_bytes(frames[2], "big")
        self._replays += 1
        try:
            for sequence, payload in self._from(start):
                replay.send_multipart([peer, b"", self._topic, sequence.to_bytes(8, "big"), payload], zmq.NOBLOCK)
            replay.send_multipart([peer, b"", b"", _END, b""], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._cut_replays += 1
            logger.warning("a replay of KV cache events was cut off: %s", error)

    def _from(self, start: int) -> Iterable[tuple[int, bytes]]:
        """Batches from `start` on, or a snapshot if they are not buffered."""
        if start == self._batches or (self._sent and self._sent[0][0] <= start < self._batches):
            return [batch for batch in self._sent if batch[0] >= start]
        if not self._batches:
            return []
        self._snapshots += 1
        if self._snapshot is None or self._snapshot[0] != self._batches - 1:
            events = {
                medium: [BlocksAdded([block_hash], *block) for block_hash, block in held.items()]
                for medium, held in self._held.items()
            }
            fields = [self._fields(added, medium) for medium, added in events.items()]
            self._snapshot = self._batches - 1, self._encode(chain(self._fields([BlocksReset()], MEDIUM), *fields))
        return [self._snapshot]

    def _fields(self, events: Iterable[BlockEvent], medium: str) -> Iterator[dict[str, Any]]:
        """Fields of vLLM's events for events of one medium, neighbours merged."""
        return (fields_of(event, self._config.block_size, medium) for event in joined_events(events))

    def _encode(self, fields: Iterable[dict[str, Any]]) -> bytes:
        form: list[Any] = [*fields] if self._config.encoding == "map" else [[*event.values()] for event in fields]
        return msgspec.msgpack.encode([time.time(), form, self._config.rank])


def _num_blocks(event: BlockEvent) -> int:
    """Size of an event in the queue, in blocks."""
    return 1 if isinstance(event, BlocksReset) else len(event.hashes)


def _host(endpoint: str) -> str | None:
    """Host of a TCP endpoint; None for other endpoints."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0] if endpoint.startswith("tcp://") else None


def _check_endpoint(field: str, endpoint: str, allow_insecure_tcp: bool) -> None:
    host = _host(endpoint)
    if host is None and not endpoint.startswith("ipc://"):
        raise InvalidRequest(field, endpoint, "must begin with tcp:// or ipc://")
    if host is not None and host not in _LOOPBACK and not allow_insecure_tcp:
        raise InvalidRequest(
            field,
            endpoint,
            "must be ipc or loopback: events contain all prompts unencrypted; else set allow_insecure_tcp",
        )


def _open(socket: "zmq.Socket[bytes]", field: str, endpoint: str) -> str:
    """Bind or connect a socket. Returns its address with the actual port."""
    host = _host(endpoint)
    try:
        if host is None or host in _LOOPBACK | _EVERYWHERE:
            socket.bind(endpoint.replace("tcp://localhost:", "tcp://127.0.0.1:"))
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise InvalidRequest(field, endpoint, f"cannot be opened: {error}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
