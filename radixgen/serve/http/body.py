"""Request bodies: read within limits, decoded as types, with errors that name the field."""

import asyncio
import json
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from radixgen.core import InvalidRequest, Limits, check_text, check_texts
from radixgen.serve.http.errors import ClientGone, HTTPError
from radixgen.serve.http.unserved import drop_unserved

T = TypeVar("T", bound=msgspec.Struct)

_READ_SECONDS = 30.0
"""Time limit for receiving a body"""
SMALL_BODY_BYTES = 1 << 16
"""Maximum size of bodies that are decoded in the event loop and tokenized in the short pool"""
_MOST_UNKNOWN = 64
"""Maximum number of unknown nested fields that are dropped"""
_LOCATION = re.compile(r" - at (?:`\w+` in )?`\$\.?(.*)`$")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")


async def read_bytes(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    """Read the body of a JSON request. Raises `HTTPError`, `ClientGone`, and whatever `take` raises.

    take: called with the number of bytes of each part.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPError(
            415, f"content-type={media_type}: must be application/json", field="content-type", value=media_type
        )
    return await _read_all(request, limits.max_body_bytes, take)


def decode(data: bytes, kind: type[T], ignore: Callable[[str], None] | None = None) -> T:
    """Decode a body as `kind`, without conversion between types. Raises `InvalidRequest`.

    Unsupported fields with neutral values are dropped.

    ignore: if given, called with the names of all other unsupported fields, which are dropped too.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except Exception as error:  # besides msgspec's errors: UnicodeDecodeError, RecursionError
        if not _UNKNOWN.search(str(error)):
            raise _invalid_body(str(error), data, kind) from None
    return _decode_known(data, kind, ignore)


def _decode_known(data: bytes, kind: type[T], ignore: Callable[[str], None] | None) -> T:
    """Decode a body with unknown fields, without those that may be dropped."""
    try:
        body = msgspec.json.decode(data)
    except Exception as error:  # after the unknown field
        raise _invalid_body(str(error), data, kind) from None
    drop_unserved(body, kind.__struct_fields__, "", ignore)
    for _ in range(_MOST_UNKNOWN):
        try:
            return msgspec.convert(body, kind, str_keys=True)
        except Exception as error:
            message = str(error)
        unknown, location = _UNKNOWN.search(message), _LOCATION.search(message)
        if not unknown or not location:
            break
        holder = _at(location[1], body)
        others = tuple(name for name in holder if name != unknown[1])
        drop_unserved(holder, others, location[1], ignore)
        if unknown[1] in holder:
            break
    raise _invalid_body(message, data, kind)


async def _read_all(request: Request, most: int, take: Callable[[int], None]) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > most:
        raise _too_large(int(length), most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_READ_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(size, most)
                take(len(part))
                parts.append(part)
    except TimeoutError:
        raise HTTPError(408, f"the body was not received within {_READ_SECONDS:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone("the client disconnected before its request was read") from None
    return b"".join(parts)


def _too_large(size: int, most: int) -> HTTPError:
    limit = f"at most {most} bytes"
    return HTTPError(413, f"len(body)={size}: {limit}", field="len(body)", value=size, limit=limit)


def _invalid_body(message: str, data: bytes, kind: type[msgspec.Struct]) -> InvalidRequest:
    """Convert an error message of msgspec to an error with field, value and limit."""
    location = _LOCATION.search(message)
    path, says = (location[1], message[: location.start()]) if location else ("", message)
    if missing := _MISSING.search(says):
        return InvalidRequest(f"{path}.{missing[1]}".strip("."), None, "is required")
    if unknown := _UNKNOWN.search(says):
        near = "" if path else get_close_matches(unknown[1], kind.__struct_fields__, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InvalidRequest(f"{path}.{unknown[1]}".strip("."), "…", f"is not a known field{hint}")
    if location:
        return InvalidRequest(path or "body", _value_at(path, data), says[0].lower() + says[1:])
    if error := _lone_surrogate(data):
        return error
    return InvalidRequest("body", data[:80].decode("utf-8", "replace"), f"must be a JSON object: {says}")


def _lone_surrogate(data: bytes) -> InvalidRequest | None:
    """Error for the field that holds a lone surrogate, for which msgspec's message names no field."""
    try:
        body = json.loads(data)
        for name, value in body.items() if isinstance(body, dict) else ():
            check_text("body", name)
            check_texts(name, value)
    except InvalidRequest as error:
        return error
    except (ValueError, RecursionError):
        pass
    return None


def _value_at(path: str, data: bytes) -> Any:
    """Value at msgspec's `path`, or `…` if the body is large."""
    if len(data) > SMALL_BODY_BYTES or "[...]" in path:
        return "…"
    try:
        return _at(path, msgspec.json.decode(data))
    except Exception:
        return "…"


def _at(path: str, body: Any) -> Any:
    """Value at msgspec's `path` of `body`."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        body = body[int(index)] if index else body[name]
    return body
