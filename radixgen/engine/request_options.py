"""Keyword options of requests and pins, for `Engine` and `AsyncEngine`."""

from typing import TypedDict


class RequestOptions(TypedDict, total=False):
    """Options of a request. `Engine.submit` describes and checks them."""

    request_id: str | None
    priority: int
    namespace: str
    timeout: float | None


class CoreOptions(TypedDict, total=False):
    """Checked options of a request, named as the fields of `Request`."""

    priority: int
    namespace: str
    arrived: float
    deadline: float


class PinOptions(TypedDict, total=False):
    """Options of a pin. `Engine.pin` describes and checks them."""

    namespace: str
    priority: int
    ttl: float | None
