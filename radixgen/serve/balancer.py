"""Chooses a worker for each request of a front end: a `Router` for any thread, fed by the workers' cache events."""

import logging
import threading
from collections.abc import Hashable, Sequence

import numpy as np

from radixgen.cache import hash_blocks
from radixgen.core import InvalidRequest, RadixgenError
from radixgen.serve import wire
from radixgen.serve.kv_events import KVEventsConfig
from radixgen.serve.kv_subscriber import AllCleared, BlocksStored, Event, KVSubscriber
from radixgen.serve.routing import OUTPUT_TOKENS, Router
from radixgen.serve.salts import salted_namespace

logger = logging.getLogger(__name__)

Blocks = Sequence[int]
"""Hashes of a prompt's full blocks"""


class Balancer:
    """Knows the workers of a front end by numbers that are never used again. Its methods may be called from any thread.

    Of a worker that publishes no cache events only live requests are known.
    """

    def __init__(self, salt_key: bytes) -> None:
        """salt_key: secret by which workers make namespaces of this front end's cache salts."""
        self._salt_key = salt_key
        self._router = Router()
        self._lock = threading.Lock()
        self._subscriber: KVSubscriber | None = None

    def blocks(self, prompt: Sequence[int], salt: str | None) -> Blocks:
        """What a request is routed by; nothing where there is no choice."""
        if len(self._router.replicas) < 2:
            return ()
        try:
            tokens = np.array(prompt, np.int32)
        except OverflowError:  # a worker refuses it
            return ()
        return hash_blocks(tokens, self._router.block_size, salted_namespace(salt or "", self._salt_key))

    def choose(self, blocks: Blocks) -> int:
        """The number of the worker for a prompt of these blocks. Raises `EngineDead` where no worker is there."""
        with self._lock:
            return self._router.choose(blocks)

    def joined(self, worker: int, ready: wire.Ready) -> None:
        """A worker is there; its cache events are followed where it publishes any."""
        with self._lock:
            self._router.joined(worker)
        if not wire.given(ready.kv_events_config):
            return
        try:
            config = wire.decode(ready.kv_events_config, KVEventsConfig)
            self._follow(worker, config, ready)
        except RadixgenError as error:
            logger.warning("requests are routed without the cache events of a worker: %s", error)

    def died(self, worker: int) -> None:
        """A worker is gone, and its requests with it."""
        with self._lock:
            self._router.died(worker)
        if self._subscriber is not None:
            self._subscriber.leave(worker)

    def sent(self, request_id: str, worker: int, blocks: Blocks, max_tokens: int | None) -> None:
        """A request was sent to a worker; nothing where that is gone."""
        expected = OUTPUT_TOKENS if max_tokens is None else min(max_tokens, OUTPUT_TOKENS)
        with self._lock:
            if worker in self._router.replicas:
                self._router.sent(request_id, worker, blocks, output_tokens=expected)

    def ended(self, request_id: str) -> None:
        """A request has ended, however it did. May be called twice."""
        with self._lock:
            self._router.ended(request_id)

    def close(self) -> None:
        if self._subscriber is not None:
            self._subscriber.close()

    def _follow(self, worker: int, config: KVEventsConfig, ready: wire.Ready) -> None:
        """Raises `InvalidRequest`, `InsecureEndpoint`."""
        if not config.enabled:
            return
        if config.block_size != self._router.block_size:
            limit = f"must be {self._router.block_size} for requests to be routed by it"
            raise InvalidRequest("block_size", config.block_size, limit)
        if self._subscriber is None:
            self._subscriber = KVSubscriber(self._apply)
        kv_tokens = ready.kv_cache_size_tokens or ready.num_gpu_blocks * ready.block_size
        self._subscriber.follow(worker, config, kv_tokens)

    def _apply(self, worker: Hashable, events: Sequence[Event]) -> None:
        assert isinstance(worker, int)
        for event in events:
            with self._lock:
                if isinstance(event, AllCleared):
                    self._router.cleared(worker)
                elif isinstance(event, BlocksStored):
                    self._router.stored(worker, event.block_hashes)
                else:
                    self._router.removed(worker, event.block_hashes)
