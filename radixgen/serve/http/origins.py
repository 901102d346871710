"""Checks of cross-origin requests (CORS) and of `Host` headers."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.requests import Request

from radixgen.core import InvalidRequest
from radixgen.serve.http.auth import is_loopback
from radixgen.serve.http.errors import HTTPError

_JSON_LIST = re.compile(r'\[\s*["\]]')
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?")
_DEFAULT_PORT = re.compile(r"http://.*[^:]:80|https://.*[^:]:443")
_HOST = re.compile(r"[a-z0-9._*-]+|\[[0-9a-f:.]+\]")
_EXPOSED_HEADERS = ("Retry-After", "Warning", "X-Request-Id")


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginPolicy:
    """Allowed origins and hosts.

    allowed_origins: origins that may read responses (CORS), as `scheme://host[:port]`; `"*"` allows any.
    allowed_methods, allowed_headers, allow_credentials: what cross-origin requests may contain.
    allowed_hosts: accepted `Host` headers besides names of this machine; `"*.example.com"` matches subdomains, `"*"`
        any name. Without allowed hosts, any name is accepted if callers need keys.
    """

    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    allowed_hosts: Sequence[str] = ()

    def check(self) -> None:
        """Raise `InvalidRequest` for an invalid origin or host."""
        for origin in self.allowed_origins:
            if origin in ("*", "null"):
                continue
            if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
                limit = "must be * or scheme://host[:port] in lower case, without a default port"
                raise InvalidRequest("allowed_origins", origin, limit)
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host) or host.strip("[]") != _name(host):
                raise InvalidRequest("allowed_hosts", host, "must be a name in lower case, without scheme and port")

    @property
    def cors(self) -> dict[str, Any]:
        """Arguments for Starlette's `CORSMiddleware`."""
        return {
            "allow_origins": list(self.allowed_origins),
            "allow_methods": list(self.allowed_methods),
            "allow_headers": list(self.allowed_headers),
            "allow_credentials": self.allow_credentials,
            "expose_headers": list(_EXPOSED_HEADERS),
        }

    def check_request(self, request: Request, *, keys_needed: bool) -> None:
        """Raise `HTTPError` for a host or origin that is not allowed.

        Without keys, other sites must not reach the server through the browser of a local user: then `Host` must be
        allowed or name this machine, and `Origin` must be allowed or be this server.
        """
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if (self.allowed_hosts or not keys_needed) and not self._knows(host):
            limit = "Host must be among --allowed-hosts or name this machine"
            raise HTTPError(403, limit, type="permission_error", field="host", value=host, limit=limit)
        if keys_needed or origin is None or not {origin, "*"}.isdisjoint(self.allowed_origins):
            return
        if _split(origin).netloc != host:
            limit = "Origin must be among --allowed-origins or be this server"
            raise HTTPError(403, limit, type="permission_error", field="origin", value=origin, limit=limit)

    def _knows(self, host: str) -> bool:
        name = _name(host)
        return is_loopback(name) or any(fnmatchcase(name, pattern.strip("[]")) for pattern in self.allowed_hosts)


def parse_list(field: str, values: Sequence[str] | None) -> list[str]:
    """Values of a repeated option; each may also be a JSON list, as in vLLM. Raises `InvalidRequest`."""
    parsed: list[str] = []
    for value in values or ():
        if not _JSON_LIST.match(value):
            parsed.append(value)
            continue
        try:
            items = json.loads(value)
        except ValueError:
            items = None
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise InvalidRequest(field, value, "must be text, or a JSON list of texts")
        parsed += items
    return parsed


def _name(host: str) -> str:
    """Name or address in a `Host` header, in lower case without port; empty if there is none."""
    return (_split(f"//{host}").hostname or "").rstrip(".")


def _split(address: str) -> SplitResult:
    """`urlsplit`, with empty parts for an invalid address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
