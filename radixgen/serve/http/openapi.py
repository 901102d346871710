"""The application's own description: bodies are checked by msgspec, so their schemas are its too."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct

from radixgen.serve.http import protocol
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
    protocol.Model,
    protocol.ModelList,
    protocol.TokenizeRequest,
    protocol.TokenizeResponse,
    ErrorResponse,
)


def described(asks: type[Struct] | None, answers: type[Struct] | None = None) -> dict[str, Any]:
    """What OpenAPI says of a route with this body and this answer."""
    found: dict[str, Any] = {"responses": {"default": {"description": "Refused", "content": _json(ErrorResponse)}}}
    if answers is not None:
        found["responses"]["200"] = {"description": "Served", "content": _json(answers)}
    if asks is not None:
        found["requestBody"] = {"required": True, "content": _json(asks)}
    return found


def _json(kind: type[Struct]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}


def describe(app: FastAPI, root_path: str) -> None:
    """Have `app.openapi()` know the types that routes refer to, and what is in front of their paths."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            servers = [{"url": root_path}] if root_path else None
            found = get_openapi(title="radixgen", version=VERSION, routes=app.routes, servers=servers)
            components = found.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **protocol.schemas(*_TYPES)}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
