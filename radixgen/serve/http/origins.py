"""Cross-origin requests (CORS) and `Host` headers: which are served."""

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
from radixgen.serve.http.errors import Refused

_JSON_LIST = re.compile(r'\[\s*["\]]')
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?")
_DEFAULT_PORT = re.compile(r"http://.*[^:]:80|https://.*[^:]:443")
_HOST = re.compile(r"[a-z0-9._*-]+|\[[0-9a-f:.]+\]")
_EXPOSED_HEADERS = ("Retry-After", "Warning", "X-Request-Id")


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginPolicy:
    """Which origins and hosts are allowed.

    allowed_origins: pages that may read answers (CORS), as `scheme://host[:port]`; `"*"` is any page.
    allowed_methods, allowed_headers, allow_credentials: of requests from these pages.
    allowed_hosts: names of the server in `Host`, besides those of this machine; `"*.example.com"` is every name below
        it, `"*"` any. Without any, every name is good where callers have keys.
    """

    allowed_origins: Sequence[str] = ()
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    allowed_hosts: Sequence[str] = ()

    def check(self) -> None:
        """Raise `InvalidRequest` for an origin that no browser sends, or a host that is no name."""
        for origin in self.allowed_origins:
            if origin in ("*", "null"):
                continue
            if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
                limit = "must be * or scheme://host[:port] as browsers send it: in lower case, without a default port"
                raise InvalidRequest("allowed_origins", origin, limit)
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host) or host.strip("[]") != _name(host):
                raise InvalidRequest("allowed_hosts", host, "must be a name in lower case, without scheme and port")

    @property
    def cors(self) -> dict[str, Any]:
        """Arguments of Starlette's `CORSMiddleware`."""
        return {
            "allow_origins": list(self.allowed_origins),
            "allow_methods": list(self.allowed_methods),
            "allow_headers": list(self.allowed_headers),
            "allow_credentials": self.allow_credentials,
            "expose_headers": list(_EXPOSED_HEADERS),
        }

    def check_request(self, request: Request, *, keys_needed: bool) -> None:
        """Raise `Refused` for a host that is not allowed.

        Without keys, pages of other sites must not use the server through the browser of who runs it: `Host` must be
        allowed or name this machine, and `Origin` must be allowed or be this server.
        """
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if (self.allowed_hosts or not keys_needed) and not self._knows(host):
            limit = "Host must be among --allowed-hosts, or name this machine"
            raise Refused(403, limit, type="permission_error", field="host", value=host, limit=limit)
        if keys_needed or origin is None or not {origin, "*"}.isdisjoint(self.allowed_origins):
            return
        if _split(origin).netloc != host:
            limit = "Origin must be among --allowed-origins, or be this server"
            raise Refused(403, limit, type="permission_error", field="origin", value=origin, limit=limit)

    def _knows(self, host: str) -> bool:
        name = _name(host)
        return is_loopback(name) or any(fnmatchcase(name, one.strip("[]")) for one in self.allowed_hosts)


def parse_list(field: str, values: Sequence[str] | None) -> list[str]:
    """The values of a repeated option, each of which may be a JSON list, as vLLM's. Raises `InvalidRequest`."""
    found: list[str] = []
    for value in values or ():
        if not _JSON_LIST.match(value):
            found.append(value)
            continue
        try:
            many = json.loads(value)
        except ValueError:
            many = None
        if not isinstance(many, list) or not all(isinstance(one, str) for one in many):
            raise InvalidRequest(field, value, "must be text, or a JSON list of texts")
        found += many
    return found


def _name(host: str) -> str:
    """The name or address in a `Host` header, in lower case, without port; empty where there is none."""
    return (_split(f"//{host}").hostname or "").rstrip(".")


def _split(address: str) -> SplitResult:
    """`urlsplit`, with empty parts for what is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
