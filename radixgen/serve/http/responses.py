"""`/v1/responses`: OpenAI's interface for agents. Answers are those of chats, and may be continued by their id."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Literal
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from radixgen.chat.dialogue import without_oldest
from radixgen.core import CompletionOutput, InvalidRequest, PromptTooLong, RequestOutput
from radixgen.serve.http.auth import Caller, Gate
from radixgen.serve.http.chat import ChoiceState, PreparedChat, end_turn, prepare_chat, start_chat
from radixgen.serve.http.context import Context
from radixgen.serve.http.errors import body_of
from radixgen.serve.http.fields import sent_as
from radixgen.serve.http.generation import Generation
from radixgen.serve.http.logprobs import chat_logprobs
from radixgen.serve.http.open_limit import OpenCount
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import ChatRequest, TokenLogprob
from radixgen.serve.http.response_events import ResponseEvents
from radixgen.serve.http.response_items import Item, input_items, messages_of
from radixgen.serve.http.response_request import FIELD_NAMES, chat_request, check_supported
from radixgen.serve.http.response_store import ResponseKey, StoredResponse
from radixgen.serve.http.responses_protocol import (
    IncompleteDetails,
    InputItemList,
    InputTokensDetails,
    OutputTokensDetails,
    ReasoningFields,
    ResponseBody,
    ResponseDeleted,
    ResponseEvent,
    ResponseFailure,
    ResponseRequest,
    ResponseStatus,
    ResponseUsage,
)
from radixgen.serve.http.sessions import SessionTurn
from radixgen.serve.http.stream import EventStream, json_response, named_event, while_connected
from radixgen.serve.http.tools import Warn, parser_for
from radixgen.serve.http.warnings import warner

Order = Literal["asc", "desc"]


def response_routes(context: Context, gate: Gate) -> APIRouter:
    """Routes of responses."""
    router, running = APIRouter(), dict[ResponseKey, _Responder]()

    @router.post("/v1/responses", dependencies=[gate.caller], openapi_extra=described(ResponseRequest, ResponseBody))
    async def create(request: Request) -> Response:
        """Generate a response."""
        caller = request.state.caller
        open_count, body = await context.preparer.receive(request, ResponseRequest, context.open_limit)
        with open_count, sent_as(FIELD_NAMES):
            responder = _Responder(context, caller, body, running)
            await responder.start(request, open_count)
        if body.stream:
            return EventStream(
                responder.stream(),
                responder.aclose,
                send_timeout=context.send_timeout,
                encode_error=responder.failure,
                end=b"",
            )
        try:
            return json_response(await while_connected(request.receive, responder.whole()))
        finally:
            await responder.aclose()

    @router.get("/v1/responses/{response_id}", dependencies=[gate.caller], openapi_extra=described(None, ResponseBody))
    async def retrieve(request: Request, response_id: str, stream: bool = False) -> Response:
        """A stored response, or one that is being generated."""
        if stream:
            raise InvalidRequest("stream", True, "is not supported: a response is streamed where it is created")
        key_id = request.state.caller.key_id
        open_one = running.get(ResponseKey(key_id, response_id))
        return json_response(open_one.body if open_one else context.responses.get(key_id, response_id).body)

    @router.delete(
        "/v1/responses/{response_id}", dependencies=[gate.caller], openapi_extra=described(None, ResponseDeleted)
    )
    async def delete(request: Request, response_id: str) -> Response:
        """Forget a stored response."""
        context.responses.remove(request.state.caller.key_id, response_id)
        return json_response(ResponseDeleted(id=response_id))

    @router.post(
        "/v1/responses/{response_id}/cancel", dependencies=[gate.caller], openapi_extra=described(None, ResponseBody)
    )
    async def cancel(request: Request, response_id: str) -> Response:
        """End a response that is being generated."""
        key_id = request.state.caller.key_id
        open_one = running.get(ResponseKey(key_id, response_id))
        if open_one is None:
            status = context.responses.get(key_id, response_id).body.status
            raise InvalidRequest("status", status, "must be in_progress: the response has ended")
        await open_one.cancel()
        return json_response(open_one.body)

    @router.get(
        "/v1/responses/{response_id}/input_items",
        dependencies=[gate.caller],
        openapi_extra=described(None, InputItemList),
    )
    async def list_input(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Order = "desc",
        after: str | None = None,
    ) -> Response:
        """Input items of a stored response, with those of the responses before it."""
        stored = context.responses.get(request.state.caller.key_id, response_id)
        return json_response(_page([*stored.earlier, *stored.given], limit, order, after))

    return router


def _page(items: list[Item], limit: int, order: Order, after: str | None) -> InputItemList:
    """Page of items in this order. Raises `InvalidRequest`."""
    if order == "desc":
        items = items[::-1]
    begin = 0
    if after is not None:
        begin = next((at + 1 for at, item in enumerate(items) if item.get("id") == after), 0)
        if not begin:
            raise InvalidRequest("after", after, "must be the id of an input item")
    page = items[begin : begin + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return InputItemList(data=page, first_id=first, last_id=last, has_more=begin + limit < len(items))


class _Responder:
    """One response: its request, its generation, and its end."""

    def __init__(
        self,
        context: Context,
        caller: Caller,
        body: ResponseRequest,
        running: "dict[ResponseKey, _Responder]",
    ) -> None:
        """running: responses that are being generated. Raises `InvalidRequest`, `HTTPError`."""
        check_supported(body)
        self._context = context
        self._caller = caller
        self._request = body
        self._running = running
        self._before = self._previous()
        self._given = context.responses.resolved(caller.key_id, input_items(body.input))
        self._cancelled = False
        self._waiting: asyncio.Timeout | None = None
        """Scope that waits for an output, which `cancel` ends"""
        self._reasoning_tokens = 0
        self.body = _empty_body(context, body)
        self._events = ResponseEvents(self.body)
        self._generation: Generation
        self._turn: SessionTurn | None
        self._chat: ChatRequest
        self._choice: ChoiceState

    async def start(self, request: Request, open_count: OpenCount) -> None:
        """Queue the request. Raises what `start_chat` raises."""
        prepare = partial(self._prepare, warner(request))
        self._generation, self._turn = await start_chat(self._context, request, open_count, prepare)
        self._choice = ChoiceState(parser_for(self._chat))
        self._running[self._key] = self

    @property
    def _key(self) -> ResponseKey:
        return ResponseKey(self._caller.key_id, self.body.id)

    def _previous(self) -> StoredResponse | None:
        name = self._request.previous_response_id
        if name is None:
            return None
        return self._context.responses.get(self._caller.key_id, name, "previous_response_id")

    def _prepare(self, warn: Warn) -> PreparedChat:
        """Check and render the chat. With `truncation="auto"`, leave out the oldest turns until it fits."""
        items = self._given if self._before is None else [*self._before.items, *self._given]
        self._chat = chat_request(self._request, messages_of(items))
        while True:
            try:
                return prepare_chat(
                    self._context,
                    self._caller,
                    self._chat,
                    warn,
                    resumes=True,
                    after=self._request.previous_response_id,
                )
            except PromptTooLong:
                shorter = without_oldest(tuple(self._chat.messages))
                if self._request.truncation != "auto" or shorter is None:
                    raise
                self._chat = msgspec.structs.replace(self._chat, messages=[dict(message) for message in shorter])

    # -- the answer ---------------------------------------------------------------------------------------

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events."""
        async for event in self._answer():
            yield named_event(event.type, event)

    async def whole(self) -> ResponseBody:
        """The response, once it has ended."""
        async for _ in self._answer():
            pass
        return self.body

    async def _answer(self) -> AsyncIterator[ResponseEvent]:
        for event in self._events.begin():
            yield event
        async for output in self._outputs():
            for delta in output.outputs:
                piece = self._choice.push(delta)
                if piece.reasoning:
                    self._reasoning_tokens += len(delta.token_ids)
                for event in self._events.push(piece, self._logprobs(delta)):
                    yield event
        for event in self._events.finish(self._status()):
            yield event
        self.body.usage = self._usage()
        await self._save()
        yield self._events.last()

    async def _outputs(self) -> AsyncIterator[RequestOutput]:
        """Outputs until the generation ends, or until the response is cancelled."""
        async with aclosing(self._generation.outputs()) as outputs:
            while not self._cancelled:
                with suppress(TimeoutError):
                    async with asyncio.timeout(None) as self._waiting:
                        pair = await anext(outputs, None)
                    self._waiting = None
                    if pair is None:
                        return
                    yield pair[1]

    async def cancel(self) -> None:
        """End the response here."""
        self._cancelled = True
        if self._waiting is not None:
            self._waiting.reschedule(0.0)
        await self.aclose()
        self.body.status = "cancelled"

    async def aclose(self) -> None:
        """Abort the generation if it has not ended. May be called twice."""
        self._running.pop(self._key, None)
        await self._generation.aclose()

    def failure(self, error: BaseException) -> bytes:
        """Last event of a stream that an error ends."""
        details = body_of(error)
        self.body.status, self.body.error = "failed", ResponseFailure(details.code or details.type, details.message)
        return named_event("response.failed", self._events.last())

    # -- the end ------------------------------------------------------------------------------------------

    def _status(self) -> ResponseStatus:
        """Status of a response whose generation has ended."""
        if self._cancelled:
            return "cancelled"
        if self._choice.reason == "length":
            self.body.incomplete_details = IncompleteDetails("max_output_tokens")
        return "completed" if self._choice.reason in ("stop", "tool_calls") else "incomplete"

    async def _save(self) -> None:
        """Keep the response, and its tokens in the session."""
        stored = StoredResponse.create(self.body, self._before, self._given)
        (answer,) = messages_of(stored.generated, "output")
        output = self._choice.output
        if self._turn is not None and output is not None:
            await end_turn(self._context, self._generation, self._turn, output, answer, self.body.id)
        if self.body.store:
            self._context.responses.put(self._caller.key_id, stored)

    def _logprobs(self, output: CompletionOutput) -> list[TokenLogprob]:
        if not output.logprobs:
            return []
        special = self._request.skip_special_tokens is False
        return chat_logprobs(output, self._request.top_logprobs or 0, self._context.texts, special=special).content

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached, usage.prompt_tokens - cached, usage.prompt_tokens_details.cache_hints
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(self._reasoning_tokens),
            total_tokens=usage.total_tokens,
            exact=usage.exact,
        )


def _empty_body(context: Context, body: ResponseRequest) -> ResponseBody:
    """Response without output."""
    text_format = {"type": "text"} if body.text is None or body.text.format is None else body.text.format
    return ResponseBody(
        id=f"resp_{uuid4().hex}",
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=context.names[0],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=body.reasoning or ReasoningFields(),
        store=body.store is not False,
        temperature=body.temperature,
        text={"format": msgspec.to_builtins(text_format)},
        tool_choice=msgspec.to_builtins(body.tool_choice or "auto"),
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
