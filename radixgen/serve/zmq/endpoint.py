"""ZeroMQ sockets: which addresses they may use, their keys, and their limits."""

import ipaddress
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from radixgen.core import InvalidRequest, Limits, RadixgenError

logger = logging.getLogger(__name__)

Context = zmq.Context[zmq.Socket[bytes]]
Interest = tuple[zmq.Socket[bytes] | int, int]
"""A socket or file descriptor, and the events to poll it for"""

OLDEST_LIBZMQ = (4, 3, 4)
HEARTBEAT_SECONDS = 1.0
LINGER_SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""Time limit for the first connection of a socket"""
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_MESSAGES = 1_024
"""High-water mark of sockets for small messages"""
_PAYLOADS = 64
"""High-water mark of sockets for messages of up to `max_frame_bytes`"""
_PORT = re.compile(r".*:(\d+|\*)")
"""A port; binding to `*` picks a free port."""
_SMG_PORTS = 20_000, 10_000
"""Ports of SMG's handshakes: the first one, and how many"""


class InsecureEndpoint(RadixgenError):
    """An address that untrusted peers could reach, without keys."""


@dataclass(frozen=True, slots=True)
class Curve:
    """CURVE keys for TCP, as written by `zmq.auth.create_certificates`.

    own: file with this side's public and secret key.
    peers: trusted public keys. For a worker, the file with the front end's public key; for a front end, the folder with
        the workers' public keys.
    """

    own: Path
    peers: Path

    def connect(self, socket: "zmq.Socket[bytes]") -> None:
        """Set the keys of a socket that connects. Raises `InvalidRequest`."""
        socket.curve_publickey, socket.curve_secretkey = self.keys()
        try:
            socket.curve_serverkey = zmq.auth.load_certificate(self.peers)[0]
        except (OSError, ValueError) as error:
            raise InvalidRequest("curve_server", self.peers, f"holds no public key: {error}") from error

    def bind(self, socket: "zmq.Socket[bytes]") -> None:
        """Set the keys of a socket that binds; an authenticator decides who may connect. Raises `InvalidRequest`."""
        socket.curve_publickey, socket.curve_secretkey = self.keys()
        socket.curve_server = True

    def keys(self) -> tuple[bytes, bytes]:
        """Read this side's public and secret key. Raises `InvalidRequest`."""
        try:
            public, secret = zmq.auth.load_certificate(self.own)
        except (OSError, ValueError) as error:
            raise InvalidRequest("curve_secret", self.own, f"holds no keys: {error}") from error
        if secret is None:
            raise InvalidRequest("curve_secret", self.own, "holds no secret key")
        return public, secret


def check_library() -> None:
    """Raise `RadixgenError` if libzmq has known vulnerabilities."""
    if zmq.zmq_version_info() < OLDEST_LIBZMQ:
        oldest = ".".join(map(str, OLDEST_LIBZMQ))
        raise RadixgenError(f"libzmq {zmq.zmq_version()} has known vulnerabilities: {oldest} or newer is needed")


def check_endpoint(address: str, *, curve: Curve | None = None, insecure_tcp: bool = False) -> None:
    """Check that only trusted peers can connect to `address`.

    Accepted are ipc in a folder that only this user may enter, TCP on loopback, TCP with CURVE keys and, with a
    warning, any TCP address if `insecure_tcp`.

    Raises `InvalidRequest`, `InsecureEndpoint`.
    """
    parts = _split(address)
    if parts.scheme == "tcp" and not _PORT.fullmatch(parts.netloc):
        raise InvalidRequest("address", address, "must have a port")
    if parts.scheme == "ipc":
        _check_folder(address, Path(address.removeprefix("ipc://")))
    elif curve is None and not _is_loopback(parts.hostname or ""):
        if not insecure_tcp:
            raise InsecureEndpoint(f"{address} is neither ipc nor loopback: give CURVE keys, or allow insecure TCP")
        logger.warning("%s: unencrypted, and anyone who can reach it can connect", address)


def smg_handshake(worker_url: str) -> str:
    """Handshake address that SMG derives from a worker's URL, `ipc://…`: a loopback port, by an FNV-1a hash.

    Raises `InvalidRequest`.
    """
    if not worker_url.startswith("ipc://"):
        raise InvalidRequest("worker_url", worker_url, "must be ipc://PATH")
    digest = 0xCBF29CE484222325
    for byte in worker_url.removeprefix("ipc://").encode():
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    first, count = _SMG_PORTS
    return f"tcp://127.0.0.1:{first + digest % count}"


def open_socket(
    context: Context,
    kind: int,
    limits: Limits,
    *,
    identity: bytes | None = None,
    payloads: bool = False,
    heartbeat: float = 0.0,
    once: bool = False,
) -> "zmq.Socket[bytes]":
    """Create a socket with all its limits set, neither bound nor connected.

    payloads: whether its messages may be large.
    heartbeat: seconds between pings; the connection is closed after five pings without an answer. 0 disables pings.
    once: whether a lost connection is not restored.
    """
    socket = context.socket(kind)
    marks = _PAYLOADS if payloads else _MESSAGES
    socket.setsockopt(zmq.SNDHWM, marks)
    socket.setsockopt(zmq.RCVHWM, marks)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_frame_bytes)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, -1 if once else 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    if heartbeat:
        socket.setsockopt(zmq.HEARTBEAT_IVL, round(heartbeat * 1e3))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(heartbeat * 5e3))
    return socket


class MonitoredSocket:
    """Socket for a single connection, with a monitor that notices when the connection is lost."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self.monitor = socket.get_monitor_socket(_EVENTS)
        self.connected = False
        self._broken = False
        self._due = time.monotonic() + PATIENCE_SECONDS

    def watch(self) -> None:
        """Read the monitor's events."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            self._broken = self._broken or (self.connected and event == zmq.EVENT_DISCONNECTED)
            self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def lost(self, now: float) -> bool:
        """Whether the connection was lost, or was not established in time."""
        return self._broken or (not self.connected and now > self._due)

    def close(self, linger: float = 0.0) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(round(linger * 1e3))


def ready(watched: Sequence[Interest], milliseconds: int) -> set[object]:
    """Poll, and return the sockets and file descriptors with an event."""
    return {socket for socket, _ in zmq.zmq_poll(list(watched), milliseconds)}


def _split(address: str) -> SplitResult:
    if isinstance(address, str):
        parts = urlsplit(address)
        if address.startswith("ipc:///") or (parts.scheme == "tcp" and parts.hostname):
            return parts
    raise InvalidRequest("address", address, "must be ipc:///PATH or tcp://HOST:PORT")


def _check_folder(address: str, path: Path) -> None:
    try:
        status = path.parent.stat()
    except OSError as error:
        raise InvalidRequest("address", address, f"its folder cannot be read: {error}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise InsecureEndpoint(f"{address}: {path.parent} must belong to this user alone (chmod 700)")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
