"""Conversations with an `Engine`, in which each turn computes only its new tokens."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from radixgen.chat.dialogue import (
    ConversationEngine,
    Dialogue,
    Turn,
    TurnMessages,
    TurnOutputs,
)
from radixgen.core import (
    EngineClosed,
    LimitReached,
    RequestOutput,
    SamplingParams,
    check_integer,
)

logger = logging.getLogger(__name__)


class Conversation(Dialogue[ConversationEngine]):
    """Conversation with a model, for agents and chats. Created by `Engine.conversation`.

    ```python
    with engine.conversation("You are terse.", params=SamplingParams(max_tokens=32)) as talk:
        print(talk.say("What is the capital of France?").outputs[0].text)
        print(talk.say("And of Italy?").num_cached_tokens)
    ```

    Each turn computes only its new tokens: generated tokens are kept exactly, and all previous tokens but at most the
    last are cached. Options are those of `Dialogue`.
    """

    def say(
        self, message: TurnMessages = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> RequestOutput:
        """Send a message and return the whole answer.

        message: text of a user, a message or a list of messages; None if `add` has added them.
        params: sampling parameters of this turn.
        timeout: seconds until the answer is aborted; what was generated is kept.

        Raises `InvalidRequest`, `ContextOverflow`, `QueueFull`, and `RequestFailed` if the answer failed, which leaves
        the conversation unchanged.
        """
        with self._stream(message, params, timeout, whole=True) as stream:
            for _ in stream:
                pass
        return stream.turn.result()

    def stream(
        self, message: TurnMessages = None, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> "TurnStream":
        """Send a message and iterate over the outputs of its answer.

        Closing the iterator early aborts the answer; what was generated is kept, unless it is empty or failed.
        """
        return self._stream(message, params, timeout, whole=False)

    def fork(self, n: int = 1) -> "list[Conversation]":
        """Create `n` independent copies of the conversation. No KV is copied or computed. Raises `InvalidRequest`."""
        self._ensure_idle()
        check_integer("n", n, 1, self._inputs.limits.max_n)
        forks = [self._fork() for _ in range(n)]
        for fork in forks:
            fork._renew()
        return forks

    def preload(self) -> int:
        """Compute the beginning of the next prompt in advance, and retain it as after a turn.

        Before the first turn, that is the system message and tools; after `load` or `Engine.reset_prefix_cache`, the
        whole history. Returns its number of tokens.
        """
        self._ensure_idle()
        prefix = self._prefix()
        if prefix:
            (pin,) = self._engine.preload(
                [prefix],
                namespace=self.namespace,
                priority=self.priority,
                ttl=self._retain or None,
                reading=self.params.reading,
            )
            self._release()
            self._pin = pin
            if self._retain == 0:
                self._release()
        return len(prefix)

    def close(self) -> None:
        """Release the pinned path. Messages can still be read. May be called twice."""
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
        self, message: TurnMessages, params: SamplingParams | None, timeout: float | None, *, whole: bool
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
        """Pin the current path in place of the previous one, and demote what it left behind."""
        if self._closed:
            return
        if self._retain != 0:
            self._repin()
        superseded, self._superseded = self._superseded, None
        if superseded is not None:
            with suppress(EngineClosed):
                self._engine.apply_hints(*superseded, namespace=self.namespace)

    def _repin(self) -> None:
        try:
            self._pin = self._engine.pin(
                self.token_ids,
                namespace=self.namespace,
                priority=self.priority,
                ttl=self._retain,
                reading=self.params.reading,
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
    """Outputs of the answer of one turn."""

    def __init__(self, talk: Conversation, turn: "Turn", outputs: TurnOutputs, *, whole: bool) -> None:
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
        """Abort the answer unless it has finished."""
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
        if self._open:  # the garbage collector may run during a step, so nothing is pinned
            self._talk._settle(self.turn, keep=self._keep)

    def _settle(self, *, keep: bool) -> None:
        self._open = False
        if self._talk._settle(self.turn, keep=keep):
            self._talk._renew()
