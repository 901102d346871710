"""`/v1/messages`: Anthropic's interface. Answers are those of chats, whose tokens are found again by their text."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from uuid import uuid4

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from radixgen.core import InvalidRequest
from radixgen.serve.http.auth import Caller, Gate
from radixgen.serve.http.chat import (
    ChoiceState,
    PreparedChat,
    end_turn,
    prepare_chat,
    prepared_messages,
    start_chat,
    template_of,
)
from radixgen.serve.http.context import Context
from radixgen.serve.http.errors import message_error
from radixgen.serve.http.fields import sent_as
from radixgen.serve.http.generation import Generation
from radixgen.serve.http.message_events import MessageEvents
from radixgen.serve.http.message_request import FIELD_NAMES, chat_request, content_messages
from radixgen.serve.http.messages_protocol import (
    MessageBody,
    MessageDelta,
    MessageEvent,
    MessagesRequest,
    MessageStop,
    MessageTokensCount,
    MessageUsage,
    StopReason,
)
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import ChatRequest
from radixgen.serve.http.sessions import SessionTurn
from radixgen.serve.http.stream import EventStream, json_response, named_event, while_connected
from radixgen.serve.http.tools import Warn, parser_for
from radixgen.serve.http.warnings import warner
from radixgen.text.template_variables import template_variables

_PING_SECONDS = 10.0
"""Time without an event after which a stream gets a ping"""
_PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def message_routes(context: Context, gate: Gate) -> APIRouter:
    """Routes of messages."""
    router = APIRouter()

    @router.post("/v1/messages", dependencies=[gate.caller], openapi_extra=described(MessagesRequest, MessageBody))
    async def create(request: Request) -> Response:
        """Generate the answer to messages."""
        open_count, body = await context.preparer.receive(request, MessagesRequest, context.open_limit)
        with open_count, sent_as(FIELD_NAMES):
            if body.max_tokens is None:
                raise InvalidRequest("max_tokens", None, "is required")
            chat = chat_request(body, _variables(context))
            prepare = partial(_prepare, context, request.state.caller, chat, warner(request))
            generation, turn = await start_chat(context, request, open_count, prepare)
        responder = _MessageResponder(context, chat, generation, turn)
        if body.stream:
            return EventStream(
                with_pings(responder.stream(), _PING, _PING_SECONDS),
                generation.aclose,
                send_timeout=context.send_timeout,
                encode_error=lambda error: named_event("error", message_error(error)),
                end=b"",
            )
        async with generation:
            return json_response(await while_connected(request.receive, responder.whole()))

    @router.post(
        "/v1/messages/count_tokens",
        dependencies=[gate.caller],
        openapi_extra=described(MessagesRequest, MessageTokensCount),
    )
    async def count_tokens(request: Request) -> Response:
        """Count the prompt tokens of messages."""
        open_count, body = await context.preparer.receive(request, MessagesRequest, context.tokenizing)
        with open_count, sent_as(FIELD_NAMES):
            context.check_model(body.model)
            return json_response(await context.preparer.run(request, partial(_count, context, body)))

    return router


def _count(context: Context, body: MessagesRequest) -> MessageTokensCount:
    chat = chat_request(body, _variables(context))
    template = template_of(context, chat)
    return MessageTokensCount(len(template.tokenize(template.render(prepared_messages(context, chat)))))


def _prepare(context: Context, caller: Caller, chat: ChatRequest, warn: Warn) -> PreparedChat:
    return prepare_chat(context, caller, chat, warn, resumes=True)


def _variables(context: Context) -> frozenset[str]:
    template = getattr(context.engine.inputs.tokenizer, "chat_template", None)
    return template_variables(template) if template else frozenset()


async def with_pings(events: AsyncGenerator[bytes, None], ping: bytes, seconds: float) -> AsyncGenerator[bytes, None]:
    """Yield events, and a ping whenever none has come for so many seconds."""
    while True:
        following = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({following}, timeout=seconds))[0]:
                yield ping
        except BaseException:
            following.cancel()
            await asyncio.wait({following})
            raise
        event = following.result()
        if event is None:
            return
        yield event


class _MessageResponder:
    """Answer to messages, streamed or whole."""

    def __init__(self, context: Context, chat: ChatRequest, generation: Generation, turn: SessionTurn | None) -> None:
        self._context = context
        self._generation = generation
        self._turn = turn
        self._choice = ChoiceState(parser_for(chat))
        self._events = MessageEvents()
        self._body = MessageBody(id=f"msg_{uuid4().hex}", model=context.names[0], usage=MessageUsage())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; the first comes with the first token, when it is known what was cached."""
        started = False
        async for event in self._answer():
            if not started:
                self._body.usage = self._usage()
                yield named_event("message_start", MessageEvent(type="message_start", message=self._body)) + _PING
                started = True
            yield named_event(event.type, event)
        delta = MessageDelta(delta=MessageStop(self._body.stop_reason, self._body.stop_sequence), usage=self._usage())
        yield named_event("message_delta", delta)
        yield named_event("message_stop", MessageEvent(type="message_stop"))

    async def whole(self) -> MessageBody:
        """The answer, once it has ended."""
        async for _ in self._answer():
            pass
        self._body.content, self._body.usage = self._events.content, self._usage()
        return self._body

    async def _answer(self) -> AsyncIterator[MessageEvent]:
        async for _, output in self._generation.outputs():
            for delta in output.outputs:
                for event in self._events.push(self._choice.push(delta)):
                    yield event
        for event in self._events.finish():
            yield event
        self._body.stop_reason, self._body.stop_sequence = self._stop()
        final = self._choice.output
        if self._turn is not None and final is not None:
            content = msgspec.to_builtins(self._events.content)
            (answer,) = content_messages("assistant", content, "content")
            await end_turn(self._context, self._generation, self._turn, final, answer)

    def _stop(self) -> tuple[StopReason, str | None]:
        output = self._choice.output
        if output is None or output.finish_reason != "stop":
            return "max_tokens", None
        if self._events.calls:
            return "tool_use", None
        if isinstance(output.stop_reason, str):
            return "stop_sequence", output.stop_reason
        return "end_turn", None

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached, hints = usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens_details.cache_hints
        retained = [hint.num_tokens for hint in hints or () if hint.action == "retain" and hint.status != "refused"]
        created = max(max(retained, default=0) - cached, 0)
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached - created,
            cache_creation_input_tokens=created,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
        )
