"""`Warning` headers of responses, for parts of a request that were ignored."""

from collections.abc import Callable
from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MOST = 16
_LONGEST = 200


def warner(request: Request) -> Callable[[str], None]:
    """Function that adds a warning to the response of `request`, before its headers are sent. Thread-safe."""
    warnings: list[str] = request.scope["state"].setdefault("warnings", [])
    return partial(_add, warnings)


def _add(warnings: list[str], text: str) -> None:
    if len(warnings) < _MOST and text not in warnings:
        warnings.append(text)


class Warnings:
    """ASGI middleware that adds a header `Warning: 299 radixgen "…"` for each warning."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_warnings(message: Message) -> None:
            if message["type"] == "http.response.start":
                texts = scope.get("state", {}).get("warnings", ())
                message["headers"] = [*message["headers"], *((b"warning", _value(text)) for text in texts)]
            await send(message)

        await self._app(scope, receive, send_with_warnings)


def _value(text: str) -> bytes:
    """Header value of a warning, in printable ASCII without quotes."""
    plain = ascii(text)[1:-1][:_LONGEST].replace("\\", "/").replace('"', "'")
    return f'299 radixgen "{plain}"'.encode()
