"""A front end: the sockets that workers dial in to, and the thread that owns them."""

import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zmq
from msgspec import Raw
from zmq.auth.thread import ThreadAuthenticator

from radixgen.core import EngineClosed, EngineDead, InvalidRequest, Limits, QueueFull, RadixgenError
from radixgen.serve import wire
from radixgen.serve.balancer import Balancer, Blocks
from radixgen.serve.endpoint import (
    HEARTBEAT_SECONDS,
    Context,
    Curve,
    Interest,
    Watched,
    check_endpoint,
    check_library,
    open_socket,
    ready,
)

logger = logging.getLogger(__name__)

_POLL_MS, _RETRY_MS = 100, 5
_BURST = 256


class Inbox(Protocol):
    """Where outputs of one request, or the reply to one call, go: from the front end's thread."""

    def put(self, item: "wire.Output | wire.Reply | RadixgenError") -> None:
        """The last one has a finish reason, is a reply, or is an error."""


@dataclass(eq=False)
class Engine:
    """A worker as the front end knows it."""

    identity: bytes
    serial: int
    """Its number among all workers that ever came"""
    output: Watched
    ready: wire.Ready | None = None
    """None until it has dialled in"""
    requests: dict[str, Inbox] = field(default_factory=dict)
    calls: dict[int, Inbox] = field(default_factory=dict)
    unsent: deque[list[bytes]] = field(default_factory=deque)

    @property
    def index(self) -> int:
        return int.from_bytes(self.identity, "little")


class FrontEnd:
    """Binds, answers handshakes, sends to workers and hands out what they tell. Its methods may be called from any
    thread; what they put in inboxes comes from a thread of its own.

    A worker that dies has its requests end with `EngineDead`; one that comes later, or comes back, is taken.
    """

    def __init__(
        self,
        address: str | None,
        *,
        curve: Curve | None,
        insecure_tcp: bool,
        limits: Limits,
        own_salts: bool = False,
    ) -> None:
        """
        address: of the handshake; by default ipc in a new folder.
        own_salts: workers make namespaces of cache salts by this front end's secret, not by their own: none is shared
            with other front ends, and requests with a salt are routed by what workers hold of them.

        Raises `InvalidRequest`, `InsecureEndpoint`.
        """
        check_library()
        self._closing = ExitStack()
        with self._closing:
            self._folder = self._make_folder()
            self.address = address or f"ipc://{self._folder}/handshake"
            check_endpoint(self.address, curve=curve, insecure_tcp=insecure_tcp)
            self._curve, self.limits = curve, limits
            self._context: Context = zmq.Context()
            self._closing.callback(self._context.destroy, 0)
            if curve is not None:
                self._authenticate(curve)
            self._handshake = self._bind(zmq.ROUTER, self.address)
            if self.address.startswith("tcp://"):  # its port may have been any
                self.address = self._handshake.getsockopt_string(zmq.LAST_ENDPOINT)
            self._input = self._bind(zmq.ROUTER, self._data_address("input"), payloads=True)
            self._input_address = self._input.getsockopt_string(zmq.LAST_ENDPOINT)
            self._closing = self._closing.pop_all()
        salt_key = secrets.token_bytes(32)
        self._salt_key = salt_key if own_salts else b""
        self._balancer = Balancer(salt_key)
        self._closing.callback(self._balancer.close)
        self.engines: dict[bytes, Engine] = {}
        self.dropped = 0
        """Messages of workers that could not be read"""
        self.changed = threading.Condition()
        """Notified when a worker comes or goes."""
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._serial = 0
        self._outputs = 0
        self._standby: set[bytes] = set()
        """Names under which another worker has said HELLO"""
        self._lock = threading.RLock()  # streams that are dropped are aborted wherever the garbage collector runs
        self._end: RadixgenError | None = None
        self._thread = threading.Thread(target=self._run, name="radixgen-front", daemon=True)
        self._thread.start()

    # -- from any thread ----------------------------------------------------------------------------------

    def live(self) -> list[Engine]:
        """The workers that can be sent to, by index."""
        return sorted((one for one in list(self.engines.values()) if one.ready is not None), key=lambda one: one.index)

    def blocks(self, prompt: Sequence[int], salt: str | None) -> Blocks:
        """What a request with this prompt is routed by."""
        return self._balancer.blocks(prompt, salt)

    def choose(self, index: int | None = None, blocks: Blocks = ()) -> Engine:
        """The worker of this index, or the one that `Router` chooses for these blocks. Raises `EngineDead`."""
        self._ensure_open()
        live = self.live()
        if index is None and live:
            serial = self._balancer.choose(blocks)
            found = [one for one in live if one.serial == serial]
        else:
            found = [one for one in live if one.index == index]
        if not found:
            raise EngineDead("no worker is there" if index is None else f"worker {index} is not there")
        return found[0]

    def add(self, engine: Engine, request: wire.Add, inbox: Inbox, blocks: Blocks = ()) -> None:
        """Send a request whose prompt has these blocks; what is told of it goes to `inbox`. Raises `QueueFull` where
        the worker takes no more.
        """
        payload = wire.encode(request)
        self._require_room(engine, payload)
        asked = request.sampling_params
        # At once, for `choose` to count it
        self._balancer.sent(request.request_id, engine.serial, blocks, asked.max_tokens if asked else None)
        engine.requests[request.request_id] = inbox
        self._post(engine, lambda: self._send(engine, [wire.ADD, payload]), inbox)

    def expect(self, engine: Engine, request_id: str, inbox: Inbox) -> None:
        """Have what is told of a request that was not added, a fork, go to `inbox`."""
        self._balancer.sent(request_id, engine.serial, (), None)
        self._post(engine, lambda: engine.requests.update({request_id: inbox}), inbox)

    def abort(self, engine: Engine, request_ids: list[str]) -> None:
        """Ask a worker to end requests; each is told its end."""
        self._post(engine, lambda: self._send(engine, [wire.ABORT, wire.encode(request_ids)]), None)

    def forget(self, engine: Engine, request_id: str) -> None:
        """Nobody waits for a request any more."""

        def drop() -> None:
            engine.requests.pop(request_id, None)
            self._balancer.ended(request_id)

        self._post(engine, drop, None)

    def call(self, engine: Engine, method: str, arguments: tuple[Any, ...], inbox: Inbox) -> int:
        """Call a utility; its reply goes to `inbox`. Returns the call's number. Raises `QueueFull`."""
        call_id = self.new_serial()
        payload = wire.encode(wire.Call(0, call_id, method, Raw(wire.encode(arguments))))
        self._require_room(engine, payload)

        def send() -> None:
            engine.calls[call_id] = inbox
            self._send(engine, [wire.UTILITY, payload])

        self._post(engine, send, inbox)
        return call_id

    def forget_call(self, engine: Engine, call_id: int) -> None:
        """Nobody waits for a reply any more."""

        def drop() -> None:
            engine.calls.pop(call_id, None)

        self._post(engine, drop, None)

    def new_serial(self) -> int:
        with self._lock:
            self._serial += 1
            return self._serial

    def wait(self, count: int, timeout: float) -> None:
        """Wait until so many workers are there. Raises `EngineDead` where they are not within `timeout` seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.live()) >= count or self._end is not None, timeout):
                raise EngineDead(f"{len(self.live())} of {count} workers came within {timeout:g} s: {self.address}")
        self._ensure_open()

    def close(self, error: RadixgenError | None = None) -> None:
        """Whoever still waits gets `error`, or `EngineClosed`. May be called twice."""
        with self._lock:
            self._end = self._end or error or EngineClosed("the client is closed")
        self._wake()
        self._thread.join()

    # -- in the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._end is None:
                self._poll()
        except Exception as error:
            logger.critical("the front end failed; every open request ends", exc_info=error)
            with self._lock:
                self._end = EngineDead(f"the front end failed: {error!r}")
        with self._closing:
            self._run_jobs()
            for engine in list(self.engines.values()):
                self._give_up(engine, self._end)
            self._handshake.close()
            self._input.close()
        with self._lock:
            wake_fd, self._wake_fd = self._wake_fd, -1
            os.close(wake_fd)
        with self.changed:
            self.changed.notify_all()

    def _poll(self) -> None:
        engines = list(self.engines.values())
        watched: list[Interest] = [
            (socket, zmq.POLLIN) for one in engines for socket in (one.output.socket, one.output.monitor)
        ]
        watched += [(one, zmq.POLLIN) for one in (self._wake_fd, self._handshake, self._input)]
        timeout = _RETRY_MS if any(one.unsent for one in engines) else _POLL_MS
        happened = ready(watched, timeout)
        if self._wake_fd in happened:
            os.eventfd_read(self._wake_fd)
        self._run_jobs()
        if self._handshake in happened:
            self._each(self._handshake, self._greet)
        if self._input in happened:
            self._each(self._input, self._register)
        now = time.monotonic()
        for engine in engines:
            self._attend(engine, happened, now)

    def _attend(self, engine: Engine, happened: set[object], now: float) -> None:
        """Receive, send, and see whether the worker is still there."""
        if engine.output.socket in happened:
            self._receive(engine)
        if self.engines.get(engine.identity) is not engine:
            return
        if engine.output.monitor in happened:
            engine.output.watch()
        self._flush(engine)
        if engine.output.lost(now):
            self._give_up(engine, EngineDead(f"worker {engine.index} is gone"))

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _each(self, socket: "zmq.Socket[bytes]", handle: Callable[[bytes, bytes], None]) -> None:
        """Handle what has come, as the sender's identity and one frame; what can't be read is dropped and counted."""
        for _ in range(_BURST):
            try:
                identity, *frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                handle(identity, frames[0] if len(frames) == 1 else b"")
            except RadixgenError as error:
                self._drop(identity, error)

    def _greet(self, identity: bytes, frame: bytes) -> None:
        """HELLO and READY. A HELLO in the name of a worker that is there is answered when that one is gone."""
        if len(identity) == 2 and wire.decode(frame, wire.Status).status == "HELLO":
            self._welcome(identity)

    def _welcome(self, identity: bytes) -> None:
        known = self.engines.get(identity)
        if known is not None and known.output.connected:
            logger.warning("another worker of index %d waits for the end of the first", known.index)
            self._standby.add(identity)
            return
        if known is not None:
            self._give_up(known, EngineDead(f"worker {known.index} began anew"))
        self._outputs += 1
        output = self._bind(zmq.PULL, self._data_address(f"output-{self._outputs}"))
        address = output.getsockopt_string(zmq.LAST_ENDPOINT)
        self.engines[identity] = Engine(identity, self._outputs, Watched(output))
        addresses = wire.Addresses([self._input_address], [address])
        init = wire.Init(addresses, heartbeat=HEARTBEAT_SECONDS, salt_key=self._salt_key)
        with suppress(zmq.ZMQError):  # it is gone again
            self._handshake.send_multipart([identity, wire.encode(init)], zmq.DONTWAIT)

    def _register(self, identity: bytes, frame: bytes) -> None:
        """A worker has dialled in."""
        engine = self.engines.get(identity)
        if engine is None or engine.ready is not None:
            raise wire.Malformed("an input from nobody who is expected")
        engine.ready = wire.decode(frame, wire.Ready)
        self._balancer.joined(engine.serial, engine.ready)
        with self.changed:
            self.changed.notify_all()

    def _receive(self, engine: Engine) -> None:
        for _ in range(_BURST):
            try:
                frames = engine.output.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            if frames == [wire.DEAD]:
                self._give_up(engine, EngineDead(f"worker {engine.index} has ended"))
                return
            try:
                self._hand_out(engine, wire.decode(frames[0], wire.Outputs))
            except wire.Malformed as error:
                self._drop(engine.identity, error)

    def _hand_out(self, engine: Engine, message: wire.Outputs) -> None:
        for output in message.outputs:
            inbox = engine.requests.get(output.request_id)
            if output.finished:
                engine.requests.pop(output.request_id, None)
                self._balancer.ended(output.request_id)
            if inbox is not None:
                inbox.put(output)
        reply = message.utility_output
        if reply is not None and (waiting := engine.calls.pop(reply.call_id, None)) is not None:
            waiting.put(reply)

    def _send(self, engine: Engine, frames: list[bytes]) -> None:
        engine.unsent.append([engine.identity, *frames])
        self._flush(engine)

    def _flush(self, engine: Engine) -> None:
        while engine.unsent:
            try:
                self._input.send_multipart(engine.unsent[0], zmq.DONTWAIT)
            except zmq.Again:
                return
            except zmq.ZMQError:  # it has no connection; whether it is dead, the output's tells
                return
            engine.unsent.popleft()

    def _give_up(self, engine: Engine, error: RadixgenError) -> None:
        """A worker is no more: so are its requests."""
        if self.engines.get(engine.identity) is engine:
            del self.engines[engine.identity]
        self._balancer.died(engine.serial)
        engine.ready = None
        for inbox in (*engine.requests.values(), *engine.calls.values()):
            inbox.put(error)
        engine.requests.clear()
        engine.calls.clear()
        engine.unsent.clear()
        engine.output.close()
        with self.changed:
            self.changed.notify_all()
        if engine.identity in self._standby and self._end is None:
            self._standby.discard(engine.identity)
            self._welcome(engine.identity)

    def _drop(self, identity: bytes, error: Exception) -> None:
        if not self.dropped:
            logger.warning("dropped a message of %s, and will not mention others: %s", identity.hex(), error)
        self.dropped += 1

    # -- inside -------------------------------------------------------------------------------------------

    def _post(self, engine: Engine, job: Callable[[], None], inbox: Inbox | None) -> None:
        """Run in the thread, unless the worker is gone by then."""

        def checked() -> None:
            if self.engines.get(engine.identity) is engine:
                job()
            elif inbox is not None:
                inbox.put(EngineDead(f"worker {engine.index} is gone"))

        with self._lock:
            if self._end is None:
                self._jobs.append(checked)
                os.eventfd_write(self._wake_fd, 1)
                return
        if inbox is not None:
            raise self._end

    def _wake(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _require_room(self, engine: Engine, payload: bytes) -> None:
        if len(payload) > self.limits.max_frame_bytes:
            raise InvalidRequest("len(request)", len(payload), f"at most {self.limits.max_frame_bytes} bytes")
        waiting, most = len(engine.unsent) + len(self._jobs), self.limits.max_waiting
        if waiting >= most:
            raise QueueFull("unsent", waiting + 1, f"at most {most} messages wait for a worker")

    def _ensure_open(self) -> None:
        if self._end is not None:
            raise self._end

    def _make_folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="radixgen-")  # for its owner alone
        self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _data_address(self, name: str) -> str:
        """Where data goes: by ipc in a folder of its own, by TCP at the handshake's host."""
        if self.address.startswith("ipc://"):
            return f"ipc://{self._folder}/{name}"
        return f"{self.address.rpartition(':')[0]}:*"

    def _bind(self, kind: int, address: str, *, payloads: bool = False) -> "zmq.Socket[bytes]":
        socket = open_socket(self._context, kind, self.limits, payloads=payloads, heartbeat=HEARTBEAT_SECONDS)
        socket.setsockopt(zmq.MAXMSGSIZE, 2 * self.limits.max_outbox_bytes)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if self._curve is not None and address.startswith("tcp:"):
            self._curve.bind(socket)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close()
            raise InvalidRequest("address", address, f"cannot be bound: {error}") from error
        return socket

    def _authenticate(self, curve: Curve) -> None:
        """Only workers whose public keys are in the folder may connect."""
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        self._closing.callback(authenticator.stop)
        authenticator.configure_curve(domain="*", location=str(Path(curve.peers)))
