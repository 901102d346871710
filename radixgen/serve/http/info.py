"""Routes that do not generate: models, tokenization, health, metrics."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, FastAPI
from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from radixgen.cache import TokenArray
from radixgen.core import InvalidRequest, PromptTooLong, Stats
from radixgen.serve.http.auth import Gate
from radixgen.serve.http.cache_hints import answers_of, hints_of
from radixgen.serve.http.chat import prepared_messages, template_of
from radixgen.serve.http.context import Context
from radixgen.serve.http.health import Health
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import (
    CacheHintsRequest,
    CacheHintsResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    PromptFields,
    TokenizeRequest,
    TokenizeResponse,
)
from radixgen.serve.http.stream import json_response
from radixgen.serve.http.warnings import warner
from radixgen.version import VERSION


def info_routes(context: Context, health: Health, gate: Gate) -> APIRouter:
    """All of these routes except `/openapi.json`."""
    router = APIRouter()

    @router.get("/health", dependencies=[gate.open], openapi_extra=described(None))
    async def healthy() -> Response:
        """200 while the engine makes progress or is idle, else 503."""
        return _state(health.fault())

    @router.get("/ready", dependencies=[gate.open], openapi_extra=described(None))
    async def ready() -> Response:
        """200 from when the model is warm until the server shuts down, else 503."""
        return _state(health.unready())

    @router.get("/version", dependencies=[gate.open], openapi_extra=described(None))
    async def version() -> Response:
        """Version of radixgen."""
        return JSONResponse({"version": VERSION})

    @router.get("/metrics", dependencies=[gate.open], openapi_extra=described(None))
    async def metrics(request: Request) -> Response:
        """Prometheus metrics: all for operators, the load for others."""
        text = context.metrics.expose(await context.stats.get(), everything=gate.is_operator(request))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @router.get("/v1/models", dependencies=[gate.caller], openapi_extra=described(None, ModelList))
    async def models() -> Response:
        """The model, under each of its names."""
        return json_response(ModelList(data=[_model(context, name) for name in context.names]))

    @router.get("/v1/models/{name:path}", dependencies=[gate.caller], openapi_extra=described(None, ModelCard))
    async def model(name: str) -> Response:
        """The model under one name; all names if the path ends with a slash."""
        if not name:
            return await models()
        context.check_model(name)
        return json_response(_model(context, name))

    @router.post("/tokenize", dependencies=[gate.caller], openapi_extra=described(TokenizeRequest, TokenizeResponse))
    async def tokenize(request: Request) -> Response:
        """Convert text or a chat to token ids."""
        open_count, body = await context.preparer.receive(request, TokenizeRequest, context.tokenizing)
        with open_count:
            context.check_model(body.model)
            work = partial(_tokenize, context, body, warner(request))
            return json_response(await context.preparer.run(request, work))

    @router.post(
        "/detokenize", dependencies=[gate.caller], openapi_extra=described(DetokenizeRequest, DetokenizeResponse)
    )
    async def detokenize(request: Request) -> Response:
        """Convert token ids to text, including special tokens."""
        open_count, body = await context.preparer.receive(request, DetokenizeRequest, context.tokenizing)
        with open_count:
            context.check_model(body.model)
            return json_response(await context.preparer.run(request, partial(_detokenize, context, body)))

    @router.post(
        "/cache_hints", dependencies=[gate.caller], openapi_extra=described(CacheHintsRequest, CacheHintsResponse)
    )
    async def cache_hints(request: Request) -> Response:
        """Apply cache hints to what is cached of a text or a chat now."""
        caller = request.state.caller
        open_count, body = await context.preparer.receive(request, CacheHintsRequest, context.tokenizing)
        with open_count:
            context.check_model(body.model)
            hints = hints_of(context, caller, body.cache_hints)
            namespace = context.namespace(caller, body.cache_salt)
            tokens = await context.preparer.run(request, partial(_prompt_tokens, context, body, warner(request)))
            results = await context.engine.apply_hints(
                tokens, hints, namespace=namespace, hint_owner=caller.key_id or None
            )
            return json_response(CacheHintsResponse(answers_of(results)))

    @router.get("/server_info", dependencies=[gate.operator], openapi_extra=described(None))
    async def server_info() -> Response:
        """Model, limits and statistics."""
        return JSONResponse(_server_info(context, await context.stats.get()))

    @router.post("/reset_prefix_cache", dependencies=[gate.operator], openapi_extra=described(None))
    async def reset_prefix_cache() -> Response:
        """Drop the cached prefixes that no live request and no pin locks."""
        return JSONResponse({"tokens_dropped": await context.engine.reset_prefix_cache()})

    return router


def description_route(app: FastAPI, gate: Gate) -> APIRouter:
    """Route of `/openapi.json`."""
    router = APIRouter()

    @router.get("/openapi.json", dependencies=[gate.open], include_in_schema=False)
    async def description() -> Response:
        return JSONResponse(app.openapi())

    return router


def _state(fault: str | None) -> Response:
    return JSONResponse({"status": fault or "ok"}, 503 if fault else 200)


def _model(context: Context, name: str) -> ModelCard:
    inputs = context.engine.inputs
    return ModelCard(
        id=name,
        created=context.created,
        root=context.engine.model_name,
        max_model_len=inputs.max_model_len,
        eos_token_ids=sorted(inputs.eos_token_ids),
    )


def _server_info(context: Context, stats: Stats | None) -> dict[str, Any]:
    inputs = context.engine.inputs
    return {
        "version": VERSION,
        "model": context.engine.model_name,
        "served_model_names": list(context.names),
        "max_model_len": inputs.max_model_len,
        "vocab_size": inputs.vocab_size,
        "kv_tokens": inputs.kv_tokens,
        "max_open": context.open_limit.max_open,
        "open": context.open_limit.open,
        "sessions": len(context.sessions),
        "session_bytes": context.sessions.num_bytes,
        "limits": asdict(inputs.limits),
        "sampling_defaults": dict(context.sampling_defaults),
        "stats": None if stats is None else msgspec.to_builtins(stats),
    }


def _tokenize(context: Context, body: TokenizeRequest, warn: Callable[[str], None]) -> TokenizeResponse:
    tokens = _prompt_tokens(context, body, warn).tolist()
    texts = [context.texts.text(token) for token in tokens] if body.return_token_strs else UNSET
    most = context.engine.inputs.max_model_len
    return TokenizeResponse(count=len(tokens), max_model_len=most, tokens=tokens, token_strs=texts)


def _prompt_tokens(context: Context, body: PromptFields, warn: Callable[[str], None]) -> TokenArray:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", body.prompt, "exactly one of prompt and messages is required")
    inputs = context.engine.inputs
    if body.prompt is not None:
        return inputs.tokenize(body.prompt, special=body.add_special_tokens is not False, warn=warn)
    template = template_of(context, body)
    return np.array(template.tokenize(template.render(prepared_messages(context, body))), np.int32)


def _detokenize(context: Context, body: DetokenizeRequest) -> DetokenizeResponse:
    inputs = context.engine.inputs
    if len(body.tokens) > inputs.max_model_len:
        raise PromptTooLong("len(tokens)", len(body.tokens), f"must be at most {inputs.max_model_len}")
    tokens = inputs.tokenize(body.tokens, "tokens").tolist()
    if inputs.tokenizer is None:
        raise InvalidRequest("tokens", "…", "the model has no tokenizer")
    return DetokenizeResponse(inputs.tokenizer.decode(tokens))
