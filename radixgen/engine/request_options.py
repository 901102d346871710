"""Options of requests and pins, as `Engine` and `AsyncEngine` take them by keyword."""

from typing import TypedDict


class RequestOptions(TypedDict, total=False):
    """Options of `Engine.submit`, which describes and checks them."""

    request_id: str | None
    priority: int
    namespace: str
    timeout: float | None


class CoreOptions(TypedDict, total=False):
    """Options of a request that were checked, with the fields of `Request` that they become."""

    priority: int
    namespace: str
    arrived: float
    deadline: float


class PinOptions(TypedDict, total=False):
    """Options of `Engine.pin`, which describes and checks them."""

    namespace: str
    priority: int
    ttl: float | None
