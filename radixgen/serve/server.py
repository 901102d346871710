"""HTTP server: the application and its live page, run by uvicorn."""

import asyncio
import fcntl
import logging
import logging.config
import signal
import socket
import sys
import termios
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI

from radixgen.engine.async_engine import AsyncEngine
from radixgen.serve.http.app import ServeOptions, create_app
from radixgen.serve.http.auth import Gate
from radixgen.serve.http.backend import EngineBackend
from radixgen.serve.http.binding import Binding
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.routes import tree_routes

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 4_096
_LAST_WORDS_SECONDS = 1.0
"""Time that clients have to read the end of responses that were cut off"""
_TICK_SECONDS = 0.05
_SWITCH_SECONDS = 0.001
"""Switch interval of the interpreter: how long the engine's thread may delay the event loop"""


@dataclass(frozen=True, slots=True)
class _Idle:
    """A connection without a request, and the bytes that its client has not read."""

    since: float
    held: int


def _held(connection: Any) -> int | None:
    """Unread bytes of a connection without a request, including those in the kernel; None with a request.

    Also None if the connection is closed: with TLS, its socket is gone first.
    """
    transport, cycle = connection.transport, connection.cycle
    if transport is None or (cycle is not None and not cycle.response_complete and not transport.is_closing()):
        return None
    connected = transport.get_extra_info("socket")
    if connected is None:
        return None
    descriptor = connected.fileno()
    unsent = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)) if descriptor >= 0 else bytes(4)
    return int(transport.get_write_buffer_size()) + int.from_bytes(unsent, sys.byteorder)


class HTTPServer(uvicorn.Server):
    """Uvicorn server that drains on shutdown: open requests may finish within a time limit, then they are cut off."""

    def __init__(self, app: FastAPI, binding: Binding) -> None:
        config = uvicorn.Config(
            app,
            host=binding.host,
            port=binding.port,
            access_log=False,
            log_config=None,
            limit_concurrency=_MAX_CONNECTIONS,
            uds=binding.uds,
            timeout_keep_alive=binding.timeout_keep_alive,
            **binding.tls,
            timeout_graceful_shutdown=None,
            server_header=False,
            date_header=False,
            ws="none",
        )
        super().__init__(config)
        self._app = app
        self._shutdown_delay = binding.shutdown_delay
        self._drain_timeout = binding.drain_timeout
        self._signals: list[int] = []
        self._idle: dict[Any, _Idle] = {}

    async def on_tick(self, counter: int) -> bool:
        self._drop_idle(time.monotonic())
        return await super().on_tick(counter)

    def _drop_idle(self, now: float) -> None:
        """Close idle connections for which uvicorn has no timeout: no request, half a header, or an unread response."""
        idle = {}
        for connection in list(self.server_state.connections):
            held = _held(connection)
            if held is None:
                continue
            before = self._idle.get(connection)
            idle[connection] = before if before and before.held == held else _Idle(now, held)
            if now - idle[connection].since > self.config.timeout_keep_alive + 1:  # uvicorn's own timer goes first
                connection.transport.abort()
        self._idle = idle

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals.append(sig)
        self._app.state.health.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.health.draining = True
        if self._signals == [signal.SIGTERM]:
            await self._serve_on(self._shutdown_delay)
        for end in self._app.state.before_drain:
            end()
        deadline = asyncio.create_task(self._end_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    async def _serve_on(self, seconds: float) -> None:
        """Accept requests for the shutdown delay, or until the next signal."""
        end = time.monotonic() + seconds
        while len(self._signals) == 1 and time.monotonic() < end:
            self._drop_idle(time.monotonic())
            await asyncio.sleep(_TICK_SECONDS)

    async def _end_in_time(self) -> None:
        """After the drain timeout, close the engine, which fails open requests, then all connections."""
        await asyncio.sleep(self._drain_timeout)
        logger.warning("open requests did not end within %g seconds", self._drain_timeout)
        self._app.state.context.renderer.close()
        self._app.state.context.preparer.close()
        await self._app.state.context.engine.close()
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        for connection in list(self.server_state.connections):  # of clients that do not read
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()


def whole_app(engine: AsyncEngine, options: ServeOptions | None = None) -> FastAPI:
    """Create the application of `engine`, with the live page. Raises `InvalidRequest`."""
    feed = Feed(engine, engine.inputs.limits)

    def page(gate: Gate) -> APIRouter:
        return tree_routes(engine, feed=feed, page_access=[gate.open], data_access=[gate.operator])

    app = create_app(engine, options, page)
    app.state.before_drain.append(feed.close)
    return app


def serve(engine: EngineBackend, options: ServeOptions, binding: Binding) -> None:
    """Serve until SIGINT or SIGTERM. Raises `InvalidRequest`."""
    binding.check([*options.api_keys, *options.operator_keys])
    app = whole_app(engine, options) if isinstance(engine, AsyncEngine) else create_app(engine, options)
    app.state.context.renderer.start()
    logging.config.dictConfig(_log_config(binding))
    if options.sampling_defaults:
        defaults = ", ".join(f"{name}={value}" for name, value in options.sampling_defaults.items())
        logger.info("default sampling parameters from generation_config: %s", defaults)
    sys.setswitchinterval(_SWITCH_SECONDS)
    # uvicorn drains on the first signal, then raises it again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            HTTPServer(app, binding).run()
    finally:
        if binding.uds is not None:
            Path(binding.uds).unlink(missing_ok=True)


def _log_config(binding: Binding) -> dict[str, Any]:
    """Logging to stderr, one line per record, with access logs if requested."""
    level = binding.log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            "uvicorn": {"handlers": ["stderr"], "level": level, "propagate": False},
            "radixgen": {"handlers": ["stderr"], "level": level, "propagate": False},
            "radixgen.access": {"level": level if binding.access_log else "WARNING"},
        },
    }
