"""`WorkerBackend`: a backend over workers, for `serve --zmq` and `serve --data-parallel-size`.

Workers get and return tokens; text is made here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from radixgen.cache import TokenArray
from radixgen.core import (
    CacheHint,
    EngineDead,
    FinishReason,
    HintResult,
    InvalidRequest,
    Limits,
    RadixgenError,
    RequestOutput,
    SamplingParams,
    SamplingState,
    Stats,
    end_token,
)
from radixgen.core.reading import EXACT
from radixgen.engine.input_processor import InputProcessor
from radixgen.engine.output_processor import OutputProcessor
from radixgen.engine.request_loop import Progress
from radixgen.scheduler.sequence import Request, Sequence
from radixgen.serve.http.generation import merge
from radixgen.serve.http.totals import Totals
from radixgen.serve.replicas import ReplicaOptions, Replicas
from radixgen.serve.zmq.client import AsyncClient, AsyncStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_START_SECONDS = 1_800.0
"""For replicas to load and warm up; one that ends meanwhile is not waited for"""


class WorkerBackend:
    """Front end over the workers of `client`, which must have connected. A request goes to the worker with the longest
    prefix of its prompt, unless that worker is much busier than another.

    Each sequence of a request is a request on the wire, all to one worker. With a seed, sequence `i` has `seed + i`, as
    in vLLM.
    """

    def __init__(
        self,
        client: AsyncClient,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        model_name: str,
        limits: Limits | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        """replicas: processes of these workers that end with this object."""
        ready = client.workers.values()
        self.model_name = model_name
        self.inputs = InputProcessor(
            tokenizer,
            vocab_size=len(tokenizer),
            max_model_len=min(worker.max_model_len for worker in ready),
            kv_tokens=min(worker.kv_cache_size_tokens or worker.max_model_len for worker in ready),
            limits=limits or Limits(),
            eos_token_ids=frozenset(token for worker in ready for token in worker.eos_token_ids),
        )
        self._client = client
        self._replicas = replicas
        self._totals = Totals()
        self._closed = False
        self._received = 0
        self._open = 0

    @property
    def progress(self) -> tuple[int, bool]:
        """Outputs received, and whether more are awaited."""
        return self._received, self._open > 0

    @property
    def closed(self) -> bool:
        """Whether no worker is there."""
        return self._closed or not self._client.workers

    async def open(
        self,
        prompt: TokenArray,
        params: SamplingParams,
        *,
        priority: int,
        namespace: str,
        timeout: float | None,
        cache_hints: Seq[CacheHint] = (),
        hint_owner: str | None = None,
    ) -> "_Answer":
        """Queue a request. Its hints go with its first sequence. Raises `InvalidRequest`, `QueueFull`, `EngineDead`."""
        tokens = prompt.tolist()
        streams: list[AsyncStream] = []
        try:
            for index in range(params.n):
                seed = None if params.seed is None else (params.seed + index) % 2**64
                own = replace(params, n=1, seed=seed, stop=())
                beside = streams[0] if streams else None
                stream = await self._client.open(
                    tokens,
                    own,
                    cache_salt=namespace,
                    priority=priority,
                    beside=beside,
                    cache_hints=() if streams else cache_hints,
                    hint_owner=hint_owner,
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        self._open += 1
        return _Answer(self, streams, params, prompt, timeout)

    async def score_continuation(
        self, prompt: TokenArray, continuation: TokenArray, *, namespace: str
    ) -> RequestOutput:
        """Raise `InvalidRequest`: scores are not on the wire."""
        raise InvalidRequest("path", "/v1/score", "is not supported in front of workers")

    async def apply_hints(
        self, prompt: TokenArray, hints: Seq[CacheHint], *, namespace: str, hint_owner: str | None
    ) -> tuple[HintResult, ...]:
        """Apply cache hints on the worker that a request with this prompt would go to."""
        return await self._client.apply_hints(prompt.tolist(), hints, cache_salt=namespace, hint_owner=hint_owner)

    async def warm_up(self, progress: Progress | None = None) -> None:
        """Workers are warm before they come."""

    async def stats(self) -> Stats:
        """Of all workers together."""
        stats = {worker: await self._client.call("stats", worker=worker) for worker in self._client.workers}
        return self._totals.add({worker: own["engine"] for worker, own in stats.items()})

    async def reset_prefix_cache(self) -> int:
        """Tokens dropped, where nothing else went on."""
        before = (await self.stats()).kv_tokens_cached
        for worker in self._client.workers:
            await self._client.call("reset_prefix_cache", worker=worker)
        return max(before - (await self.stats()).kv_tokens_cached, 0)

    async def close(self) -> None:
        """Open requests are aborted. Replicas end; other workers go on, for others."""
        self._closed = True
        await self._client.close()
        if self._replicas is not None:
            await asyncio.to_thread(self._replicas.close)

    def received(self) -> None:
        self._received += 1

    def ended(self) -> None:
        self._open -= 1


class _Answer(AsyncIterator[RequestOutput]):
    """The sequences of one request, each a stream, as one."""

    def __init__(
        self,
        backend: WorkerBackend,
        streams: Seq[AsyncStream],
        params: SamplingParams,
        prompt: TokenArray,
        timeout: float | None,
    ) -> None:
        self._backend = backend
        self._streams = streams
        self._merged = merge(streams)
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._request = _mirror(params, prompt, backend.inputs.eos_token_ids)
        self._processor = OutputProcessor(backend.inputs.vocabulary)
        self._fault = self._processor.follow(self._request, "delta")
        self._left = False

    async def __anext__(self) -> RequestOutput:
        if self._fault is not None:
            return await self._finish("error", self._fault)
        while not self._request.finished and not self._left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, output = await anext(self._merged)
            except TimeoutError:
                return await self._finish("abort", "deadline")
            except RadixgenError:
                await self.aclose()
                raise
            self._backend.received()
            sequence = self._request.sequences[index]
            if sequence.finish_reason is None:
                _take(sequence, output)
                return await self._process([sequence])
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort what has not ended. May be called twice."""
        if self._left:
            return
        self._leave()
        for stream in self._streams:
            await stream.aclose()
        await self._merged.aclose()

    def __del__(self) -> None:
        """Count the request as ended. Its streams are dropped with it."""
        if not self._left:
            self._leave()

    def _leave(self) -> None:
        self._left = True
        self._backend.ended()

    async def _process(self, touched: list[Sequence]) -> RequestOutput:
        """Make the output of new tokens. Close the streams of sequences that end here, at a stop string or an error."""
        (output,), to_abort = self._processor.process(touched)
        for sequence in to_abort:
            await self._streams[sequence.index].aclose()
        if output.finished:
            await self.aclose()
        return output

    async def _finish(self, reason: FinishReason, stop_reason: str) -> RequestOutput:
        """Make the last output of a request that ends in this process instead of at its worker."""
        self._fault = None
        live = [sequence for sequence in self._request.sequences if sequence.finish_reason is None]
        for sequence in live:
            sequence.finish(reason, stop_reason)
        return await self._process(live)


def _mirror(params: SamplingParams, prompt: TokenArray, eos_token_ids: frozenset[int]) -> Request:
    """Make a copy of the worker's request, before its first output."""
    reading = params.reading or EXACT
    request = Request("", 0, prompt, params, params.max_tokens, reading=reading, num_cached_tokens=prompt.size)
    ends = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        ends |= eos_token_ids.union(params.end_token_ids)
    for index in range(params.n):
        request.add_sequence(Sequence(request, index, "", SamplingState(params, 0, index, prompt, [], ends)))
    return request


def _take(sequence: Sequence, output: RequestOutput) -> None:
    """Add what came of a sequence."""
    request, (new,) = sequence.request, output.outputs
    request.num_cached_tokens = min(request.num_cached_tokens or 0, output.num_cached_tokens)
    request.hint_results = output.cache_hints or request.hint_results
    if output.prompt_logprobs is not None:
        request.prompt_logprobs = [logprobs for logprobs in output.prompt_logprobs if logprobs is not None]
    sequence.output += new.token_ids
    sequence.logprobs += new.logprobs or []
    if new.finish_reason is not None:
        sequence.ended_by_token = end_token(new, sequence.sampling.stop_ids) is not None
        sequence.finish(new.finish_reason, new.stop_reason)


def connect(
    address: str,
    *,
    model: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    workers: int = 1,
    limits: Limits | None = None,
    timeout: float = 600.0,
) -> WorkerBackend:
    """Bind at `address`, and wait up to `timeout` seconds for `workers` workers of `model`. `tokenizer` replaces the
    model's own.

    Raises `InvalidRequest`, `InsecureEndpoint`, and `EngineDead` if they do not connect.
    """
    tokenizer = tokenizer or _tokenizer_of(model)
    client = AsyncClient(address, workers=workers, limits=limits, timeout=timeout, own_salts=True)
    try:
        asyncio.run(client.wait())
        return WorkerBackend(client, tokenizer, model_name=model, limits=limits)
    except BaseException:
        asyncio.run(client.close())
        raise


def start(
    options: ReplicaOptions,
    *,
    model: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limits: Limits | None = None,
) -> WorkerBackend:
    """Start replicas of `model`, and wait until all are warm. One that dies later is not started again: the others
    serve on, until none is left.

    Raises `InvalidRequest`, and `EngineDead` where one ends before it serves.
    """
    environments = options.environments()
    tokenizer = tokenizer or _tokenizer_of(model)
    client = AsyncClient(workers=options.count, limits=limits, timeout=_START_SECONDS, own_salts=True)
    replicas: Replicas | None = None
    started = False

    def on_death(what: str) -> None:
        if started:
            logger.critical("%s, and is not started again: its requests ended with an error", what)
        else:
            client.fail(EngineDead(f"{what} before it served; what it wrote says why"))

    try:
        commands = [options.command(client.address, index) for index in range(options.count)]
        replicas = Replicas(commands, environments, on_death)
        asyncio.run(client.wait())
        started = True
        return WorkerBackend(client, tokenizer, model_name=model, limits=limits, replicas=replicas)
    except BaseException:
        asyncio.run(client.close())
        if replicas is not None:
            replicas.close()
        raise


def _tokenizer_of(model: str) -> "PreTrainedTokenizerBase":
    """Raises `InvalidRequest` where it has none."""
    from radixgen.model.loader import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise InvalidRequest("model", model, "has no tokenizer")
    return tokenizer
