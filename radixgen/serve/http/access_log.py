"""Access log, and the `X-Request-Id` header of requests and responses."""

import logging
import re
import time
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixgen.serve.http.metrics import Metrics

logger = logging.getLogger("radixgen.access")

_HEADER = b"x-request-id"
_GIVEN = re.compile(rb"[\x21-\x7e]{1,128}")
_LONGEST_PATH = 200


class AccessLog:
    """ASGI middleware that logs each request, and returns its `X-Request-Id`.

    A client's id of at most 128 printable characters is kept. It appears in the response and in logs only.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status, begin = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (_HEADER, request_id.encode())]
            await send(message)

        self._metrics.open_requests.inc()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.open_requests.dec()
            ended = state.get("ended", "")
            if status >= 400:
                self._metrics.errors.labels(status).inc()
            elapsed = (time.monotonic() - begin) * 1e3
            path = ascii(scope["path"])[1:-1][:_LONGEST_PATH]
            logger.info("%s %s %s %s %.1f ms %s", request_id, scope["method"], path, status, elapsed, ended)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == _HEADER and _GIVEN.fullmatch(value):
            return str(value, "ascii")
    return uuid4().hex
