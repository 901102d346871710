"""Conversations with an `AsyncEngine`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from radixgen.chat.dialogue import (
    AsyncConversationEngine,
    Dialogue,
    Turn,
    TurnMessages,
)
from radixgen.core import (
    EngineClosed,
    LimitReached,
    RequestOutput,
    SamplingParams,
    check_integer,
)

logger = logging.getLogger(__name__)


class AsyncConversation(Dialogue[AsyncConversationEngine]):
    """`Conversation` for coroutines. Created by `AsyncEngine.conversation`; options are those of `Dialogue`."""

    async def say(
        self, message: TurnMessages = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> RequestOutput:
        """As `Conversation.say`. If it is cancelled, the conversation is unchanged."""
        self._claim()
        async with AsyncTurnStream(self, message, params, timeout, whole=True) as stream:
            async for _ in stream:
                pass
        return stream.result()

    def stream(
        self, message: TurnMessages = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> "AsyncTurnStream":
        """As `Conversation.stream`. Errors of the turn are raised with its first output."""
        self._claim()
        return AsyncTurnStream(self, message, params, timeout, whole=False)

    async def fork(self, n: int = 1) -> "list[AsyncConversation]":
        """As `Conversation.fork`."""
        self._ensure_idle()
        check_integer("n", n, 1, self._inputs.limits.max_n)
        forks = [self._fork() for _ in range(n)]
        for fork in forks:
            await fork._renew()
        return forks

    async def preload(self) -> int:
        """As `Conversation.preload`."""
        self._claim()
        try:
            prefix = await asyncio.to_thread(self._prefix)
            if prefix:
                (pin,) = await self._engine.preload(
                    [prefix],
                    namespace=self.namespace,
                    priority=self.priority,
                    ttl=self._retain or None,
                    reading=self.params.reading,
                )
                old, self._pin = self._pin, pin
                if old is not None:
                    await self._engine.unpin(old)
                if self._retain == 0 or self._closed:
                    await self._release()
        finally:
            self._busy = False
        return len(prefix)

    async def close(self) -> None:
        """As `Conversation.close`."""
        self._closed = True
        with suppress(EngineClosed):
            await self._release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _renew(self) -> None:
        """Pin the current path in place of the previous one, and demote what it left behind, even if the caller is
        cancelled meanwhile.
        """
        if self._closed:
            return
        if self._retain != 0:
            await asyncio.shield(self._repin())
        superseded, self._superseded = self._superseded, None
        if superseded is not None:
            with suppress(EngineClosed):
                await self._engine.apply_hints(*superseded, namespace=self.namespace)

    async def _repin(self) -> None:
        pin, self._pin = self._pin, None
        try:
            self._pin = await self._engine.pin(
                self.token_ids,
                namespace=self.namespace,
                priority=self.priority,
                ttl=self._retain,
                reading=self.params.reading,
                replaces=pin,
            )
        except (EngineClosed, LimitReached) as error:
            logger.info("a conversation is not retained: %s", error)
        if self._closed:
            await self._release()

    async def _release(self) -> None:
        pin, self._pin = self._pin, None
        if pin is not None:
            await self._engine.unpin(pin)


class AsyncTurnStream(AsyncIterator[RequestOutput]):
    """`TurnStream` for coroutines. The turn starts when the first output is awaited."""

    def __init__(
        self,
        talk: AsyncConversation,
        message: TurnMessages,
        params: SamplingParams | None,
        timeout: float | None,
        *,
        whole: bool,
    ) -> None:
        self._talk = talk
        self._arguments = message, params, timeout
        self._keep = not whole
        self._turn: Turn | None = None
        self._outputs: AsyncGenerator[RequestOutput, None] | None = None
        self._open = True

    def result(self) -> RequestOutput:
        """The whole answer. Raises `RequestFailed`."""
        assert self._turn is not None, "the turn has not begun"
        return self._turn.result()

    async def __anext__(self) -> RequestOutput:
        if not self._open:
            raise StopAsyncIteration
        try:
            if self._outputs is None:
                self._outputs = await self._begin()
            output = await anext(self._outputs)
        except BaseException as error:
            self._settle(keep=self._keep and isinstance(error, asyncio.CancelledError))
            raise
        assert self._turn is not None
        self._turn.add(output)
        if output.finished and self._settle(keep=True):
            await self._talk._renew()
        return output

    async def aclose(self) -> None:
        """Abort the answer unless it has finished."""
        if not self._open:
            return
        if self._outputs is not None:
            await self._outputs.aclose()
        if self._settle(keep=self._keep):
            await self._talk._renew()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._settle(keep=self._keep)

    async def _begin(self) -> AsyncGenerator[RequestOutput, None]:
        message, params, timeout = self._arguments
        talk = self._talk
        self._turn = turn = await asyncio.to_thread(talk._begin, message, params)
        return talk._engine.generate(
            turn.draft.token_ids, turn.params, priority=talk.priority, namespace=talk.namespace, timeout=timeout
        )

    def _settle(self, *, keep: bool) -> bool:
        """As `Dialogue._settle`, once."""
        if not self._open:
            return False
        self._open = False
        return self._talk._settle(self._turn, keep=keep)
