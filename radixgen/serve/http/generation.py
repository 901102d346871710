"""Generation for an accepted HTTP request: its outputs are merged, counted and timed, and aborted when it is closed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from msgspec import UNSET

from radixgen.cache import TokenArray
from radixgen.core import CacheHint, CompletionOutput, Grammar, GrammarFailed, HintResult, RequestOutput, SamplingParams
from radixgen.serve.http.backend import RequestStream
from radixgen.serve.http.cache_hints import answers_of
from radixgen.serve.http.context import Context
from radixgen.serve.http.errors import HTTPError, generation_failed
from radixgen.serve.http.metrics import Meter
from radixgen.serve.http.open_limit import OpenCount
from radixgen.serve.http.protocol import PromptTokensDetails, Usage

_LEAST_SECONDS = 1e-3
"""Timeout of a request that has exceeded its time limit before it is queued"""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts and parameters of a request, checked except for its grammar."""

    prompts: list[TokenArray]
    params: SamplingParams
    key_id: str
    namespace: str
    priority: int
    hints: tuple[CacheHint, ...] = ()


class Generation:
    """Open requests of all prompts of an HTTP request. Close it with `aclose`, or use it as a context manager."""

    @classmethod
    async def start(
        cls, context: Context, request: GenerationRequest, open_count: OpenCount, grammar: Grammar | None
    ) -> "Generation":
        """Queue all prompts, or none. Raises `InvalidRequest`, `QueueFull`, `EngineClosed`.

        open_count: kept until the generation is closed.
        grammar: compiled grammar of the request, referenced until the engine has taken it.
        """
        open_count.keep(len(request.prompts) * request.params.n)
        timeout = context.request_timeout
        if timeout is not None:
            timeout = max(timeout - open_count.age, _LEAST_SECONDS)
        open_one = partial(
            context.engine.open,
            params=request.params,
            priority=request.priority,
            namespace=request.namespace,
            timeout=timeout,
            cache_hints=request.hints,
            hint_owner=request.key_id or None,
        )
        tokens = sum(prompt.size for prompt in request.prompts)
        context.waiting.take(tokens, request.key_id)
        try:
            opened = await _all_or_none([open_one(prompt) for prompt in request.prompts])
        except BaseException:
            context.waiting.leave(tokens, request.key_id)
            raise
        return cls(context, request, opened, open_count)

    def __init__(
        self, context: Context, request: GenerationRequest, opened: Sequence[RequestStream], open_count: OpenCount
    ) -> None:
        meters = [Meter(context.metrics, open_count.begin) for _ in opened]
        self.request = request
        self._waiting = context.waiting
        self._silent = set(range(len(opened)))
        """Prompts without an output so far"""
        self.cached_tokens = [0] * len(opened)
        self._hint_results: tuple[HintResult, ...] = ()
        self._exact = True
        self._opened = opened
        self._open_count = open_count
        self._meters = meters

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield `(index of the prompt, output)`. Raises `HTTPError` if a sequence fails, and `EngineClosed`."""
        async with aclosing(merge(self._opened)) as merged:
            async for prompt, output in merged:
                self._mark_started(prompt)
                self._meters[prompt].see(output, time.monotonic())
                self.cached_tokens[prompt] = output.num_cached_tokens
                self._hint_results = output.cache_hints or self._hint_results
                self._exact = self._exact and output.exact
                for completion in output.outputs:
                    if completion.finish_reason == "error":
                        raise _failure(completion)
                yield prompt, output

    def usage(self) -> Usage:
        """Usage so far."""
        prompt_tokens = sum(prompt.size for prompt in self.request.prompts)
        completion_tokens = sum(meter.tokens for meter in self._meters)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                sum(self.cached_tokens), answers_of(self._hint_results) if self.request.hints else UNSET
            ),
            exact=UNSET if self._exact else False,
        )

    async def aclose(self) -> None:
        """Abort requests that have not finished. May be called twice."""
        self._open_count.leave()
        for prompt in [*self._silent]:
            self._mark_started(prompt)
        for stream in self._opened:
            await stream.aclose()

    def _mark_started(self, prompt: int) -> None:
        """Stop counting a prompt's tokens as waiting."""
        if prompt in self._silent:
            self._silent.discard(prompt)
            self._waiting.leave(self.request.prompts[prompt].size, self.request.key_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _all_or_none(opening: Sequence[Coroutine[Any, Any, RequestStream]]) -> list[RequestStream]:
    """Open all streams concurrently; if one raises, close the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in opening]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for opened in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(opened, BaseException):
                await opened.aclose()
        raise


async def merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """Yield `(index of the stream, output)` of all streams as outputs arrive. Deltas merge while the reader is slow."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(*pair)) for pair in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _failure(output: CompletionOutput) -> HTTPError:
    """Error for a sequence that failed: 400 if its grammar allowed no token, else 500."""
    reason = str(output.stop_reason)
    if reason.startswith(GrammarFailed.__name__):
        return HTTPError(400, f"the grammar could not be followed: {reason}", code="grammar_failed")
    return generation_failed(reason)
