"""Base class of `Conversation` and `AsyncConversation`: history, each turn's prompt, and what happens when the
context is full.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, Generic, Literal, Protocol, Self, TypedDict, TypeVar, Unpack

import numpy as np

from radixgen.chat import saved_history
from radixgen.chat.history import (
    ChatHistory,
    Draft,
    HistoryBreak,
    HistoryMode,
    Superseded,
    num_common,
    superseded,
)
from radixgen.core import (
    CacheHint,
    ContextOverflow,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    check_integer,
)
from radixgen.engine.input_processor import InputProcessor
from radixgen.engine.request_options import PinOptions, RequestOptions
from radixgen.text.chat_template import ChatTemplate, Message, Tool, as_messages

TurnMessages = str | Message | Seq[Message] | None
"""Messages that a turn adds: a user's text, a message, a list of messages, or None"""
OnOverflow = Literal["error", "drop_oldest"] | Callable[[list[dict[str, Any]]], Seq[Message]]
OnBreak = Callable[[HistoryBreak], object]

logger = logging.getLogger(__name__)

_MAX_TOKENS = 256
"""Default `max_tokens` of an answer"""
_MOST_BREAKS = 256
_ANSWER_SHARE = 4
"""A shortened history leaves at least this fraction of the context (1/4) for the answer"""


class TurnOutputs(Iterator[RequestOutput], Protocol):
    """Outputs of a request."""

    def close(self) -> None:
        """Abort the request unless it has finished."""


class HasInputs(Protocol):
    """Engine with an input processor."""

    @property
    def inputs(self) -> InputProcessor: ...


class ConversationEngine(HasInputs, Protocol):
    """Engine for a `Conversation`."""

    def stream(self, prompt: list[int], params: SamplingParams, **options: Unpack[RequestOptions]) -> TurnOutputs: ...
    def pin(self, prompt: list[int], *, replaces: int | None, **options: Unpack[PinOptions]) -> int | None: ...
    def unpin(self, pin: int) -> bool: ...
    def apply_hints(self, prompt: list[int], hints: list[CacheHint], *, namespace: str) -> object: ...
    def preload(self, prompts: list[list[int]], **options: Unpack[PinOptions]) -> list[int | None]: ...


class AsyncConversationEngine(HasInputs, Protocol):
    """Engine for an `AsyncConversation`."""

    def generate(
        self, prompt: list[int], params: SamplingParams, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[RequestOutput, None]: ...
    async def pin(self, prompt: list[int], *, replaces: int | None, **options: Unpack[PinOptions]) -> int | None: ...
    async def unpin(self, pin: int) -> bool: ...
    async def apply_hints(self, prompt: list[int], hints: list[CacheHint], *, namespace: str) -> object: ...
    async def preload(self, prompts: list[list[int]], **options: Unpack[PinOptions]) -> list[int | None]: ...


E = TypeVar("E", bound=HasInputs)


class LoadOptions(TypedDict, total=False):
    """Options of a conversation that are not saved with it; see `Dialogue`."""

    params: SamplingParams | None
    priority: int
    retain: float | None
    on_overflow: OnOverflow
    on_break: OnBreak | None


class Options(LoadOptions, total=False):
    """All options of a conversation; see `Dialogue`."""

    tools: Seq[Tool] | None
    namespace: str
    history: HistoryMode
    template_options: Mapping[str, Any] | None


class Dialogue(Generic[E]):
    """Base class of conversations: history, options, and the parts of a turn that do no I/O.

    Turns are sequential: while the stream of a turn is open, the conversation can only be read.
    """

    def __init__(
        self,
        engine: E,
        system: str | None = None,
        *,
        tools: Seq[Tool] | None = None,
        params: SamplingParams | None = None,
        namespace: str = "",
        priority: int = 0,
        retain: float | None = 300.0,
        history: HistoryMode = "template",
        template_options: Mapping[str, Any] | None = None,
        on_overflow: OnOverflow = "error",
        on_break: OnBreak | None = None,
    ) -> None:
        """
        system: system message.
        tools: JSON schemas, or functions with annotations and a docstring, for the chat template.
        params: default sampling parameters of turns, with `max_tokens=256`.
        namespace: namespace of all requests.
        priority: priority of all requests, and of the pin.
        retain: seconds to pin the path of the last turn; None: until `close`; 0: not at all. The pin is released if a
            request needs its memory, pins with lower `priority` first; then the history is computed again.
        history: what to do if the template rewrites an earlier turn (drops its thinking, for example): `"template"`
            follows it, as the model was trained on it; `"exact"` keeps the tokens. Both add to `breaks`.
        template_options: variables of the chat template (`enable_thinking`, `date_string` …).
        on_overflow: what to do if a turn exceeds the context. `"error"` raises `ContextOverflow`. `"drop_oldest"` drops
            the oldest turns, but no system message, until there is room for `max_tokens` or a quarter of the context. A
            function from messages to messages shortens them itself. A warning is logged, and `rollback` can go back
            only 256 turns from then on, or as many as there are messages.
        on_break: called once for each break; the first is also logged as a warning. An `AsyncConversation` calls it and
            `on_overflow` in a thread.

        Raises `InvalidRequest`.
        """
        inputs = engine.inputs
        if system is not None and not isinstance(system, str):
            raise InvalidRequest("system", system, "must be text")
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest("params", params, "must be SamplingParams")
        inputs.check_name("namespace", namespace)
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        if isinstance(retain, bool) or retain != 0:
            inputs.check_seconds("retain", retain)
        if on_overflow not in ("error", "drop_oldest") and not callable(on_overflow):
            raise InvalidRequest("on_overflow", on_overflow, "must be error, drop_oldest, or a function of messages")
        if on_break is not None and not callable(on_break):
            raise InvalidRequest("on_break", on_break, "must be a function of a HistoryBreak")
        template = ChatTemplate(inputs.tokenizer, tools, template_options, inputs.limits)
        first = [] if system is None else [{"role": "system", "content": system}]
        self.params = params or SamplingParams(max_tokens=_MAX_TOKENS)
        self.namespace = namespace
        self.priority = priority
        self.breaks: list[HistoryBreak] = []
        """Places where the template rewrote earlier turns, up to the last 256"""
        self._engine = engine
        self._inputs = inputs
        self._history = ChatHistory(template, as_messages("system", first, inputs.limits), history)
        self._retain = retain
        self._on_overflow = on_overflow
        self._on_break = on_break
        self._pin: int | None = None
        self._superseded: Superseded | None = None
        self._busy = False
        self._closed = False

    @classmethod
    def load(cls, engine: E, saved: str, **options: Unpack[LoadOptions]) -> Self:
        """Load a conversation from the output of `save`: messages, tokens, turns, tools and namespace.

        Nothing is computed before the next turn, or `preload`. Raises `InvalidRequest`.
        """
        fields = saved_history.parse(saved, engine.inputs.limits)
        template = {name: fields[name] for name in ("tools", "template_options", "namespace", "history")}
        loaded = cls(engine, **template, **options)
        loaded._history = saved_history.restore(fields, loaded._history.template, engine.inputs.vocab_size)
        return loaded

    def save(self) -> str:
        """Encode messages and token ids as JSON for `load`, which may run in another process with the same tokenizer.

        Older turns are dropped if they exceed `Limits.max_saved_chars`. Raises `InvalidRequest` if one turn exceeds it.
        """
        return saved_history.dump(self._history, self.namespace)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Copies of all messages."""
        return [deepcopy(dict(message)) for message in self._history.state.messages]

    @property
    def last_message(self) -> dict[str, Any] | None:
        """Copy of the last message, or None. After a turn it is the assistant's, with `tool_calls` and
        `reasoning_content` if the tokenizer's `response_template` parses them.
        """
        messages = self._history.state.messages
        return deepcopy(dict(messages[-1])) if messages else None

    @property
    def token_ids(self) -> list[int]:
        """All tokens up to the end of the last answer.

        The next prompt starts with them, except after a break or an overflow. All but the last have computed KV.
        """
        return self._history.state.token_ids

    @property
    def num_turns(self) -> int:
        """Number of turns."""
        return self._history.num_turns

    def add(self, message: TurnMessages) -> None:
        """Add messages without an answer, such as the result of a tool; text is a user's message.

        Raises `InvalidRequest`.
        """
        self._ensure_idle()
        self._history.add(as_messages("message", message, self._inputs.limits))

    def rollback(self, turn: int) -> None:
        """Go back to the end of a turn; 0 is the beginning. Nothing is computed.

        Raises `InvalidRequest`, also if `on_overflow` shortened the history and the state of the turn is forgotten.
        """
        self._ensure_idle()
        self._history.rollback(turn)

    # -- for both subclasses ------------------------------------------------------------------------------

    def _claim(self) -> None:
        self._ensure_idle()
        self._busy = True

    def _ensure_idle(self) -> None:
        if self._closed:
            raise InvalidRequest("conversation", self.namespace, "is closed")
        if self._busy:
            raise InvalidRequest("turn", self.num_turns + 1, "is not over: read its stream to the end, or close it")

    def _begin(self, message: TurnMessages, params: SamplingParams | None) -> "Turn":
        """Begin a turn. Changes only `breaks`; may run in another thread."""
        params = self.params if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest("params", params, "must be SamplingParams")
        if params.n != 1:
            raise InvalidRequest("n", params.n, "must be 1: fork the conversation for more answers")
        draft = self._fit(self._history.draft(as_messages("message", message, self._inputs.limits)), params)
        self._report(draft.history_break)
        return Turn(draft, self._inputs.for_chat(params))

    def _settle(self, turn: "Turn | None", *, keep: bool) -> bool:
        """End a turn. Returns whether it was added to the history: not if its answer failed or is empty."""
        self._busy = False
        output = turn.output() if turn is not None and keep else None
        if turn is None or output is None or output.outputs[0].finish_reason == "error":
            return False
        if not output.outputs[0].token_ids:
            return False
        self._superseded = superseded(self._history.state, turn.draft) or self._superseded
        self._history.answer(
            turn.draft,
            output.outputs[0],
            self._inputs.chat_eos_token_ids,
            include_stop=turn.params.include_stop_str_in_output,
            show_special=not turn.params.skip_special_tokens,
        )
        return True

    def _fork(self) -> Self:
        twin = copy(self)
        twin._history = self._history.fork()
        twin._pin = twin._superseded = None
        twin.breaks = self.breaks.copy()
        return twin

    def _prefix(self) -> list[int]:
        """Tokens with which the next prompt starts, whatever the user's message is."""
        first, second = (self._history.draft(({"role": "user", "content": text},)).token_ids for text in ("0", "x"))
        return first[: num_common(first, second)]

    def _report(self, history_break: HistoryBreak | None) -> None:
        if history_break is None or history_break in self.breaks:
            return
        level = logging.INFO if self.breaks else logging.WARNING
        logger.log(
            level,
            "turn %d: the chat template rewrites history from token %d on: %r became %r",
            history_break.turn,
            history_break.position,
            history_break.before,
            history_break.after,
        )
        self.breaks.append(history_break)
        del self.breaks[:-_MOST_BREAKS]
        if self._on_break is not None:
            self._on_break(history_break)

    # -- overflow -----------------------------------------------------------------------------------------

    def _fit(self, draft: Draft, params: SamplingParams) -> Draft:
        """Check that a draft fits the context; shorten it if `on_overflow` says so. Raises `ContextOverflow`."""
        if self._on_overflow != "error":
            whole, draft = draft, self._shorten(draft, params)
            if draft is not whole:
                dropped = len(whole.token_ids), len(draft.token_ids)
                logger.warning("turn %d: history was shortened from %d to %d tokens", self.num_turns + 1, *dropped)
        refusal = self._refusal(draft, params)
        if refusal is not None:
            raise ContextOverflow("len(conversation)", len(draft.token_ids), refusal.limit) from refusal
        return draft

    def _shorten(self, draft: Draft, params: SamplingParams) -> Draft:
        context = self._inputs.max_model_len
        room = min(params.max_tokens, context // _ANSWER_SHARE)
        while self._refusal(draft, params) is not None or len(draft.token_ids) + room > context:
            if callable(self._on_overflow):
                fewer = self._on_overflow([deepcopy(dict(message)) for message in draft.messages])
                return self._history.redraft(as_messages("on_overflow", fewer, self._inputs.limits))
            left = without_oldest(draft.messages)
            if left is None:
                return draft
            draft = self._history.redraft(left)
        return draft

    def _refusal(self, draft: Draft, params: SamplingParams) -> PromptTooLong | None:
        try:
            self._inputs.check(np.array(draft.token_ids, np.int32), params)
        except PromptTooLong as error:
            return error
        return None


class Turn:
    """A turn in progress: its draft, and the outputs so far."""

    def __init__(self, draft: Draft, params: SamplingParams) -> None:
        self.draft = draft
        self.params = params
        self._outputs: list[RequestOutput] = []

    def add(self, delta: RequestOutput) -> None:
        """Add an output."""
        self._outputs.append(delta)

    def output(self) -> RequestOutput | None:
        """All outputs merged into one, with finish reason `abort` if it is not finished; None before the first."""
        if not self._outputs:
            return None
        last = self._outputs[-1]
        pieces = [delta for output in self._outputs for delta in output.outputs]
        final = pieces[-1]
        answer = replace(
            final,
            text="".join(piece.text for piece in pieces),
            token_ids=[token for piece in pieces for token in piece.token_ids],
            finish_reason=final.finish_reason or "abort",
            logprobs=None if final.logprobs is None else [entry for piece in pieces for entry in piece.logprobs or []],
        )
        prompt_logprobs = next((output.prompt_logprobs for output in self._outputs if output.prompt_logprobs), None)
        return replace(last, outputs=[answer], finished=True, prompt_logprobs=prompt_logprobs)

    def result(self) -> RequestOutput:
        """The whole answer. Raises `RequestFailed`."""
        output = self.output()
        assert output is not None, "the turn has not begun"
        answer = output.outputs[0]
        if answer.finish_reason == "error":
            raise RequestFailed(f"request {output.request_id} failed: {answer.stop_reason}")
        return output


def without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Messages without the first turn, which ends at the second user message; None if there is only one turn."""
    roles = [message["role"] for message in messages]
    begin = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(messages))
    users = (i for i in range(begin + 1, len(messages)) if roles[i] == "user")
    stop = next(users, None)
    return None if stop is None else messages[:begin] + messages[stop:]
