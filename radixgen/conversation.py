"""Conversations with an `Engine`: turns of which each computes only its new tokens."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from radixgen.core import (
    EngineClosed,
    LimitReached,
    RequestOutput,
    SamplingParams,
    check_integer,
)
from radixgen.dialogue import (
    Dialogue,
    Outputs,
    Said,
    Serves,
    Turn,
)

logger = logging.getLogger(__name__)


class Conversation(Dialogue[Serves]):
    """A conversation with a model, for agents and chats. `Engine.conversation` makes one.

    ```python
    with engine.conversation("You are terse.", params=SamplingParams(max_tokens=32)) as talk:
        print(talk.say("What is the capital of France?").outputs[0].text)
        print(talk.say("And of Italy?").num_cached_tokens)
    ```

    Each turn computes its new tokens alone: what the model generated stays, token by token, and what came before is
    found in the cache, all of it but at most the last token. Options are those of `Dialogue`.
    """

    def say(
        self, message: Said = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> RequestOutput:
        """Say `message` (text is a user's; None: nothing more than was added) and have the whole answer.

        An answer cut short by `timeout` is kept as far as it got. Raises `InvalidRequest`, `ContextOverflow`,
        `QueueFull`, and `RequestFailed` where the answer failed; then the conversation is as before.
        """
        with self._stream(message, params, timeout, whole=True) as stream:
            for _ in stream:
                pass
        return stream.turn.result()

    def stream(
        self, message: Said = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> "TurnStream":
        """As `say`, but yields what each step adds. Leaving the iterator early ends the answer where it stands; that is
        kept, unless there is no token yet or it failed.
        """
        return self._stream(message, params, timeout, whole=False)

    def fork(self, n: int = 1) -> "list[Conversation]":
        """`n` more conversations that go on from here, each for itself. No KV is copied and nothing is computed. Raises
        `InvalidRequest`.
        """
        self._ensure_idle()
        check_integer("n", n, 1, self._inputs.limits.max_n)
        forks = [self._fork() for _ in range(n)]
        for fork in forks:
            fork._renew()
        return forks

    def preload(self) -> int:
        """Compute ahead what the next turn's prompt begins with: before the first turn system prompt and tools, after
        `load` or `Engine.reset_prefix_cache` the whole history. It is retained as after a turn. Returns its tokens.
        """
        self._ensure_idle()
        prefix = self._prefix()
        if prefix:
            (pin,) = self._engine.preload(
                [prefix], namespace=self.namespace, priority=self.priority, ttl=self._retain or None
            )
            self._release()
            self._pin = pin
            if self._retain == 0:
                self._release()
        return len(prefix)

    def close(self) -> None:
        """Let go of what is retained. What was said can still be read. May be called twice."""
        self._closed = True
        with suppress(EngineClosed):
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(
        self, message: Said, params: SamplingParams | None, timeout: float | None, *, whole: bool
    ) -> "TurnStream":
        self._claim()
        try:
            turn = self._begin(message, params)
            outputs = self._engine.stream(
                turn.draft.token_ids, turn.params, priority=self.priority, namespace=self.namespace, timeout=timeout
            )
        except BaseException:
            self._busy = False
            raise
        return TurnStream(self, turn, outputs, whole=whole)

    def _renew(self) -> None:
        """Retain the path as it is now, and no other."""
        if self._retain == 0 or self._closed:
            return
        try:
            self._pin = self._engine.pin(
                self.token_ids,
                namespace=self.namespace,
                priority=self.priority,
                ttl=self._retain,
                replaces=self._pin,
            )
        except (EngineClosed, LimitReached) as error:
            logger.info("a conversation is not retained: %s", error)
            self._pin = None

    def _release(self) -> None:
        if self._pin is not None:
            self._engine.unpin(self._pin)
            self._pin = None


class TurnStream(Iterator[RequestOutput]):
    """The answer of one turn, as it comes."""

    def __init__(self, talk: Conversation, turn: "Turn", outputs: Outputs, *, whole: bool) -> None:
        self.turn = turn
        self._talk = talk
        self._outputs = outputs
        self._keep = not whole
        self._open = True

    def __next__(self) -> RequestOutput:
        if not self._open:
            raise StopIteration
        output = next(self._outputs)
        self.turn.add(output)
        if output.finished:
            self._settle(keep=True)
        return output

    def close(self) -> None:
        """End the answer where it stands, if it has not ended."""
        if self._open:
            self._outputs.close()
            self._settle(keep=self._keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._open:  # the garbage collector may be in the middle of a step: nothing is pinned
            self._talk._settle(self.turn, keep=self._keep)

    def _settle(self, *, keep: bool) -> None:
        self._open = False
        if self._talk._settle(self.turn, keep=keep):
            self._talk._renew()
