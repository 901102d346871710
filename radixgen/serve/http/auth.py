"""Authentication by API keys, access control of routes, and namespaces of callers."""

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
from radixgen.serve.http.errors import HTTPError

_LONGEST_KEY = 512


class Access(Enum):
    """Access that a route requires: none, a caller's key, or an operator's key."""

    OPEN = "open"
    CALLER = "caller"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Caller:
    """Authenticated caller. `key_id`: digest of its API key; empty if no key is required."""

    key_id: str
    operator: bool = False
    """Whether the key is an operator's"""


class Keys:
    """API keys, stored as digests and compared in constant time.

    Operator routes show and change what concerns all callers. They require an operator's key, which opens all other
    routes too. If no operator's key exists, a single caller's key opens them; with several callers, no key does.
    """

    def __init__(self, callers: Sequence[str] = (), operators: Sequence[str] = (), secret: bytes = b"") -> None:
        """`secret`: keys the namespaces; by default a random one. Raises `InvalidRequest`."""
        self._secret = secret or secrets.token_bytes(32)
        for key in (*callers, *operators):
            if not 0 < len(key) <= _LONGEST_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
                raise InvalidRequest("api_key", "…", f"must be 1 to {_LONGEST_KEY} printable ASCII characters")
        self._callers = [self._digest(key) for key in callers]
        self._operators = [self._digest(key) for key in operators]

    @property
    def several(self) -> bool:
        """Whether there is more than one key."""
        return len(self._callers) + len(self._operators) > 1

    @property
    def needed(self) -> bool:
        """Whether callers need a key."""
        return bool(self._callers or self._operators)

    def check(self, access: Access, authorization: str, api_key: str = "") -> Caller:
        """Authenticate by the headers `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Raises `HTTPError`: 401 without a valid key, 403 if the key does not grant this access.
        """
        if access is Access.OPEN or not self.needed:
            return Caller("")
        scheme, _, key = authorization.partition(" ")
        bearer = key.strip() if scheme.lower() == "bearer" else ""
        presented = self._digest(bearer or api_key)
        caller, operator = _among(presented, self._callers), _among(presented, self._operators)
        if not caller and not operator:
            raise HTTPError(
                401,
                "no valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        alone = not self._operators and len(self._callers) == 1
        if access is Access.OPERATOR and not operator and not alone:
            raise HTTPError(403, "requires an operator's key", type="permission_error", code="operator_only")
        return Caller(presented.hex(), operator)

    def namespace(self, caller: Caller, cache_salt: str | None, limits: Limits) -> str:
        """Namespace of requests of `caller` with this cache salt: a keyed hash, which others can't guess.

        It is empty without key and salt. Raises `InvalidRequest`.
        """
        salt = cache_salt or ""
        if len(salt) > limits.max_salt_len:
            raise InvalidRequest("len(cache_salt)", len(salt), f"must be at most {limits.max_salt_len}")
        check_text("cache_salt", salt)
        if not caller.key_id and not salt:
            return ""
        parts = [caller.key_id.encode(), salt.encode()]
        tagged = b"".join(
            tag + len(part).to_bytes(8, "big") + part for tag, part in zip((b"t", b"s"), parts, strict=True)
        )
        return "http:" + hmac.new(self._secret, tagged, hashlib.sha256).hexdigest()

    def _digest(self, key: str) -> bytes:
        return hmac.new(self._secret, key.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def _among(presented: bytes, known: Sequence[bytes]) -> bool:
    """Whether a digest is among the known ones, in constant time."""
    match = False
    for digest in known:
        match |= hmac.compare_digest(presented, digest)
    return match


class Gate:
    """FastAPI dependencies by which routes declare the access that they require: `dependencies=[gate.caller]`."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.open = self._needs(Access.OPEN)
        self.caller = self._needs(Access.CALLER)
        self.operator = self._needs(Access.OPERATOR)

    def is_operator(self, request: Request) -> bool:
        """Whether this request may use operator routes."""
        try:
            self._check(Access.OPERATOR, request)
        except HTTPError:
            return False
        return True

    def _check(self, access: Access, request: Request) -> Caller:
        headers = request.headers
        return self._keys.check(access, headers.get("authorization", ""), headers.get("x-api-key", ""))

    def _needs(self, access: Access) -> Any:
        check = self._check

        class Needs:
            """Authenticates each request before its route."""

            declared = access

            async def __call__(self, request: Request) -> None:
                request.state.caller = check(access, request)

        return Depends(Needs())


def access_of(route: APIRoute) -> Access:
    """Access that a route declares. Asserts that it declares exactly one."""
    dependencies = [depends.dependency for depends in route.dependencies]
    declared = [access for dependency in dependencies if (access := getattr(dependency, "declared", None))]
    assert len(declared) == 1, f"{route.path} declares {len(declared)} kinds of access, not one"
    (access,) = declared
    assert isinstance(access, Access)
    return access


def check_routes(router: APIRouter) -> None:
    """Assert that every route of `router` declares its access."""
    for route in router.routes:
        assert isinstance(route, APIRoute), f"{route} declares no access"
        access_of(route)


def is_loopback(host: str) -> bool:
    """Whether a name or address is reachable from this machine only."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False
