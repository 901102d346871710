"""Routes of the live page: `/tree`, its files, and its data.

The page and its files are public. `/tree/events` and `/tree/node/{node_id}` reveal the text of requests and should be
protected by `data_access`. If they are denied, the page asks for an API key and sends it as a bearer token.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, NamedTuple

import msgspec
from fastapi import APIRouter, Path
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from radixgen.core import LimitReached, Limits, RadixgenError
from radixgen.engine.async_engine import AsyncEngine
from radixgen.engine.core import EngineCore
from radixgen.serve.http.errors import ClientGone, HTTPError, encode, status_of
from radixgen.serve.http.stream import while_connected
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.texts import plain

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE = "tree.html"
_SEND_SECONDS = 30.0
"""Time limit for a viewer to receive a frame"""
_HEAD_TOKENS, _TAIL_TOKENS = 1_024, 256
"""Numbers of tokens at the beginning and end of a node whose text is returned"""


def tree_routes(
    engine: AsyncEngine,
    *,
    feed: Feed | None = None,
    limits: Limits | None = None,
    page_access: Sequence[Any] = (),
    data_access: Sequence[Any] = (),
) -> APIRouter:
    """Create the routes of the live page of `engine`.

    feed: feed that the caller closes before the server drains; default: a new one.
    page_access: dependencies (`Depends(…)`) of the page and its files.
    data_access: dependencies of the routes that reveal the text of requests.
    """
    router = APIRouter(include_in_schema=False)
    served = feed or Feed(engine, limits)
    static = _static_files()

    @router.get("/tree", dependencies=list(page_access))
    async def page() -> Response:
        return static[_PAGE].response()

    @router.get("/tree/static/{name}", dependencies=list(page_access))
    async def static_file(name: str) -> Response:
        file = static.get(name)
        return file.response() if file else _missing("name", name[:80], "is not a file of the live page")

    @router.get("/tree/events", dependencies=list(data_access))
    async def events() -> Response:
        return FrameStream(served)

    @router.get("/tree/node/{node_id}", dependencies=list(data_access))
    async def node(node_id: Annotated[int, Path(ge=0, lt=1 << 53)]) -> Response:
        details = await asyncio.wrap_future(engine.inspect(partial(_node_details, node_id=node_id)))
        if details is None:
            return _missing("node_id", node_id, "is not a node of the tree")
        head, tail = details.pop("head"), details.pop("tail")
        details["text"] = plain(await engine.decode(head))
        details["tail"] = plain(await engine.decode(tail)) if tail else ""
        return Response(msgspec.json.encode(details), 200, HEADERS | {"Cache-Control": "no-store"}, "application/json")

    return router


class FrameStream(Response):
    """Response of frames as server-sent events, which ends with the event `end` when the engine or the feed is closed.

    A viewer that reads nothing for 30 seconds is disconnected.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed) -> None:
        super().__init__(headers=HEADERS | {"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._feed.viewer() as frames, suppress(ClientGone):
                await while_connected(receive, self._send(frames, send))
        except LimitReached as error:
            await _refusal(error)(scope, receive, send)

    async def _send(self, frames: AsyncIterator[bytes], send: Send) -> None:
        with suppress(TimeoutError, OSError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in frames:
                await _send_some(send, b"data: " + frame + b"\n\n")
            await _send_some(send, b"event: end\ndata: {}\n\n", more=False)


async def _send_some(send: Send, body: bytes, *, more: bool = True) -> None:
    async with asyncio.timeout(_SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": more})


def _node_details(core: EngineCore, node_id: int) -> dict[str, Any] | None:
    """Details of a node, with its tokens not decoded yet; None for an unknown id. Call it in the engine's thread."""
    node = core.tree.find(node_id)
    if node is None:
        return None
    tokens, most = node.token_ids, _HEAD_TOKENS + _TAIL_TOKENS
    cut = max(0, node.known - most)
    return {
        "id": node.id,
        "serial": node.serial,
        "start": node.start,
        "known": node.known,
        "computed": node.computed,
        "cut": cut,
        "head": tokens[:_HEAD_TOKENS].tolist() if cut else tokens.tolist(),
        "tail": tokens[-_TAIL_TOKENS:].tolist() if cut else [],
    }


class StaticFile(NamedTuple):
    """File of the page."""

    body: bytes
    media_type: str

    def response(self) -> Response:
        return Response(self.body, 200, HEADERS | {"Cache-Control": "no-cache"}, self.media_type)


def _static_files() -> dict[str, StaticFile]:
    folder = (files(__package__) / "static").iterdir()
    return {
        file.name: StaticFile(file.read_bytes(), _MEDIA_TYPES[file.name[file.name.rfind(".") :]]) for file in folder
    }


def _refusal(error: RadixgenError) -> Response:
    """Error response in OpenAI's format."""
    status = status_of(error)
    headers = HEADERS | ({"Retry-After": "5"} if status == 429 else {})
    return Response(encode(error), status, headers, "application/json")


def _missing(field: str, value: object, limit: str) -> Response:
    return _refusal(HTTPError(404, f"{field}={value}: {limit}", field=field, value=value, limit=limit))
