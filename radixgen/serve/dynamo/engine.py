"""Worker backend for NVIDIA Dynamo: `radixgen worker --backend dynamo`; requires `radixgen[dynamo]`.

Dynamo's worker handles discovery, the request plane, signals and the grace period. Dynamo's frontend handles text: chat
templates, tokenization, stop strings. This module takes and returns token ids, publishes KV cache events for Dynamo's
router, and drains open requests on shutdown.
"""

import argparse
import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from itertools import count
from typing import Any, Self

from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
from dynamo.common.backend.publisher import ComponentSnapshot, ZmqSource
from dynamo.common.backend.run import run
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument

from radixgen.core import EngineClosed, InvalidRequest, Limits, Stats
from radixgen.core.settings import wait_without_spinning
from radixgen.engine.async_engine import AsyncEngine
from radixgen.engine.engine import Engine
from radixgen.model import smollm2
from radixgen.model.sampling_defaults import sampling_defaults
from radixgen.serve.dynamo.requests import Chunk, UsageCounter, check_adapter, chunks, sampling_params
from radixgen.serve.zmq.kv_events import KVEvents, KVEventsConfig

logger = logging.getLogger(__name__)

_SNAPSHOT_SECONDS = 0.5
_DRAIN_HELP = "seconds that open requests have to finish, after Dynamo's grace period"
"""Dynamo drains after 5 s (`DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS`) and kills the process 35 s after the signal
(`DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT`).
"""


class DynamoEngine(LLMEngine):  # type: ignore[misc]
    """`dynamo.common.backend.LLMEngine` on an `AsyncEngine`."""

    def __init__(self, options: argparse.Namespace) -> None:
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
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Self, Any]:
        """Create an engine that is not loaded yet, and the `WorkerConfig` for Dynamo."""
        options = _parser().parse_args(argv)
        options.served_model_name = options.served_model_name or options.model
        if options.model == smollm2.NAME:
            options.model = str(await asyncio.to_thread(smollm2.fetch))
        config = WorkerConfig(
            namespace=options.namespace,
            component=options.component,
            endpoint=options.endpoint,
            model_name=options.model,
            served_model_name=options.served_model_name,
            endpoint_types="chat,completions",
            discovery_backend=options.discovery_backend,
            request_plane=options.request_plane,
            event_plane=options.event_plane,
        )
        return cls(options), config

    async def start(self, worker_id: int) -> Any:
        """Load the model. Returns the `EngineConfig` that Dynamo registers."""
        del worker_id
        options = self._options
        self._defaults = await asyncio.to_thread(sampling_defaults, options.model, options.generation_config)
        inner = await asyncio.to_thread(
            Engine,
            options.model,
            load_format=options.load_format,
            dtype=options.dtype,
            kv_dtype=options.kv_dtype,
            device=options.device,
            tensor_parallel_size=options.tensor_parallel_size,
            kv_tokens=options.kv_tokens,
            kv_offloading_size=options.kv_offloading_size,
            kv_dir=options.kv_dir,
            kv_dir_bytes=options.kv_dir_bytes,
            max_model_len=options.max_model_len,
            max_step_tokens=options.max_num_batched_tokens,
            enforce_eager=options.enforce_eager,
            warm_up=options.warm_up,
            seed=options.seed,
            limits=Limits(max_num_seqs=options.max_num_seqs),
        )
        if options.profile is not None:
            inner.profile(options.profile, options.profile_steps)
        slots = inner.stats().kv_tokens_total
        self._room = min(inner.max_model_len, slots)
        self._text_of = lambda token: inner.decode([token])
        self._engine = AsyncEngine(inner)
        config = KVEventsConfig(endpoint=options.kv_events_endpoint, block_size=options.block_size)
        self._events = KVEvents(self._engine, config)
        self._snapshots = asyncio.create_task(self._tell_snapshots(self._engine))
        return EngineConfig(
            model=options.model,
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
            check_adapter(request, (self._options.served_model_name, self._options.model))
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
        """Wait up to `--drain-timeout` seconds for open requests to finish, then close the engine.

        May be called twice, and after a failed `start`.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_timeout):
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


def main(argv: list[str] | None = None) -> None:
    """Run until Dynamo's worker stops."""
    wait_without_spinning()
    run(DynamoEngine, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("radixgen worker --backend dynamo", description=__doc__)
    parser.add_argument("--model", default=smollm2.NAME, help="model: smollm2, a directory or a hub id")
    parser.add_argument("--served-model-name", help="model name in the API; default: --model")
    parser.add_argument("--load-format", default="auto", help="weights: auto (read the checkpoint) or dummy (random)")
    parser.add_argument("--dtype", default="auto", help="data type: auto, float32, bfloat16 or float16")
    parser.add_argument("--kv-dtype", default="auto", help="data type of the KV cache: auto, int8 or fp8 (on GPUs)")
    parser.add_argument("--device", default="auto", help="device: auto, cpu or cuda")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="number of processes to shard the model over"
    )
    parser.add_argument("--kv-tokens", type=int, help="size of the KV cache, in tokens")
    parser.add_argument(
        "--kv-offloading-size", type=float, default=0.0, help="host memory for KV that the KV cache evicts, in GiB"
    )
    parser.add_argument("--kv-dir", help="keep KV on disk here, also for later starts")
    parser.add_argument("--kv-dir-bytes", type=int, help="maximum size of --kv-dir, in bytes")
    parser.add_argument("--max-model-len", type=int, help="maximum length of prompt plus output, in tokens")
    parser.add_argument(
        "--max-num-seqs", type=int, default=Limits().max_num_seqs, help="maximum number of running sequences"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, help="maximum number of tokens per step")
    parser.add_argument("--enforce-eager", action="store_true", help="disable model compilation and CUDA graphs")
    warm_up = "compile and capture before accepting requests; default: on a GPU"
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, help=warm_up)
    parser.add_argument("--seed", type=int, default=0, help="default sampling seed")
    profile = "write a torch profiler trace of the first steps to this directory"
    parser.add_argument("--profile", metavar="DIR", help=profile)
    parser.add_argument("--profile-steps", type=int, default=10, help="number of steps in the trace of --profile")
    parser.add_argument(
        "--generation-config",
        default="auto",
        help="sampling defaults: auto (the model's), vllm (none) or a path",
    )
    parser.add_argument("--block-size", type=int, default=16, help="block size of KV cache events, in tokens")
    endpoint = "address to publish KV cache events on; port * picks a free port"
    parser.add_argument("--kv-events-endpoint", default="tcp://127.0.0.1:*", help=endpoint)
    parser.add_argument("--drain-timeout", type=float, default=25.0, help=_DRAIN_HELP)
    parser.add_argument("--namespace", default="dynamo")
    parser.add_argument("--component", default="backend")
    parser.add_argument("--endpoint", default="generate")
    parser.add_argument("--discovery-backend", default="etcd", choices=["etcd", "file", "mem", "kubernetes"])
    parser.add_argument("--request-plane", default="tcp", choices=["tcp", "nats", "http"])
    parser.add_argument("--event-plane", choices=["nats", "zmq"])
    return parser
