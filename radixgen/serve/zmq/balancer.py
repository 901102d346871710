"""Choose a worker for each request of a front end, by a `Router` that follows the workers' KV cache events."""

import logging
import threading
from collections.abc import Hashable, Sequence

import numpy as np

from radixgen.cache import hash_blocks
from radixgen.core import InvalidRequest, RadixgenError
from radixgen.serve.routing import OUTPUT_TOKENS, Router
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.kv_events import KVEventsConfig
from radixgen.serve.zmq.kv_subscriber import AllBlocksCleared, BlockStored, Event, KVSubscriber
from radixgen.serve.zmq.salts import salted_namespace

logger = logging.getLogger(__name__)

Blocks = Sequence[int]
"""Hashes of the full blocks of a prompt"""


class Balancer:
    """Thread-safe `Router` over the workers of a front end, each known by a number that is never reused.

    If a worker publishes no KV cache events, it is routed by its live requests only.
    """

    def __init__(self, salt_key: bytes) -> None:
        """salt_key: secret key with which workers hash this front end's cache salts."""
        self._salt_key = salt_key
        self._router = Router()
        self._lock = threading.Lock()
        self._subscriber: KVSubscriber | None = None

    def blocks(self, prompt: Sequence[int], salt: str | None) -> Blocks:
        """Block hashes by which to route a request; empty if there are fewer than two workers."""
        if len(self._router.replicas) < 2:
            return ()
        try:
            tokens = np.array(prompt, np.int32)
        except OverflowError:  # the worker rejects the request
            return ()
        return hash_blocks(tokens, self._router.block_size, salted_namespace(salt or "", self._salt_key))

    def choose(self, blocks: Blocks) -> int:
        """Number of the worker for a prompt with these blocks. Raises `EngineDead` if there is no worker."""
        with self._lock:
            return self._router.choose(blocks)

    def joined(self, worker: int, ready: wire.Ready) -> None:
        """Add a worker, and subscribe to its KV cache events if it publishes any."""
        with self._lock:
            self._router.joined(worker)
        if not wire.given(ready.kv_events_config):
            return
        try:
            config = wire.decode(ready.kv_events_config, KVEventsConfig)
            self._follow(worker, config, ready)
        except RadixgenError as error:
            logger.warning("routing without the KV cache events of a worker: %s", error)

    def died(self, worker: int) -> None:
        """Remove a worker and its requests."""
        with self._lock:
            self._router.died(worker)
        if self._subscriber is not None:
            self._subscriber.leave(worker)

    def sent(self, request_id: str, worker: int, blocks: Blocks, max_tokens: int | None) -> None:
        """Count a request that is sent to a worker. No effect if the worker is gone."""
        expected = OUTPUT_TOKENS if max_tokens is None else min(max_tokens, OUTPUT_TOKENS)
        with self._lock:
            if worker in self._router.replicas:
                self._router.sent(request_id, worker, blocks, output_tokens=expected)

    def ended(self, request_id: str) -> None:
        """Stop counting a request, however it ended. May be called twice."""
        with self._lock:
            self._router.ended(request_id)

    def close(self) -> None:
        """Stop following KV cache events."""
        if self._subscriber is not None:
            self._subscriber.close()

    def _follow(self, worker: int, config: KVEventsConfig, ready: wire.Ready) -> None:
        """Subscribe to the KV cache events of a worker. Raises `InvalidRequest`, `InsecureEndpoint`."""
        if not config.enabled:
            return
        if config.block_size != self._router.block_size:
            limit = f"must be {self._router.block_size} for routing"
            raise InvalidRequest("block_size", config.block_size, limit)
        if self._subscriber is None:
            self._subscriber = KVSubscriber(self._apply)
        kv_tokens = ready.kv_cache_size_tokens or ready.num_gpu_blocks * ready.block_size
        self._subscriber.follow(worker, config, kv_tokens + (ready.host_kv_tokens or 0))

    def _apply(self, worker: Hashable, events: Sequence[Event]) -> None:
        assert isinstance(worker, int)
        for event in events:
            with self._lock:
                if isinstance(event, AllBlocksCleared):
                    self._router.cleared(worker)
                elif isinstance(event, BlockStored):
                    self._router.stored(worker, event.block_hashes)
                else:
                    self._router.removed(worker, event.block_hashes)
