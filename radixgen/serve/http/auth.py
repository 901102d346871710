"""Who asks: keys compared in constant time, what each route needs, and which callers share prefixes."""

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import Request

from radixgen.core import InvalidRequest, Limits, check_text
from radixgen.serve.http.errors import Refused

_LONGEST_KEY = 512


class Access(Enum):
    """What a route needs: nothing, a caller's key, or an operator's."""

    OPEN = "open"
    CALLER = "caller"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who authenticated. `tenant` is empty where no key is asked for."""

    tenant: str
    operator: bool = False
    """Whether the key is an operator's"""


class Keys:
    """API keys. Only digests are kept, and every key is looked at whatever is presented.

    Operators' routes show and change what belongs to all callers. They take an operator's key, which is good for
    everything; without any they take the only caller's key, and where several callers have one, nobody's.
    """

    def __init__(self, callers: Sequence[str] = (), operators: Sequence[str] = ()) -> None:
        """Raises `InvalidRequest`."""
        self._secret = secrets.token_bytes(32)
        for key in (*callers, *operators):
            if not 0 < len(key) <= _LONGEST_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
                raise InvalidRequest("api_key", "…", f"must be 1 to {_LONGEST_KEY} printable ASCII characters")
        self._callers = [self._digest(key) for key in callers]
        self._operators = [self._digest(key) for key in operators]

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return len(self._callers) + len(self._operators) > 1

    @property
    def needed(self) -> bool:
        return bool(self._callers or self._operators)

    def check(self, access: Access, authorization: str, api_key: str = "") -> Caller:
        """Who sent these headers, `Authorization: Bearer KEY` or else `X-API-Key: KEY`. Raises `Refused`: 401 without a
        key that is known, 403 where it is not good for this.
        """
        if access is Access.OPEN or not self.needed:
            return Caller("")
        scheme, _, key = authorization.partition(" ")
        bearer = key.strip() if scheme.lower() == "bearer" else ""
        presented = self._digest(bearer or api_key)
        caller, operator = _among(presented, self._callers), _among(presented, self._operators)
        if not caller and not operator:
            raise Refused(
                401,
                "no valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        alone = not self._operators and len(self._callers) == 1
        if access is Access.OPERATOR and not operator and not alone:
            raise Refused(403, "needs an operator's key", type="permission_error", code="operator_only")
        return Caller(presented.hex(), operator)

    def namespace(self, caller: Caller, cache_salt: str | None, limits: Limits) -> str:
        """Where requests of `caller` with this salt share prefixes: a keyed hash, so that nobody can name another's.
        Empty where there is neither key nor salt. Raises `InvalidRequest`.
        """
        salt = cache_salt or ""
        if len(salt) > limits.max_salt_len:
            raise InvalidRequest("len(cache_salt)", len(salt), f"must be at most {limits.max_salt_len}")
        check_text("cache_salt", salt)
        if not caller.tenant and not salt:
            return ""
        parts = [caller.tenant.encode(), salt.encode()]
        tagged = b"".join(
            tag + len(part).to_bytes(8, "big") + part for tag, part in zip((b"t", b"s"), parts, strict=True)
        )
        return "http:" + hmac.new(self._secret, tagged, hashlib.sha256).hexdigest()

    def _digest(self, key: str) -> bytes:
        return hmac.new(self._secret, key.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def _among(presented: bytes, known: Sequence[bytes]) -> bool:
    """No early end: the time tells nothing."""
    found = False
    for one in known:
        found |= hmac.compare_digest(presented, one)
    return found


class Gate:
    """Dependencies by which routes declare what they need: `dependencies=[gate.caller]`."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.open = self._needs(Access.OPEN)
        self.caller = self._needs(Access.CALLER)
        self.operator = self._needs(Access.OPERATOR)

    def is_operator(self, request: Request) -> bool:
        """Whether operators' routes are open to this request."""
        try:
            self._check(Access.OPERATOR, request)
        except Refused:
            return False
        return True

    def _check(self, access: Access, request: Request) -> Caller:
        headers = request.headers
        return self._keys.check(access, headers.get("authorization", ""), headers.get("x-api-key", ""))

    def _needs(self, access: Access) -> Any:
        check = self._check

        class Needs:
            """Called for each request before its route."""

            declared = access

            async def __call__(self, request: Request) -> None:
                request.state.caller = check(access, request)

        return Depends(Needs())


def access_of(route: APIRoute) -> Access:
    """What a route declares. Asserts that it declares one thing."""
    declared = [found for one in route.dependencies if (found := getattr(one.dependency, "declared", None))]
    assert len(declared) == 1, f"{route.path} declares {len(declared)} kinds of access, not one"
    access: Access = declared[0]
    return access


def check_routes(router: APIRouter) -> None:
    """Assert that every route of `router` declares what it needs."""
    for route in router.routes:
        assert isinstance(route, APIRoute), f"{route} declares no access"
        access_of(route)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches this name or address."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False
