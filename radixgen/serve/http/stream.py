"""Server-sent events for slow clients, and cancellation of work when a client disconnects."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from radixgen.serve.http.errors import ClientGone, encode, status_of

T = TypeVar("T")
logger = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def json_response(body: msgspec.Struct) -> Response:
    """JSON response."""
    return Response(_ENCODER.encode(body), media_type="application/json")


def event(body: msgspec.Struct) -> bytes:
    """Server-sent event."""
    return b"data: " + _ENCODER.encode(body) + b"\n\n"


def named_event(name: str, body: msgspec.Struct) -> bytes:
    """Server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + event(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; if the client disconnects, cancel it and raise `ClientGone`.

    The body of the request must have been read.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_event(error: BaseException) -> bytes:
    """Server-sent event of an error in OpenAI's format."""
    return b"data: " + encode(error) + b"\n\n"


class EventStream(Response):
    """Response of server-sent events. An exception of `events` is sent as an error event.

    A client that reads nothing for `send_timeout` seconds counts as disconnected. `close` is called in any case.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[object]],
        *,
        send_timeout: float,
        encode_error: Callable[[BaseException], bytes] = error_event,
        end: bytes = _DONE,
    ) -> None:
        """
        encode_error: returns the event of an error.
        end: what is sent after the last event.
        """
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events
        self._close = close
        self._send_timeout = send_timeout
        self._encode_error = encode_error
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(scope, send))
        except (ClientGone, TimeoutError, OSError):
            scope.setdefault("state", {})["ended"] = "client gone"
        finally:
            await self._close()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, data)
        except (TimeoutError, OSError):
            raise
        except Exception as error:
            scope.setdefault("state", {})["ended"] = type(error).__name__
            if status_of(error) == 500:
                logger.error("request %s failed", scope["state"].get("request_id"), exc_info=error)
            await self._send(send, self._encode_error(error))
        if self._end:
            await self._send(send, self._end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        async with asyncio.timeout(self._send_timeout):
            await send({"type": "http.response.body", "body": data, "more_body": True})
