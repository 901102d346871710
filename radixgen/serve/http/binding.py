"""Addresses, TLS and timeouts of the server."""

import os
import socket
import ssl
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uvicorn.config import create_ssl_context

from radixgen.core import InvalidRequest
from radixgen.serve.http.auth import is_loopback

LOG_LEVELS = ("debug", "info", "warning", "error")
_LONGEST_SOCKET_PATH = 107
"""Maximum length of a Unix socket's path on Linux, in bytes"""
_SSL_FILES = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where the server listens, and how it shuts down.

    uds: path of a Unix socket to listen on instead of `host` and `port`.
    timeout_keep_alive: seconds until an idle connection is closed.
    shutdown_delay: seconds to accept requests after SIGTERM, with `/ready` at 503.
    drain_timeout: seconds that open requests have to finish after that; then they fail with `EngineClosed`.
    ssl_keyfile, ssl_certfile, ssl_ca_certs: PEM files; with a certificate, the server uses HTTPS.
    ssl_cert_reqs: client certificates: `ssl.CERT_NONE` (0), `CERT_OPTIONAL` (1) or `CERT_REQUIRED` (2).
    ssl_ciphers: cipher suites for TLS 1.2, in OpenSSL's format.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    timeout_keep_alive: int = 30
    shutdown_delay: float = 1.0
    drain_timeout: float = 30.0
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = ssl.CERT_NONE
    ssl_ciphers: str | None = None
    log_level: str = "info"
    access_log: bool = True

    def check(self, keys: Sequence[str]) -> None:
        """Raise `InvalidRequest` for an invalid field, and for an address beyond loopback without API keys."""
        if self.log_level not in LOG_LEVELS:
            raise InvalidRequest("log_level", self.log_level, f"must be one of {', '.join(LOG_LEVELS)}")
        for field in ("timeout_keep_alive", "shutdown_delay", "drain_timeout"):
            if not 0 <= (seconds := getattr(self, field)) < 1e9:
                raise InvalidRequest(field, seconds, "must be a number of seconds from 0")
        if self.uds is not None:
            _check_socket_path(self.uds)
        elif not 0 <= self.port < 1 << 16:
            raise InvalidRequest("port", self.port, "must be from 0 to 65535")
        elif not keys and not is_loopback(self.host):
            raise InvalidRequest("host", self.host, "is reachable by others and requires an API key: --api-key")
        self._check_tls()

    @property
    def tls(self) -> dict[str, Any]:
        """TLS options of uvicorn."""
        return {
            "ssl_keyfile": self.ssl_keyfile,
            "ssl_certfile": self.ssl_certfile,
            "ssl_ca_certs": self.ssl_ca_certs,
            "ssl_cert_reqs": self.ssl_cert_reqs,
            "ssl_ciphers": self.ssl_ciphers,
        }

    def _check_tls(self) -> None:
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise InvalidRequest("ssl_cert_reqs", self.ssl_cert_reqs, "must be 0, 1 or 2: none, optional or required")
        for field in _SSL_FILES:
            path = getattr(self, field)
            if path is not None and not Path(path).is_file():
                raise InvalidRequest(field, path, "must be a file")
        if self.ssl_certfile is None:
            for field, value in self.tls.items():
                if value:
                    raise InvalidRequest(field, value, "requires ssl_certfile")
            return
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise InvalidRequest("ssl_cert_reqs", self.ssl_cert_reqs, "requires ssl_ca_certs")
        try:
            create_ssl_context(
                certfile=self.ssl_certfile,
                keyfile=self.ssl_keyfile,
                password=None,
                ssl_version=ssl.PROTOCOL_TLS_SERVER,
                cert_reqs=self.ssl_cert_reqs,
                ca_certs=self.ssl_ca_certs,
                ciphers=self.ssl_ciphers,
            )
        except OSError as error:  # also ssl.SSLError
            raise InvalidRequest("ssl_certfile", self.ssl_certfile, f"TLS cannot be set up: {error}") from error


def _check_socket_path(path: str) -> None:
    if not 0 < len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        raise InvalidRequest("uds", path, f"must be a path of 1 to {_LONGEST_SOCKET_PATH} bytes")
    file = Path(path)
    if not file.parent.is_dir():
        raise InvalidRequest("uds", path, "must be in an existing folder")
    if not file.exists():
        return
    if not stat.S_ISSOCK(file.stat().st_mode):
        raise InvalidRequest("uds", path, "exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):  # connecting to a stale socket fails
        probe.connect(path)
        raise InvalidRequest("uds", path, "is in use by another process")
