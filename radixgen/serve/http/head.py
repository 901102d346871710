"""`HEAD` wherever there is `GET`: the same status and headers, and no body."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Head:
    """ASGI middleware that serves `HEAD` by the application's `GET`, which sees a client that disconnects once the
    response has started.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        started = asyncio.Event()

        async def disconnect() -> dict[str, Any]:
            await started.wait()
            return {"type": "http.disconnect"}

        async def send_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                started.set()

        await self._app({**scope, "method": "GET"}, disconnect, send_start)
        await send({"type": "http.response.body", "body": b""})
