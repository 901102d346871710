"""Worker backend for NVIDIA Dynamo: `radixgen worker --backend dynamo`; requires `radixgen[dynamo]`.

Dynamo's worker handles discovery, the request plane, signals and the grace period. Dynamo's frontend handles text: chat
templates, tokenization, stop strings. This module takes and returns token ids, publishes KV cache events for Dynamo's
router, and drains open requests on shutdown.
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.publisher import ComponentSnapshot, ZmqSource
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument

from radixgen.core import EngineClosed, InvalidRequest, Stats
from radixgen.core.settings import wait_without_spinning
from radixgen.engine.async_engine import AsyncEngine
from radixgen.engine.engine import Engine
from radixgen.model import smollm2
from radixgen.model.sampling_defaults import sampling_defaults
from radixgen.serve.dynamo.requests import Chunk, UsageCounter, check_adapter, chunks, sampling_params
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig

logger = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What a worker runs: options that it shares with all others, unlike those of Dynamo.

    engine: arguments of `Engine`.
    drain_timeout: seconds that open requests have to finish, after Dynamo's grace period. Dynamo drains after 5 s
        (`DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS`) and kills the process 35 s after the signal
        (`DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT`).
    profile, profile_steps: as for `Engine.profile`.
    """

    model: str = smollm2.NAME
    engine: Mapping[str, Any] = field(default_factory=dict)
    drain_timeout: float = 25.0
    profile: Path | None = None
    profile_steps: int = 10


class DynamoEngine(LLMEngine):  # type: ignore[misc]
    """`dynamo.common.backend.LLMEngine` on an `AsyncEngine`."""

    def __init__(self, launch: LaunchOptions, model: str, options: argparse.Namespace) -> None:
        """model: name or path to load. options: those of Dynamo."""
        self._launch = launch
        self._model = model
        self._options = options
        self._engine: AsyncEngine | None = None
        self._events: KVEvents | None = None
        self._snapshots: asyncio.Task[None] | None = None
        self._publisher: Any = None
        self._room = 0
        """Maximum length of a prompt plus its output, in tokens"""
        self._defaults: dict[str, Any] = {}
        """Default fields of `SamplingParams`"""
        self._open: dict[str, set[str]] = {}
        """Engine request ids for each of Dynamo's request ids, which clients may choose and reuse"""
        self._serial = count(1)

    @classmethod
    async def from_args(
        cls, argv: list[str] | None = None, launch: LaunchOptions = LaunchOptions()
    ) -> tuple[Self, Any]:
        """Create an engine that is not loaded yet, and the `WorkerConfig` for Dynamo. argv: options of Dynamo."""
        options, model = _parser().parse_args(argv), launch.model
        options.served_model_name = options.served_model_name or model
        if model == smollm2.NAME:
            model = str(await asyncio.to_thread(smollm2.fetch))
        config = WorkerConfig(
            namespace=options.namespace,
            component=options.component,
            endpoint=options.endpoint,
            model_name=model,
            served_model_name=options.served_model_name,
            endpoint_types="chat,completions",
            discovery_backend=options.discovery_backend,
            request_plane=options.request_plane,
            event_plane=options.event_plane,
        )
        return cls(launch, model, options), config

    async def start(self, worker_id: int) -> Any:
        """Load the model. Returns the `EngineConfig` that Dynamo registers."""
        del worker_id
        options = self._options
        self._defaults = await asyncio.to_thread(sampling_defaults, self._model, options.generation_config)
        inner = await asyncio.to_thread(Engine, self._model, **self._launch.engine)
        if self._launch.profile is not None:
            inner.profile(self._launch.profile, self._launch.profile_steps)
        slots = inner.stats().kv_tokens_total
        self._room = min(inner.max_model_len, slots)
        self._text_of = lambda token: inner.decode([token])
        self._engine = AsyncEngine(inner)
        config = KVEventsConfig(endpoint=options.kv_events_endpoint, block_size=options.block_size)
        self._events = KVEvents(self._engine, config)
        self._snapshots = asyncio.create_task(self._tell_snapshots(self._engine))
        return EngineConfig(
            model=self._model,
            served_model_name=options.served_model_name,
            llm=LlmRegistration(
                context_length=self._room,
                kv_cache_block_size=options.block_size,
                total_kv_blocks=slots // options.block_size,
                max_num_seqs=inner.limits.max_num_seqs,
                max_num_batched_tokens=inner.max_step_tokens,
            ),
        )

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of one request. Raises Dynamo's `InvalidArgument` and `EngineShutdown`."""
        engine, name = self._engine, context.id()
        if engine is None:
            raise EngineShutdown("the engine is closed")
        own = f"dynamo-{next(self._serial)}"
        self._open.setdefault(name, set()).add(own)
        try:
            check_adapter(request, (self._options.served_model_name, self._model))
            prompt = request["token_ids"]
            params = sampling_params(request, self._room - len(prompt), self._defaults)
            usage = UsageCounter(len(prompt))
            async with aclosing(engine.generate(prompt, params, request_id=own)) as outputs:
                async for output in outputs:
                    for chunk in chunks(output, usage, self._text_of):
                        yield chunk
        except InvalidRequest as error:
            raise InvalidArgument(str(error)) from error
        except EngineClosed as error:
            raise EngineShutdown(str(error)) from error
        finally:
            self._open[name].discard(own)
            if not self._open[name]:
                del self._open[name]

    async def abort(self, context: Any) -> None:
        """Abort the requests with this id; their last chunk has the finish reason `cancelled`."""
        for own in list(self._open.get(context.id(), ())):
            if self._engine is not None:
                await self._engine.abort(own)

    async def cleanup(self) -> None:
        """Wait up to `drain_timeout` seconds for open requests to finish, then close the engine.

        May be called twice, and after a failed `start`.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._launch.drain_timeout):
                while self._open:
                    await asyncio.sleep(0.05)
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            snapshots.cancel()
        events, self._events = self._events, None
        if events is not None:
            await asyncio.to_thread(events.close)
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    # -- for the router and for metrics -------------------------------------------------------------------

    async def kv_event_sources(self) -> list[Any]:
        """Sources of KV cache events that Dynamo's worker subscribes to."""
        return [ZmqSource(endpoint=self._events.endpoint)] if self._events is not None else []

    def component_metrics_dp_ranks(self) -> list[int]:
        """Data-parallel ranks that publish metrics: one."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Set the publisher of KV cache usage and hit rate. Called from a thread of Dynamo's."""
        self._publisher = publisher

    async def _tell_snapshots(self, engine: AsyncEngine) -> None:
        try:
            while True:
                if self._publisher is not None:
                    self._publisher.publish(0, self._snapshot(await engine.stats()))
                await asyncio.sleep(_SNAPSHOT_SECONDS)
        except EngineClosed:
            return
        except Exception:
            logger.exception("KV cache usage is no longer published to Dynamo")

    def _snapshot(self, stats: Stats) -> Any:
        size = self._options.block_size
        return ComponentSnapshot(
            kv_used_blocks=stats.kv_tokens_used // size,
            kv_total_blocks=stats.kv_tokens_total // size,
            gpu_cache_usage=stats.kv_tokens_used / stats.kv_tokens_total,
            dp_rank=0,
            kv_cache_hit_rate=stats.cached_prompt_tokens / stats.prompt_tokens if stats.prompt_tokens else None,
        )


def main(launch: LaunchOptions, argv: list[str]) -> None:
    """Run until Dynamo's worker stops. argv: options of Dynamo."""
    wait_without_spinning()
    run(DynamoEngine, argv, partial(DynamoEngine.from_args, launch=launch))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("radixgen worker --backend dynamo", description=__doc__)
    parser.add_argument("--served-model-name", help="model name in the API; default: --model")
    parser.add_argument(
        "--generation-config",
        default="auto",
        help="sampling defaults: auto (the model's), vllm (none) or a path",
    )
    parser.add_argument("--block-size", type=int, default=16, help="block size of KV cache events, in tokens")
    endpoint = "address to publish KV cache events on; port * picks a free port"
    parser.add_argument("--kv-events-endpoint", default="tcp://127.0.0.1:*", help=endpoint)
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument("--endpoint", default="generate")
    parser.add_argument("--discovery-backend", default="etcd", choices=["etcd", "file", "mem", "kubernetes"])
    parser.add_argument("--request-plane", default="tcp", choices=["tcp", "nats", "http"])
    parser.add_argument("--event-plane", choices=["nats", "zmq"])
    return parser
