"""What conversations of both engines have in common: the history, and how a turn's prompt comes out of it."""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, Generic, Literal, Protocol, Self, TypedDict, TypeVar, Unpack

import numpy as np

from radixgen import saved_history
from radixgen.chat_history import ChatHistory, Draft, HistoryBreak, HistoryMode, num_common
from radixgen.chat_template import ChatTemplate, Message, Tool, as_messages
from radixgen.core import (
    ContextOverflow,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    check_integer,
)
from radixgen.input_processor import InputProcessor
from radixgen.request_options import PinOptions, RequestOptions

Said = str | Message | Seq[Message] | None
"""What a turn adds: a user's text, a message, several, or nothing."""
OnOverflow = Literal["error", "drop_oldest"] | Callable[[list[dict[str, Any]]], Seq[Message]]
OnBreak = Callable[[HistoryBreak], object]

logger = logging.getLogger(__name__)

_MAX_TOKENS = 256
"""Of an answer, where nothing else was asked for."""
_MOST_BREAKS = 256
_ANSWER_SHARE = 4
"""Where history is shortened, one part in so many of the context is room enough for an answer."""


class Outputs(Iterator[RequestOutput], Protocol):
    """A request's outputs, which may be left early."""

    def close(self) -> None: ...


class Checks(Protocol):
    """An engine that says what it would refuse."""

    @property
    def inputs(self) -> InputProcessor: ...


class Serves(Checks, Protocol):
    """What a `Conversation` needs of an engine."""

    def stream(self, prompt: list[int], params: SamplingParams, **options: Unpack[RequestOptions]) -> Outputs: ...
    def pin(self, prompt: list[int], *, replaces: int | None, **options: Unpack[PinOptions]) -> int | None: ...
    def unpin(self, pin: int) -> bool: ...
    def preload(self, prompts: list[list[int]], **options: Unpack[PinOptions]) -> list[int | None]: ...


class AsyncServes(Checks, Protocol):
    """What an `AsyncConversation` needs of an engine."""

    def generate(
        self, prompt: list[int], params: SamplingParams, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[RequestOutput, None]: ...
    async def pin(self, prompt: list[int], *, replaces: int | None, **options: Unpack[PinOptions]) -> int | None: ...
    async def unpin(self, pin: int) -> bool: ...
    async def preload(self, prompts: list[list[int]], **options: Unpack[PinOptions]) -> list[int | None]: ...


E = TypeVar("E", bound=Checks)


class LoadOptions(TypedDict, total=False):
    """Options of a conversation that are not saved with it; `Dialogue` says what they mean."""

    params: SamplingParams | None
    priority: int
    retain: float | None
    on_overflow: OnOverflow
    on_break: OnBreak | None


class Options(LoadOptions, total=False):
    """All options of a conversation."""

    tools: Seq[Tool] | None
    namespace: str
    history: HistoryMode
    template_options: Mapping[str, Any] | None


class Dialogue(Generic[E]):
    """A conversation's history, how the next turn's prompt comes out of it, and what becomes of the answer.

    One turn at a time: while a stream is open, nothing else may be done with its conversation but to read it.
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
        tools: JSON schemas, or functions with annotations and a docstring, for the chat template.
        params: of turns that are given none; by default those of `SamplingParams` with 256 tokens.
        retain: seconds for which the path of the last turn is pinned; None: until `close`; 0: not at all. It gives way
            when a request needs its memory and nothing else can, lower `priority` first; then it is computed again.
        history: what is done where the template rewrites an earlier turn (drops its thinking, say): `"template"`
            follows it, as the model was trained on that; `"exact"` keeps the tokens. Either way `breaks` tells of it.
        template_options: more arguments of the chat template (`enable_thinking`, `date_string` …).
        on_overflow: where a turn does not fit: `"error"` raises `ContextOverflow`. `"drop_oldest"` leaves out the
            oldest turns, never a system message, until there is room for `max_tokens` or a quarter of the context; a
            function from messages to messages does the same in its own way. A warning is logged, and `rollback` goes
            back 256 turns from there on, or as many as there are messages.
        on_break: called once for each break; the first is also logged as a warning. An `AsyncConversation` calls this
            and `on_overflow` in a thread of its own.

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
        """Where the template wrote earlier turns otherwise than they stood, each once; of many the last 256."""
        self._engine = engine
        self._inputs = inputs
        self._history = ChatHistory(template, as_messages("system", first, inputs.limits), history)
        self._retain = retain
        self._on_overflow = on_overflow
        self._on_break = on_break
        self._pin: int | None = None
        self._busy = False
        self._closed = False

    @classmethod
    def load(cls, engine: E, saved: str, **options: Unpack[LoadOptions]) -> Self:
        """The conversation that `save` wrote, in this engine: with its messages and its very tokens, its tools, its
        namespace and its turns; `params` are given again. Nothing is computed before the next turn, or `preload`.
        Raises `InvalidRequest`.
        """
        found = saved_history.parse(saved, engine.inputs.limits)
        template = {name: found[name] for name in ("tools", "template_options", "namespace", "history")}
        loaded = cls(engine, **template, **options)
        loaded._history = saved_history.restore(found, loaded._history.template, engine.inputs.vocab_size)
        return loaded

    def save(self) -> str:
        """Messages and token ids as JSON, for `load`: in another process too, where the tokenizer is the same. Of more
        turns than `Limits.max_saved_chars` has room for, the latest. Raises `InvalidRequest` where one is too much.
        """
        return saved_history.dump(self._history, self.namespace)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said, in copies."""
        return [deepcopy(dict(message)) for message in self._history.state.messages]

    @property
    def last_message(self) -> dict[str, Any] | None:
        """A copy of the last message: after a turn the assistant's, with `tool_calls` and `reasoning_content` where the
        tokenizer's `response_template` finds them.
        """
        messages = self._history.state.messages
        return deepcopy(dict(messages[-1])) if messages else None

    @property
    def token_ids(self) -> list[int]:
        """Every token up to the end of the last answer. The next prompt begins with them, but where `breaks` tells
        otherwise or `on_overflow` shortens it; of the last one alone the KV may not have been computed.
        """
        return self._history.state.token_ids

    @property
    def num_turns(self) -> int:
        return self._history.num_turns

    def add(self, message: Said) -> None:
        """Add a message (text is a user's), or several, without an answer: what a tool gave, say. Raises
        `InvalidRequest`.
        """
        self._ensure_idle()
        self._history.add(as_messages("message", message, self._inputs.limits))

    def rollback(self, turn: int) -> None:
        """Go back to the end of turn `turn`, or with 0 to before the first. Moves nothing and computes nothing. Raises
        `InvalidRequest`, also where `on_overflow` shortened the history and the turn is too long ago.
        """
        self._ensure_idle()
        self._history.rollback(turn)

    # -- what both faces do -------------------------------------------------------------------------------

    def _claim(self) -> None:
        self._ensure_idle()
        self._busy = True

    def _ensure_idle(self) -> None:
        if self._closed:
            raise InvalidRequest("conversation", self.namespace, "is closed")
        if self._busy:
            raise InvalidRequest("turn", self.num_turns + 1, "is not over: read its stream to the end, or close it")

    def _begin(self, message: Said, params: SamplingParams | None) -> "Turn":
        """The turn that `message` begins. Changes nothing but `breaks`; may run in another thread."""
        params = self.params if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest("params", params, "must be SamplingParams")
        if params.n != 1:
            raise InvalidRequest("n", params.n, "a turn has one answer: fork the conversation for more")
        draft = self._fit(self._history.draft(as_messages("message", message, self._inputs.limits)), params)
        self._report(draft.found)
        return Turn(draft, self._inputs.for_chat(params))

    def _settle(self, turn: "Turn | None", *, keep: bool) -> bool:
        """The turn is over. Whether it became part of the history: an answer that failed or has no token does not."""
        self._busy = False
        output = turn.output() if turn is not None and keep else None
        if turn is None or output is None or output.outputs[0].finish_reason == "error":
            return False
        if not output.outputs[0].token_ids:
            return False
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
        twin._pin = None
        twin.breaks = self.breaks.copy()
        return twin

    def _prefix(self) -> list[int]:
        """The tokens with which the next prompt begins, whatever a user says."""
        one, other = (self._history.draft(({"role": "user", "content": content},)).token_ids for content in ("0", "x"))
        return one[: num_common(one, other)]

    def _report(self, found: HistoryBreak | None) -> None:
        if found is None or found in self.breaks:
            return
        level = logging.INFO if self.breaks else logging.WARNING
        logger.log(
            level,
            "turn %d: the chat template rewrites history from token %d on: %r became %r",
            found.turn,
            found.position,
            found.before,
            found.after,
        )
        self.breaks.append(found)
        del self.breaks[:-_MOST_BREAKS]
        if self._on_break is not None:
            self._on_break(found)

    # -- overflow -----------------------------------------------------------------------------------------

    def _fit(self, draft: Draft, params: SamplingParams) -> Draft:
        """The draft, shortened where it must be and may be."""
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
            left = _without_oldest(draft.messages)
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
    """A turn under way: the draft that it answers, and what has come of the answer."""

    def __init__(self, draft: Draft, params: SamplingParams) -> None:
        self.draft = draft
        self.params = params
        self._outputs: list[RequestOutput] = []

    def add(self, delta: RequestOutput) -> None:
        self._outputs.append(delta)

    def output(self) -> RequestOutput | None:
        """Everything so far as one output; an answer that was left ends with `abort`. None before the first."""
        if not self._outputs:
            return None
        last = self._outputs[-1]
        pieces = [one for output in self._outputs for one in output.outputs]
        final = pieces[-1]
        answer = replace(
            final,
            text="".join(piece.text for piece in pieces),
            token_ids=[token for piece in pieces for token in piece.token_ids],
            finish_reason=final.finish_reason or "abort",
            logprobs=None if final.logprobs is None else [found for piece in pieces for found in piece.logprobs or []],
        )
        told = next((output.prompt_logprobs for output in self._outputs if output.prompt_logprobs), None)
        return replace(last, outputs=[answer], finished=True, prompt_logprobs=told)

    def result(self) -> RequestOutput:
        """The whole answer. Raises `RequestFailed`."""
        output = self.output()
        assert output is not None, "the turn has not begun"
        answer = output.outputs[0]
        if answer.finish_reason == "error":
            raise RequestFailed(f"request {output.request_id} failed: {answer.stop_reason}")
        return output


def _without_oldest(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The messages without the first turn, from one user's message to the next; None where there is but one."""
    begin = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))
    users = (i for i in range(begin + 1, len(messages)) if messages[i]["role"] == "user")
    stop = next(users, None)
    return None if stop is None else messages[:begin] + messages[stop:]
