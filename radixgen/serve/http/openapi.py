"""OpenAPI description of the routes, with msgspec's schemas of request and response bodies."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct

from radixgen.serve.http import messages_protocol, protocol, responses_protocol, score_protocol
from radixgen.serve.http.errors import ErrorResponse
from radixgen.version import VERSION

_TYPES: tuple[type[Struct], ...] = (
    protocol.ChatChunk,
    protocol.ChatRequest,
    protocol.ChatResponse,
    protocol.CompletionRequest,
    protocol.CompletionResponse,
    protocol.DetokenizeRequest,
    protocol.DetokenizeResponse,
    messages_protocol.MessageBody,
    messages_protocol.MessageError,
    messages_protocol.MessagesRequest,
    messages_protocol.MessageTokensCount,
    protocol.ModelCard,
    protocol.ModelList,
    protocol.TokenizeRequest,
    protocol.TokenizeResponse,
    responses_protocol.InputItemList,
    responses_protocol.ResponseBody,
    responses_protocol.ResponseDeleted,
    responses_protocol.ResponseEvent,
    responses_protocol.ResponseRequest,
    score_protocol.ScoreRequest,
    score_protocol.ScoreResponse,
    ErrorResponse,
)


def described(body: type[Struct] | None, response: type[Struct] | None = None) -> dict[str, Any]:
    """OpenAPI description of a route with these types of body and response."""
    operation: dict[str, Any] = {"responses": {"default": {"description": "Error", "content": _json(ErrorResponse)}}}
    if response is not None:
        operation["responses"]["200"] = {"description": "OK", "content": _json(response)}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _json(kind: type[Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def describe(app: FastAPI, root_path: str) -> None:
    """Make `app.openapi()` include the types of bodies and responses, and the path prefix of a proxy."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            servers = [{"url": root_path}] if root_path else None
            description = get_openapi(title="radixgen", version=VERSION, routes=app.routes, servers=servers)
            components = description.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **protocol.schemas(*_TYPES)}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
