"""Error responses in OpenAI's format, with field, value and limit: `{"error": {message, type, param, …}}`.

Those of `/v1/messages` are in Anthropic's.
"""

import logging
from collections.abc import Callable, Mapping

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from radixgen.core import EngineClosed, InvalidRequest, LimitReached, PromptTooLong, RadixgenError
from radixgen.core.errors import short_repr
from radixgen.serve.http.messages_protocol import MessageError, MessageErrorDetails

logger = logging.getLogger(__name__)

_MESSAGES = "/v1/messages"
_MESSAGE_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's types of errors by status"""


class ErrorBody(msgspec.Struct, kw_only=True):
    """Description of an error.

    param: name of the field.
    value: value of the field, in at most 80 characters.
    limit: what the value must be.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    value: str | None = None
    limit: str | None = None


class ErrorResponse(msgspec.Struct):
    """Body of every error response."""

    error: ErrorBody


class HTTPError(RadixgenError):
    """Request that the HTTP layer rejects, such as one without a key or with a body that is too large."""

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
    """The client closed the connection."""


def status_of(error: BaseException) -> int:
    """HTTP status of an error."""
    if isinstance(error, HTTPError):
        return error.status
    if isinstance(error, InvalidRequest):
        return 400
    if isinstance(error, LimitReached):
        return 429
    if isinstance(error, ClientGone):
        return 499
    return 503 if isinstance(error, EngineClosed) else 500


def body_of(error: BaseException) -> ErrorBody:
    """Body of an error: details of a caller's error, but none of internal errors."""
    if isinstance(error, HTTPError):
        return error.body
    if isinstance(error, InvalidRequest | LimitReached):
        invalid = isinstance(error, InvalidRequest)
        too_long = isinstance(error, PromptTooLong)
        return ErrorBody(
            message=str(error),
            type="invalid_request_error" if invalid else "rate_limit_error",
            param=error.field,
            code="context_length_exceeded" if too_long else None if invalid else "overloaded",
            value=short_repr(error.value),
            limit=error.limit,
        )
    if isinstance(error, ClientGone):
        return ErrorBody(message="the client closed the connection", type="client_error")
    if isinstance(error, EngineClosed):
        return ErrorBody(message="the engine is closed", type="server_error", code="engine_closed")
    return ErrorBody(message="internal error; the server's log has details under the request id", type="server_error")


def encode(error: BaseException) -> bytes:
    """Encode an error as the body of a response or of a server-sent event."""
    return msgspec.json.encode(ErrorResponse(body_of(error)))


def generation_failed(reason: object) -> HTTPError:
    """Error for a sequence with the finish reason `error`."""
    return HTTPError(500, f"generation failed: {short_repr(reason)}", type="server_error", code="generation_failed")


def message_error(error: BaseException, request_id: str | None = None) -> MessageError:
    """Body of an error in Anthropic's format."""
    kind = _MESSAGE_ERRORS.get(status_of(error), "api_error")
    return MessageError(error=MessageErrorDetails(kind, body_of(error).message), request_id=request_id)


def _encode_for(request: Request, error: BaseException) -> bytes:
    """Encode an error in the format of the route."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        return msgspec.json.encode(message_error(error, getattr(request.state, "request_id", None)))
    return encode(error)


class ErrorHandlers:
    """Converts exceptions of routes to responses."""

    def __init__(self, retry_after: Callable[[str], int]) -> None:
        """retry_after: returns the `Retry-After` seconds for a `Caller.key_id`."""
        self._retry_after = retry_after

    async def handle(self, request: Request, error: Exception) -> Response:
        """Convert an exception, and log it if it is internal."""
        if isinstance(error, RequestValidationError):
            error = _invalid(error)
        if isinstance(error, HTTPException):
            kept = dict(error.headers or {})  # such as Allow
            error = HTTPError(error.status_code, str(error.detail), field="path", value=request.url.path, headers=kept)
        status, headers = status_of(error), dict(getattr(error, "headers", None) or {})
        if status == 429:
            caller = getattr(request.state, "caller", None)
            headers.setdefault("retry-after", str(self._retry_after("" if caller is None else caller.key_id)))
        if status == 500 and not isinstance(error, HTTPError):
            request_id = getattr(request.state, "request_id", "?")
            logger.error("request %s failed", request_id, exc_info=error)
        return Response(_encode_for(request, error), status, headers, media_type="application/json")


def _invalid(error: RequestValidationError) -> HTTPError:
    """Convert FastAPI's error for a path or query parameter."""
    first = error.errors()[0]
    field, value, limit = ".".join(map(str, first["loc"])), first["input"], str(first["msg"])
    return HTTPError(400, f"{field}={short_repr(value)}: {limit}", field=field, value=value, limit=limit)
