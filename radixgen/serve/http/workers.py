"""`Workers`: a backend of workers behind their wire, for `serve --zmq` and `serve --data-parallel-size`.

Tokens cross the wire; text is made here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from radixgen.cache import TokenArray
from radixgen.core import (
    CompletionOutput,
    EngineDead,
    InvalidRequest,
    Limits,
    PromptTokens,
    RadixgenError,
    RequestOutput,
    SamplingParams,
    Stats,
    end_token,
)
from radixgen.detokenize import Detokenizer
from radixgen.engine import Progress
from radixgen.input_processor import InputProcessor
from radixgen.serve.client import AsyncClient, AsyncStream
from radixgen.serve.http.generation import merge
from radixgen.serve.http.totals import Totals
from radixgen.serve.replicas import ReplicaOptions, Replicas

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_START_SECONDS = 1_800.0
"""For replicas to load and warm up; one that ends meanwhile is not waited for"""
_PROMPT_TAIL = 16
"""Prompt tokens that the text of an answer is decoded after"""


class Workers:
    """The workers of `client`, which must be there. A request goes where the longest prefix of its prompt is, unless
    that worker is much busier.

    The sequences of a request are requests of the wire, to one worker: with a seed, that of sequence `i` is `seed + i`,
    as in vLLM.
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
        """replicas: the processes of these workers, where they are to end with this object."""
        ready = client.workers.values()
        self.model_name = model_name
        self.inputs = InputProcessor(
            tokenizer,
            vocab_size=len(tokenizer),
            max_model_len=min(one.max_model_len for one in ready),
            kv_tokens=min(one.kv_cache_size_tokens or one.max_model_len for one in ready),
            limits=limits or Limits(),
            eos_token_ids=frozenset(token for one in ready for token in one.eos_token_ids),
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
        self, prompt: TokenArray, params: SamplingParams, *, priority: int, namespace: str, timeout: float | None
    ) -> "_Answer":
        """Queue a request. Raises `InvalidRequest`, `QueueFull`, `EngineDead`."""
        tokens = prompt.tolist()
        streams: list[AsyncStream] = []
        try:
            for index in range(params.n):
                seed = None if params.seed is None else (params.seed + index) % 2**64
                own = replace(params, n=1, seed=seed, stop=())
                beside = streams[0] if streams else None
                streams.append(
                    await self._client.open(tokens, own, cache_salt=namespace, priority=priority, beside=beside)
                )
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        self._open += 1
        return _Answer(self, streams, params, tokens, timeout)

    async def warm_up(self, progress: Progress | None = None) -> None:
        """Workers are warm before they come."""

    async def stats(self) -> Stats:
        """Of all workers together."""
        told = {worker: await self._client.call("stats", worker=worker) for worker in self._client.workers}
        return self._totals.add({worker: one["engine"] for worker, one in told.items()})

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
        workers: Workers,
        streams: Sequence[AsyncStream],
        params: SamplingParams,
        prompt: list[int],
        timeout: float | None,
    ) -> None:
        self._workers = workers
        self._streams = streams
        self._merged = merge(streams)
        self._params = params
        self._texts = {index: _Text(workers.inputs, prompt[-_PROMPT_TAIL:], params) for index in range(params.n)}
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self._prompt = prompt
        self._cached = len(prompt)
        self._left = False

    async def __anext__(self) -> RequestOutput:
        while self._texts and not self._left:
            try:
                async with asyncio.timeout_at(self._deadline):
                    index, output = await anext(self._merged)
            except TimeoutError:
                return await self._expire()
            except RadixgenError:
                await self.aclose()
                raise
            self._workers.received()
            if index in self._texts:
                return await self._told(index, output)
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
        """Its streams are dropped with it."""
        if not self._left:
            self._leave()

    def _leave(self) -> None:
        self._left = True
        self._workers.ended()

    async def _told(self, index: int, output: RequestOutput) -> RequestOutput:
        """A sequence's output with its text."""
        one = replace(self._texts[index].read(output.outputs[0]), index=index)
        self._cached = min(self._cached, output.num_cached_tokens)
        if one.finish_reason is not None:
            del self._texts[index]
            await self._streams[index].aclose()  # a stop string ends it here, and not yet there
        if not self._texts:
            await self.aclose()
        return replace(output, outputs=[one], finished=not self._texts, num_cached_tokens=self._cached)

    async def _expire(self) -> RequestOutput:
        """The last output of a request whose time is over."""
        ones = [CompletionOutput(index, text.rest(), [], "abort", "deadline") for index, text in self._texts.items()]
        await self.aclose()
        return RequestOutput("", PromptTokens(self._prompt), ones, finished=True, num_cached_tokens=self._cached)


class _Text:
    """One sequence's tokens as text, up to its stop string."""

    def __init__(self, inputs: InputProcessor, tail: list[int], params: SamplingParams) -> None:
        own = inputs.eos_token_ids.union(params.end_token_ids)
        self._eos_token_ids = frozenset[int]() if params.ignore_eos else own
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = Detokenizer(
            inputs.tokenizer,
            tail,
            params.stop_strings,
            self._include_stop,
            params.skip_special_tokens,
            inputs.vocabulary,
        )
        self._min_tokens = params.min_tokens
        self._seen = 0
        self._told = 0

    def read(self, output: CompletionOutput) -> CompletionOutput:
        """`output` with its text. The text of a token that ended the sequence is left out, as that of a stop string."""
        tokens = output.token_ids
        silent = not self._include_stop and end_token(output, self._eos_token_ids) is not None
        for place, token in enumerate(tokens[:-1] if silent else tokens):
            self._seen += 1
            stop = self._detokenizer.push(token, self._seen > self._min_tokens)
            if stop is not None:
                logprobs = output.logprobs and output.logprobs[: place + 1]
                return replace(
                    output,
                    text=self._new(),
                    token_ids=tokens[: place + 1],
                    finish_reason="stop",
                    stop_reason=stop,
                    logprobs=logprobs,
                )
        return replace(output, text=self.rest() if output.finish_reason else self._new())

    def rest(self) -> str:
        """What was held back, where the sequence has ended."""
        self._detokenizer.finish()
        return self._new()

    def _new(self) -> str:
        told, self._told = self._told, self._detokenizer.safe_length
        return self._detokenizer.text[told : self._told]


def connect(
    address: str,
    *,
    model: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    workers: int = 1,
    limits: Limits | None = None,
    timeout: float = 600.0,
) -> Workers:
    """Bind at `address`, and wait for so many workers of `model`, for `timeout` seconds at the most. `tokenizer`: in
    place of the model's own.

    Raises `InvalidRequest`, `InsecureEndpoint`, and `EngineDead` where they don't come.
    """
    tokenizer = tokenizer or _tokenizer_of(model)
    client = AsyncClient(address, workers=workers, limits=limits, timeout=timeout, own_salts=True)
    try:
        asyncio.run(client.wait())
        return Workers(client, tokenizer, model_name=model, limits=limits)
    except BaseException:
        asyncio.run(client.close())
        raise


def start(
    options: ReplicaOptions,
    *,
    model: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limits: Limits | None = None,
) -> Workers:
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
        return Workers(client, tokenizer, model_name=model, limits=limits, replicas=replicas)
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
