"""An accepted HTTP request: its prompts' outputs as they come, counted, timed, and aborted when it is left."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from radixgen.cache import TokenArray
from radixgen.core import CompletionOutput, Grammar, GrammarFailed, RequestOutput, SamplingParams
from radixgen.serve.http.admission import Ticket
from radixgen.serve.http.backend import Outputs
from radixgen.serve.http.context import Context
from radixgen.serve.http.errors import Refused, failed
from radixgen.serve.http.metrics import Meter
from radixgen.serve.http.protocol import PromptTokensDetails, Usage

_LEAST_SECONDS = 1e-3
"""What a request has left whose time was over before it could be queued: it ends like any that took too long."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be generated. Checked, but for its grammar."""

    prompts: list[TokenArray]
    params: SamplingParams
    tenant: str
    namespace: str
    priority: int


class Generation:
    """Yields `(index of the prompt, output)` of all prompts as they come. Leave it by `aclose`, or as a context."""

    @classmethod
    async def start(cls, context: Context, asked: Asked, ticket: Ticket, grammar: Grammar | None) -> "Generation":
        """Queue all prompts, or none; then it keeps the ticket. Raises `InvalidRequest`, `QueueFull`, `EngineClosed`.

        grammar: what was compiled for `asked`, held until the engine has it.
        """
        ticket.keep(len(asked.prompts) * asked.params.n)
        timeout = None if context.request_timeout is None else max(context.request_timeout - ticket.age, _LEAST_SECONDS)
        open_one = partial(
            context.engine.open,
            params=asked.params,
            priority=asked.priority,
            namespace=asked.namespace,
            timeout=timeout,
        )
        tokens = sum(prompt.size for prompt in asked.prompts)
        context.waiting.take(tokens, asked.tenant)
        try:
            opened = await _all_or_none([open_one(prompt) for prompt in asked.prompts])
        except BaseException:
            context.waiting.leave(tokens, asked.tenant)
            raise
        return cls(context, asked, opened, ticket)

    def __init__(self, context: Context, asked: Asked, opened: Sequence[Outputs], ticket: Ticket) -> None:
        meters = [Meter(context.metrics, ticket.begin) for _ in opened]
        self.asked = asked
        self._waiting = context.waiting
        self._silent = set(range(len(opened)))
        """Prompts of which nothing has come"""
        self.cached_tokens = [0] * len(opened)
        self._opened = opened
        self._ticket = ticket
        self._meters = meters

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Raises `Refused` where a sequence fails, `EngineClosed` where the engine does."""
        async with aclosing(merge(self._opened)) as merged:
            async for prompt, output in merged:
                self._begun(prompt)
                self._meters[prompt].see(output, time.monotonic())
                self.cached_tokens[prompt] = output.num_cached_tokens
                for one in output.outputs:
                    if one.finish_reason == "error":
                        raise _failure(one)
                yield prompt, output

    def usage(self) -> Usage:
        """Of what came until now."""
        prompt_tokens = sum(prompt.size for prompt in self.asked.prompts)
        completion_tokens = sum(meter.tokens for meter in self._meters)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self.cached_tokens)),
        )

    async def aclose(self) -> None:
        """Abort what has not ended. May be called twice."""
        self._ticket.leave()
        for prompt in [*self._silent]:
            self._begun(prompt)
        for one in self._opened:
            await one.aclose()

    def _begun(self, prompt: int) -> None:
        if prompt in self._silent:
            self._silent.discard(prompt)
            self._waiting.leave(self.asked.prompts[prompt].size, self.asked.tenant)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _all_or_none(opening: Sequence[Coroutine[Any, Any, Outputs]]) -> list[Outputs]:
    """What all of them open, at the same time; where one raises, the others are closed."""
    tasks = [asyncio.create_task(one) for one in opening]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for opened in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(opened, BaseException):
                await opened.aclose()
        raise


async def merge(streams: Sequence[Outputs]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of all as they come. A slow reader holds back those who write, and the engine then merges deltas."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: Outputs) -> None:
        try:
            async for output in stream:
                await queue.put((index, output))
        except Exception as error:
            await queue.put((index, error))
        else:
            await queue.put((index, None))

    tasks = [asyncio.create_task(pump(*pair)) for pair in enumerate(streams)]
    try:
        going = len(tasks)
        while going:
            index, item = await queue.get()
            if item is None:
                going -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _failure(output: CompletionOutput) -> Refused:
    """Where no token fits a grammar, that is the caller's to mend."""
    reason = str(output.stop_reason)
    if reason.startswith(GrammarFailed.__name__):
        return Refused(400, f"the grammar could not be followed: {reason}", code="grammar_failed")
    return failed(reason)
