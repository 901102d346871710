"""FastAPI application that serves an engine over OpenAI's API."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixgen.core import InvalidRequest, RadixgenError, check_integer
from radixgen.core.reading import POLICIES
from radixgen.serve.http.access_log import AccessLog
from radixgen.serve.http.auth import Gate, Keys, check_routes
from radixgen.serve.http.backend import EngineBackend
from radixgen.serve.http.chat import chat_routes
from radixgen.serve.http.completions import completion_routes
from radixgen.serve.http.context import Context
from radixgen.serve.http.errors import ErrorHandlers
from radixgen.serve.http.head import Head
from radixgen.serve.http.health import Health
from radixgen.serve.http.info import description_route, info_routes
from radixgen.serve.http.latest_stats import LatestStats
from radixgen.serve.http.logprobs import TokenTexts
from radixgen.serve.http.messages import message_routes
from radixgen.serve.http.metrics import COMPAT, Metrics
from radixgen.serve.http.open_limit import OpenLimit, Quota
from radixgen.serve.http.openapi import describe
from radixgen.serve.http.origins import OriginPolicy
from radixgen.serve.http.request_preparer import RequestPreparer
from radixgen.serve.http.response_store import ResponseStore
from radixgen.serve.http.responses import response_routes
from radixgen.serve.http.score import score_routes
from radixgen.serve.http.sessions import Sessions
from radixgen.serve.http.templates import TemplateRenderer
from radixgen.serve.http.warnings import Warnings

Routes = Callable[[Gate], APIRouter]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of the application.

    names: names of the model in the API; default: the engine's name.
    api_keys, operator_keys: keys for `auth.Keys`; without any, no authentication is required.
    max_open: maximum number of running and waiting sequences, and of requests that tokenize; further requests are
        rejected with 429.
    max_concurrency_per_key: maximum per API key; default: half of `max_open` if there are several keys.
    request_timeout: seconds until a request is aborted, from its arrival; None: no limit.
    send_timeout: seconds until a client that reads nothing counts as disconnected.
    stall_timeout: seconds without progress until `/health` fails.
    metrics_compat: `"vllm"` adds vLLM's metric names to `/metrics`.
    ignore_unknown_fields: ignore unsupported fields, with a warning in the response, instead of rejecting them.
    origins: allowed origins (CORS) and hosts.
    root_path: path prefix that a proxy adds, whether it strips it or not.
    sampling_defaults: default fields of `SamplingParams`; its `max_tokens` is a limit for all requests.
    readings: names of the reading policies that requests may name, beside `exact`.
    warm_up: run every kind of step before the server is ready.
    """

    names: Sequence[str] = ()
    api_keys: Sequence[str] = ()
    operator_keys: Sequence[str] = ()
    max_open: int = 1_024
    max_concurrency_per_key: int | None = None
    request_timeout: float | None = None
    send_timeout: float = 60.0
    stall_timeout: float = 60.0
    metrics_compat: str | None = None
    ignore_unknown_fields: bool = False
    origins: OriginPolicy = field(default_factory=OriginPolicy)
    root_path: str = ""
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    readings: Sequence[str] = ()
    warm_up: bool = False
    secret: bytes = field(default=b"", repr=False)

    def check(self) -> None:
        """Raise `InvalidRequest` for the first option that is out of its range."""
        check_integer("max_open", self.max_open, 1, 1 << 20)
        if self.max_concurrency_per_key is not None:
            check_integer("max_concurrency_per_key", self.max_concurrency_per_key, 1, 1 << 20)
        for name in ("request_timeout", "send_timeout", "stall_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < 1e9:
                raise InvalidRequest(name, seconds, "must be a number of seconds above 0")
        if self.metrics_compat is not None and self.metrics_compat not in COMPAT:
            raise InvalidRequest("metrics_compat", self.metrics_compat, f"must be one of {', '.join(COMPAT)}")
        for name in self.readings:
            if name not in POLICIES:
                raise InvalidRequest("allow_reading", name, f"must be one of {', '.join(POLICIES)}")
        Keys(self.api_keys, self.operator_keys)
        self.origins.check()
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest("root_path", self.root_path, "must begin with / and not end with it")
        if any(not name for name in self.names):
            raise InvalidRequest("served_model_name", self.names, "must not be empty")


def create_app(engine: EngineBackend, options: ServeOptions | None = None, *more: Routes) -> FastAPI:
    """Create the application of `engine`, which it closes on shutdown. Raises `InvalidRequest`.

    more: functions that create further routes; each route declares its access by a dependency of the gate.

    Functions in `app.state.before_drain` are called before open requests are drained, to end endless responses.
    """
    options = options or ServeOptions()
    options.check()
    context = _context(engine, options)
    health = Health(engine, options.stall_timeout, context.preparer.stalled, warm_up=options.warm_up)
    gate = Gate(context.keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.openapi()
        tasks = [asyncio.create_task(coroutine) for coroutine in (health.watch(), context.stats.watch())]
        try:
            yield
        finally:
            health.draining = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            context.renderer.close()
            context.preparer.close()
            await engine.close()

    app = FastAPI(title="radixgen", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    own = [
        routes(context, gate)
        for routes in (completion_routes, chat_routes, response_routes, message_routes, score_routes)
    ]
    own += [info_routes(context, health, gate), description_route(app, gate)]
    for router in (*own, *(routes(gate) for routes in more)):
        check_routes(router)
        app.include_router(router)
    describe(app, options.root_path)
    handlers = ErrorHandlers(context.open_limit.retry_after)
    for kind in (RadixgenError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, handlers.handle)
    app.add_middleware(_Boundary, options=options, keys_needed=context.keys.needed, handlers=handlers)
    app.add_middleware(Head)
    if options.origins.allowed_origins:
        app.add_middleware(CORSMiddleware, **options.origins.cors)
    app.add_middleware(Warnings)
    app.add_middleware(AccessLog, metrics=context.metrics)
    app.state.context, app.state.health = context, health
    app.state.before_drain = []
    return app


def _context(engine: EngineBackend, options: ServeOptions) -> Context:
    keys = Keys(options.api_keys, options.operator_keys, options.secret)
    names = tuple(options.names) or (engine.model_name,)
    per_key = options.max_concurrency_per_key or ((options.max_open + 1) // 2 if keys.several else None)
    open_limit = OpenLimit(options.max_open, per_key)
    limits = engine.inputs.limits
    bodies = Quota(
        "reading_bytes",
        "bytes of bodies are being read",
        most=limits.max_reading_bytes,
        most_of_key=max(limits.max_reading_bytes // 2, limits.max_body_bytes) if keys.several else None,
    )
    waiting_of_key = (limits.max_waiting_tokens + 1) // 2 if keys.several else None
    return Context(
        engine=engine,
        names=names,
        created=int(time.time()),
        keys=keys,
        open_limit=open_limit,
        tokenizing=OpenLimit(options.max_open, per_key),
        waiting=Quota("waiting_tokens", "prompt tokens", most_of_key=waiting_of_key),
        preparer=RequestPreparer(engine.inputs, open_limit, bodies, ignore_unknown=options.ignore_unknown_fields),
        metrics=Metrics(names[0], options.metrics_compat),
        stats=LatestStats(engine),
        sessions=Sessions(engine.inputs.limits, engine.inputs.chat_eos_token_ids),
        responses=ResponseStore(limits),
        texts=TokenTexts(engine.inputs.tokenizer),
        renderer=TemplateRenderer(engine.inputs.tokenizer, engine.inputs.max_text_chars),
        request_timeout=options.request_timeout,
        send_timeout=options.send_timeout,
        sampling_defaults=dict(options.sampling_defaults),
        readings=frozenset(options.readings),
    )


class _Boundary:
    """ASGI middleware that rejects origins and hosts that are not allowed, and turns exceptions into responses."""

    def __init__(self, app: ASGIApp, *, options: ServeOptions, keys_needed: bool, handlers: ErrorHandlers) -> None:
        self._app = app
        self._origins = options.origins
        self._root_path = options.root_path
        self._keys_needed = keys_needed
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["root_path"] = self._root_path  # Starlette strips it if the path has it
        request, started = Request(scope, receive), False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._origins.check_request(request, keys_needed=self._keys_needed)
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            if started:
                raise
            refusal = await self._handlers.handle(request, error)
            await refusal(scope, receive, send)
