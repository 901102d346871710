"""`POST /v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from radixgen.core import CompletionOutput, InvalidRequest, RadixgenError, SamplingParams, joined
from radixgen.serve.http.auth import Caller, Gate
from radixgen.serve.http.cache_hints import (
    breakpoint_hints,
    breakpoints_of,
    hints_of,
    with_marks,
    without_cache_control,
)
from radixgen.serve.http.context import Context
from radixgen.serve.http.enforceable_schema import enforceable_format
from radixgen.serve.http.fields import names_of, sent_as
from radixgen.serve.http.generation import Generation, GenerationRequest
from radixgen.serve.http.logprobs import chat_logprobs
from radixgen.serve.http.open_limit import OpenCount
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
    Delta,
    PromptFields,
    Reason,
    ToolCall,
    Usage,
)
from radixgen.serve.http.sessions import SessionKey, SessionOwner, SessionTurn
from radixgen.serve.http.stream import EventStream, event, json_response, while_connected
from radixgen.serve.http.tool_parsers import Piece, ToolCallParser
from radixgen.serve.http.tools import Warn, constrain, parser_for, template_tools
from radixgen.serve.http.warnings import warner
from radixgen.text.chat_template import ChatTemplate, PromptEnding, as_messages
from radixgen.text.messages import Roles, template_message, template_messages


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A checked request, and its turn if it belongs to a session."""

    request: GenerationRequest
    turn: SessionTurn | None


def chat_routes(context: Context, gate: Gate) -> APIRouter:
    """Route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", dependencies=[gate.caller], openapi_extra=described(ChatRequest, ChatResponse))
    async def chat(request: Request) -> Response:
        """Generate the answer of a chat."""
        open_count, body = await context.preparer.receive(request, ChatRequest, context.open_limit)
        with open_count, sent_as(names_of(body)):
            prepare = partial(prepare_chat, context, request.state.caller, body, warner(request))
            generation, turn = await start_chat(context, request, open_count, prepare)
        responder = _ChatResponder(context, body, generation, turn)
        if body.stream:
            return EventStream(responder.events(), generation.aclose, send_timeout=context.send_timeout)
        async with generation:
            return json_response(await while_connected(request.receive, responder.whole()))

    return router


async def start_chat(
    context: Context, request: Request, open_count: OpenCount, prepare: Callable[[], PreparedChat]
) -> tuple[Generation, SessionTurn | None]:
    """Run `prepare` in a thread, compile the grammar, and queue the chat. Raises what these raise."""
    chat = await context.preparer.run(request, prepare)
    grammar = await context.preparer.compile(request, chat.request.params)
    return await Generation.start(context, chat.request, open_count, grammar), chat.turn


async def end_turn(
    context: Context,
    generation: Generation,
    turn: SessionTurn,
    output: CompletionOutput,
    answer: ChatMessage,
    name: str | None = None,
) -> None:
    """Save an answer in its session, and let what only the session's previous path holds be evicted first.

    output: the whole output.
    answer: the message as the client received it.
    name: further name of the turn, for `Sessions.resume`.
    """
    message = template_message(answer, Roles(None))
    end = partial(context.sessions.end, turn, output, message, generation.request.params, name)
    await context.preparer.finish(turn.key.key_id, end)
    if turn.superseded is not None:
        token_ids, hints = turn.superseded
        old, namespace = np.array(token_ids, np.int32), generation.request.namespace
        with suppress(RadixgenError):  # the answer is there, whatever becomes of the cache
            await context.engine.apply_hints(old, hints, namespace=namespace, hint_owner=None)


def prepared_messages(context: Context, body: ChatRequest | PromptFields) -> tuple[Mapping[str, Any], ...]:
    """Messages in the form that chat templates expect. Raises `InvalidRequest`."""
    return _converted(context, body.messages or [])


def _converted(context: Context, given: list[ChatMessage]) -> tuple[Mapping[str, Any], ...]:
    messages = without_cache_control(as_messages("messages", given, context.limits))
    if not messages:
        raise InvalidRequest("messages", [], "must hold at least one message")
    return tuple(template_messages(messages, Roles(getattr(context.engine.inputs.tokenizer, "chat_template", None))))


def template_of(context: Context, body: ChatRequest | PromptFields) -> ChatTemplate:
    """Chat template with the tools and variables of a request. Raises `InvalidRequest`."""
    tools = None if getattr(body, "tool_choice", None) == "none" else template_tools(body.tools)
    inputs, options = context.engine.inputs, body.chat_template_kwargs
    field, ending = "chat_template_kwargs", _ending(body)
    return ChatTemplate(inputs.tokenizer, tools, options, context.limits, context.renderer, field, ending)


def _ending(body: ChatRequest | PromptFields) -> PromptEnding:
    """End of the prompt. Raises `InvalidRequest`."""
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise InvalidRequest("continue_final_message", True, "requires add_generation_prompt=false")
        return "open"
    return "messages" if body.add_generation_prompt is False else "generation"


def prepare_chat(
    context: Context, caller: Caller, body: ChatRequest, warn: Warn, *, resumes: bool = False, after: str | None = None
) -> PreparedChat:
    """Check a request, all but its grammar, and render its chat.

    resumes: whether a chat without `session_id` continues the session with the longest common beginning.
    after: name of the turn that it continues, if it is known; see `Sessions.resume`.

    Raises `InvalidRequest`, and `HTTPError` if the model is not served.
    """
    context.check_model(body.model)
    _check_served(body)
    inputs = context.engine.inputs
    namespace = context.namespace(caller, body.cache_salt)
    messages, template = prepared_messages(context, body), template_of(context, body)
    turn = None
    if body.session_id is not None:
        inputs.check_name("session_id", body.session_id)
        key = SessionKey(caller.key_id, namespace, body.session_id)
        turn = context.sessions.begin(key, template, messages)
    elif resumes and not body.continue_final_message:
        turn = context.sessions.resume(SessionOwner(caller.key_id, namespace), template, messages, after)
    if turn is None:
        text = template.render(messages)
        ids = list(template.tokenize(text))
    else:
        text, ids = turn.draft.text, turn.draft.token_ids
    tokens = inputs.tokenize(ids, "messages", warn=warn)
    logprobs = (body.n or 1) * (1 + (body.top_logprobs or 0)) if body.logprobs else 0
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = context.answer_tokens(requested, tokens.size, logprobs)
    params = inputs.for_chat(_params(context, body, max_tokens, warn))
    inputs.check(tokens, params, compiles=False)
    priority, hints = context.priority(caller, body.priority), hints_of(context, caller, body.cache_hints)
    breakpoints = breakpoints_of(body.messages)
    if breakpoints:
        marked = _converted(context, with_marks(body.messages, breakpoints))
        hints += breakpoint_hints(breakpoints, template, marked, text, ids)
        inputs.check_hints(hints)
    return PreparedChat(GenerationRequest([tokens], params, caller.key_id, namespace, priority, tuple(hints)), turn)


def _params(context: Context, body: ChatRequest, max_tokens: int, warn: Warn) -> SamplingParams:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.params(max_tokens, logprobs, context.sampling_defaults)
    context.check_reading(params.reading)
    params = replace(params, response_format=enforceable_format(params.response_format, warn))
    return constrain(params, body, context.limits, warn)


def _check_served(body: ChatRequest) -> None:
    body.check()
    parser_for(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", body.top_logprobs, "requires logprobs=true")
    if any(modality != "text" for modality in body.modalities or []):
        raise InvalidRequest("modalities", body.modalities, 'must be ["text"]')
    if body.session_id is not None:
        if (body.n or 1) != 1:
            raise InvalidRequest("n", body.n, "must be 1 with session_id")
        if _ending(body) != "generation":
            raise InvalidRequest(
                "session_id", body.session_id, "requires a prompt that ends with the generation prompt"
            )


class ChoiceState:
    """State of one choice, parsed incrementally."""

    def __init__(self, parser: ToolCallParser) -> None:
        self.parser = parser
        self.calls: list[ToolCall] = []
        self._deltas: list[CompletionOutput] = []
        self._content: list[str] = []

    def push(self, new: CompletionOutput) -> Piece:
        """Parse a delta. Returns the new content and calls."""
        piece = self.parser.push(new.text)
        if new.finish_reason is not None:
            rest = self.parser.finish(cut=new.finish_reason == "length")
            piece = Piece(piece.content + rest.content, piece.calls + rest.calls, piece.reasoning + rest.reasoning)
        self._content.append(piece.content)
        for call in piece.calls:
            self._take(call)
        self._deltas.append(new)
        return piece

    @property
    def output(self) -> CompletionOutput | None:
        """All deltas merged; None before the first."""
        return joined(self._deltas) if self._deltas else None

    @property
    def reason(self) -> Reason | None:
        """Finish reason, as the client sees it."""
        reason = self._deltas[-1].finish_reason if self._deltas else None
        return "tool_calls" if reason == "stop" and self.parser.calls else reason

    def message(self) -> AnswerMessage:
        """The whole message."""
        content = "".join(self._content)
        if not self.calls:
            return AnswerMessage(content=content)
        return AnswerMessage(content=content.strip() or None, tool_calls=self.calls)

    def _take(self, call: ToolCall) -> None:
        if call.id is UNSET:
            last = self.calls[-1].function
            last.arguments += call.function.arguments
        else:
            function = msgspec.structs.replace(call.function)
            self.calls.append(ToolCall(id=call.id, type=call.type, function=function))


class _ChatResponder:
    """Response to a request, streamed or whole."""

    def __init__(self, context: Context, body: ChatRequest, generation: Generation, turn: SessionTurn | None) -> None:
        self._context = context
        self._body = body
        self._generation = generation
        self._turn = turn
        self._choices = [ChoiceState(parser_for(body)) for _ in range(generation.request.params.n)]
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid4().hex}",
            "created": int(time.time()),
            "model": context.names[0],
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events of a streamed response."""
        chunk = partial(ChatChunk, **self._head)
        roles = [
            ChunkChoice(index=index, delta=Delta(role="assistant", content="")) for index in range(len(self._choices))
        ]
        yield event(chunk(choices=roles, prompt_token_ids=self._prompt_ids(), usage=self._usage_so_far()))
        async for _, output in self._generation.outputs():
            new = [self._chunk(delta) for delta in output.outputs]
            ends = [self._end(delta) for delta in output.outputs if delta.finish_reason is not None]
            for choices in ([choice for choice in new if choice is not None], ends):
                if choices:
                    yield event(chunk(choices=choices, usage=self._usage_so_far()))
        await self._end_turn()
        if self._body.counts_usage:
            yield event(chunk(choices=[], usage=self._generation.usage()))

    def _usage_so_far(self) -> Usage | UnsetType:
        return self._generation.usage() if self._body.counts_usage_on else UNSET

    async def whole(self) -> ChatResponse:
        """The response, once all choices have finished."""
        async for _, output in self._generation.outputs():
            for delta in output.outputs:
                self._choices[delta.index].push(delta)
        await self._end_turn()
        return ChatResponse(
            **self._head,
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(self._choices)],
            usage=self._generation.usage(),
            prompt_token_ids=self._prompt_ids(),
        )

    def _chunk(self, output: CompletionOutput) -> ChunkChoice | None:
        """Chunk for a delta of a choice; None if it has nothing to report."""
        piece = self._choices[output.index].push(output)
        logprobs, ids = self._logprobs(output), self._body.return_token_ids and output.token_ids
        if not (piece.content or piece.calls or logprobs or ids):
            return None
        return ChunkChoice(
            index=output.index,
            delta=Delta(content=piece.content or UNSET, tool_calls=piece.calls or UNSET),
            logprobs=logprobs,
            token_ids=output.token_ids if ids else UNSET,
        )

    def _end(self, output: CompletionOutput) -> ChunkChoice:
        """Chunk with the finish reason, sent separately: it tells clients that a tool call is complete."""
        reason = self._choices[output.index].reason
        return ChunkChoice(index=output.index, delta=Delta(), finish_reason=reason, stop_reason=output.stop_reason)

    def _whole_choice(self, index: int, choice: ChoiceState) -> ChatChoice:
        output = choice.output
        assert output is not None
        return ChatChoice(
            index=index,
            message=choice.message(),
            logprobs=(self._logprobs(output) or ChatLogprobs([])) if self._body.logprobs else None,
            finish_reason=choice.reason,
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._body.return_token_ids else UNSET,
        )

    def _logprobs(self, output: CompletionOutput) -> ChatLogprobs | None:
        if not output.logprobs:
            return None
        texts, special = self._context.texts, self._body.skip_special_tokens is False
        return chat_logprobs(output, self._body.top_logprobs or 0, texts, special=special)

    def _prompt_ids(self) -> list[int] | msgspec.UnsetType:
        return self._generation.request.prompts[0].tolist() if self._body.return_token_ids else UNSET

    async def _end_turn(self) -> None:
        """Save the answer in the session, if there is one."""
        (choice, *_), turn = self._choices, self._turn
        output = choice.output
        if turn is not None and output is not None:
            await end_turn(self._context, self._generation, turn, output, msgspec.to_builtins(choice.message()))
