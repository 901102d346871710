"""Refusals in OpenAI's shape, each with the field, its value and the limit: `{"error": {message, type, param, …}}`."""

import logging
from collections.abc import Callable, Mapping

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from radixgen.core import EngineClosed, InvalidRequest, LimitReached, PromptTooLong, RadixgenError
from radixgen.core.errors import short_repr

logger = logging.getLogger(__name__)


class ErrorBody(msgspec.Struct, kw_only=True):
    """What is wrong. `param`: the field; `value`: what it held, in at most 80 characters; `limit`: what it may hold."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    value: str | None = None
    limit: str | None = None


class ErrorResponse(msgspec.Struct):
    """The body of every refusal."""

    error: ErrorBody


class Refused(RadixgenError):
    """A request that HTTP itself refuses: no key, no such model, too large."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        field: str | None = None,
        value: object = None,
        limit: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = ErrorBody(
            message=message,
            type=type,
            param=field,
            code=code,
            value=None if field is None else short_repr(value),
            limit=limit,
        )


class ClientGone(RadixgenError):
    """Whoever asked has closed the connection."""


def status_of(error: BaseException) -> int:
    """The HTTP status that says what `error` is."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, InvalidRequest):
        return 400
    if isinstance(error, LimitReached):
        return 429
    if isinstance(error, ClientGone):
        return 499
    return 503 if isinstance(error, EngineClosed) else 500


def body_of(error: BaseException) -> ErrorBody:
    """What a caller is told of `error`: everything where it is the caller's to mend, nothing of our insides."""
    if isinstance(error, Refused):
        return error.body
    if isinstance(error, InvalidRequest | LimitReached):
        refused = isinstance(error, InvalidRequest)
        too_long = isinstance(error, PromptTooLong)
        return ErrorBody(
            message=str(error),
            type="invalid_request_error" if refused else "rate_limit_error",
            param=error.field,
            code="context_length_exceeded" if too_long else None if refused else "overloaded",
            value=short_repr(error.value),
            limit=error.limit,
        )
    if isinstance(error, ClientGone):
        return ErrorBody(message="the client closed the connection", type="client_error")
    if isinstance(error, EngineClosed):
        return ErrorBody(message="the engine is closed", type="server_error", code="engine_closed")
    return ErrorBody(message="internal error; the log has it by the request id", type="server_error")


def encode(error: BaseException) -> bytes:
    """The body of a response, or of an event, that tells of `error`."""
    return msgspec.json.encode(ErrorResponse(body_of(error)))


def failed(what: object) -> Refused:
    """A sequence that ended with `error`, and what the engine said of it."""
    return Refused(500, f"generation failed: {short_repr(what)}", type="server_error", code="generation_failed")


class ErrorHandlers:
    """Exceptions of routes as responses. `retry_after(tenant)`: seconds after which to try again where all is taken."""

    def __init__(self, retry_after: Callable[[str], int]) -> None:
        self._retry_after = retry_after

    async def handle(self, request: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = _invalid(error)
        if isinstance(error, HTTPException):
            kept = dict(error.headers or {})  # such as Allow
            error = Refused(error.status_code, str(error.detail), field="path", value=request.url.path, headers=kept)
        status, headers = status_of(error), dict(getattr(error, "headers", None) or {})
        if status == 429:
            caller = getattr(request.state, "caller", None)
            headers.setdefault("retry-after", str(self._retry_after("" if caller is None else caller.tenant)))
        if status == 500 and not isinstance(error, Refused):
            request_id = getattr(request.state, "request_id", "?")
            logger.error("request %s failed", request_id, exc_info=error)
        return Response(encode(error), status, headers, media_type="application/json")


def _invalid(error: RequestValidationError) -> Refused:
    """What FastAPI found wrong with a path or a query."""
    found = error.errors()[0]
    field, limit = ".".join(map(str, found["loc"])), str(found["msg"])
    return Refused(
        400, f"{field}={short_repr(found['input'])}: {limit}", field=field, value=found["input"], limit=limit
    )
