"""Keyword options of requests and pins, for `Engine` and `AsyncEngine`."""

from collections.abc import Sequence
from typing import TypedDict

from radixgen.core import CacheHint, OutputKind, Reuse
from radixgen.core.reading import ReadingPolicy


class RequestOptions(TypedDict, total=False):
    """Options of a request. `Engine.submit` describes and checks them."""

    request_id: str | None
    priority: int
    namespace: str
    timeout: float | None
    cache_hints: Sequence[CacheHint]
    hint_owner: str | None
    reuse: Reuse | None


class SubmitOptions(RequestOptions, total=False):
    """All options of `Engine.submit`."""

    output_kind: OutputKind


class CoreOptions(TypedDict, total=False):
    """Checked options of a request, named as the fields of `Request`."""

    priority: int
    namespace: str
    arrived: float
    deadline: float
    hints: tuple[CacheHint, ...]
    hint_owner: str | None
    reuse: Reuse


class PinOptions(TypedDict, total=False):
    """Options of a pin. `Engine.pin` describes and checks them."""

    namespace: str
    priority: int
    ttl: float | None
    reading: ReadingPolicy | None
