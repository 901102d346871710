"""Front end of workers: the sockets that workers connect to, and the thread that owns them."""

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
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.balancer import Balancer, Blocks
from radixgen.serve.zmq.endpoint import (
    HEARTBEAT_SECONDS,
    Context,
    Curve,
    Interest,
    MonitoredSocket,
    check_endpoint,
    check_library,
    open_socket,
    ready,
)

logger = logging.getLogger(__name__)

_POLL_MS, _RETRY_MS = 100, 5
_BURST = 256


class Inbox(Protocol):
    """Receiver of the outputs of one request, or of the reply to one call."""

    def put(self, item: "wire.Output | wire.Reply | RadixgenError") -> None:
        """Add an item, from the front end's thread. The last item has a finish reason, is a reply, or is an error."""


@dataclass(eq=False)
class RemoteWorker:
    """A connected worker, with its open requests and calls."""

    identity: bytes
    serial: int
    """Number of this worker, never reused"""
    output: MonitoredSocket
    ready: wire.Ready | None = None
    """Message that ends the handshake; None before"""
    requests: dict[str, Inbox] = field(default_factory=dict)
    calls: dict[int, Inbox] = field(default_factory=dict)
    unsent: deque[list[bytes]] = field(default_factory=deque)

    @property
    def index(self) -> int:
        """Index of the worker, unique among the connected workers of a front end."""
        return int.from_bytes(self.identity, "little")


class FrontEnd:
    """Accepts workers, sends them requests, and delivers their outputs to inboxes, from its own thread. Thread-safe.

    If a worker dies, its requests fail with `EngineDead`. Workers may connect or reconnect at any time.
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
        address: handshake address; default: ipc in a new folder.
        own_salts: whether workers hash cache salts with this front end's key instead of their own. Then requests with
            a salt are routed by their cached prefixes too, but share none with other front ends.

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
            if self.address.startswith("tcp://"):  # with the port, which may have been *
                self.address = self._handshake.getsockopt_string(zmq.LAST_ENDPOINT)
            self._input = self._bind(zmq.ROUTER, self._data_address("input"), payloads=True)
            self._input_address = self._input.getsockopt_string(zmq.LAST_ENDPOINT)
            self._closing = self._closing.pop_all()
        salt_key = secrets.token_bytes(32)
        self._salt_key = salt_key if own_salts else b""
        self._balancer = Balancer(salt_key)
        self._closing.callback(self._balancer.close)
        self.workers: dict[bytes, RemoteWorker] = {}
        self.dropped = 0
        """Number of malformed messages from workers"""
        self.changed = threading.Condition()
        """Notified when a worker connects or leaves"""
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._serial = 0
        self._outputs = 0
        self._standby: set[bytes] = set()
        """Identities for which a second worker waits until the first is gone"""
        self._lock = threading.RLock()  # reentrant: the garbage collector may abort streams in any thread
        self._end: RadixgenError | None = None
        self._thread = threading.Thread(target=self._run, name="radixgen-front", daemon=True)
        self._thread.start()

    # -- from any thread ----------------------------------------------------------------------------------

    def live(self) -> list[RemoteWorker]:
        """Workers that are ready, sorted by index."""
        ready = [worker for worker in list(self.workers.values()) if worker.ready is not None]
        return sorted(ready, key=lambda worker: worker.index)

    def blocks(self, prompt: Sequence[int], salt: str | None) -> Blocks:
        """Block hashes by which to route a request with this prompt and cache salt."""
        return self._balancer.blocks(prompt, salt)

    def choose(self, index: int | None = None, blocks: Blocks = ()) -> RemoteWorker:
        """Worker with this index, or the one that `Router` chooses for these blocks. Raises `EngineDead`."""
        self._ensure_open()
        live = self.live()
        if index is None and live:
            serial = self._balancer.choose(blocks)
            matches = [worker for worker in live if worker.serial == serial]
        else:
            matches = [worker for worker in live if worker.index == index]
        if not matches:
            raise EngineDead("no worker is connected" if index is None else f"worker {index} is not connected")
        return matches[0]

    def add(self, worker: RemoteWorker, request: wire.Add, inbox: Inbox, blocks: Blocks = ()) -> None:
        """Send a request whose prompt has these blocks; its outputs go to `inbox`. Raises `QueueFull`."""
        payload = wire.encode(request)
        self._require_room(worker, payload)
        sampling = request.sampling_params
        # Counted now, so that the next `choose` sees it
        self._balancer.sent(request.request_id, worker.serial, blocks, sampling.max_tokens if sampling else None)
        worker.requests[request.request_id] = inbox
        self._post(worker, lambda: self._send(worker, [wire.ADD, payload]), inbox)

    def expect(self, worker: RemoteWorker, request_id: str, inbox: Inbox) -> None:
        """Deliver the outputs of a fork, which is never sent as a request of its own, to `inbox`."""
        self._balancer.sent(request_id, worker.serial, (), None)
        self._post(worker, lambda: worker.requests.update({request_id: inbox}), inbox)

    def abort(self, worker: RemoteWorker, request_ids: list[str]) -> None:
        """Abort requests; each still gets a last output."""
        self._post(worker, lambda: self._send(worker, [wire.ABORT, wire.encode(request_ids)]), None)

    def forget(self, worker: RemoteWorker, request_id: str) -> None:
        """Drop further outputs of a request."""

        def drop() -> None:
            worker.requests.pop(request_id, None)
            self._balancer.ended(request_id)

        self._post(worker, drop, None)

    def call(self, worker: RemoteWorker, method: str, arguments: tuple[Any, ...], inbox: Inbox) -> int:
        """Call a utility; its reply goes to `inbox`. Returns the id of the call. Raises `QueueFull`."""
        call_id = self.new_serial()
        payload = wire.encode(wire.Call(0, call_id, method, Raw(wire.encode(arguments))))
        self._require_room(worker, payload)

        def send() -> None:
            worker.calls[call_id] = inbox
            self._send(worker, [wire.UTILITY, payload])

        self._post(worker, send, inbox)
        return call_id

    def forget_call(self, worker: RemoteWorker, call_id: int) -> None:
        """Drop the reply to a call."""

        def drop() -> None:
            worker.calls.pop(call_id, None)

        self._post(worker, drop, None)

    def new_serial(self) -> int:
        """A number that was not returned before."""
        with self._lock:
            self._serial += 1
            return self._serial

    def wait(self, count: int, timeout: float) -> None:
        """Wait until `count` workers are ready. Raises `EngineDead` after `timeout` seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.live()) >= count or self._end is not None, timeout):
                raise EngineDead(
                    f"{len(self.live())} of {count} workers connected within {timeout:g} s: {self.address}"
                )
        self._ensure_open()

    def close(self, error: RadixgenError | None = None) -> None:
        """Fail open requests and calls with `error`, by default `EngineClosed`. May be called twice."""
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
            for worker in list(self.workers.values()):
                self._give_up(worker, self._end)
            self._handshake.close()
            self._input.close()
        with self._lock:
            wake_fd, self._wake_fd = self._wake_fd, -1
            os.close(wake_fd)
        with self.changed:
            self.changed.notify_all()

    def _poll(self) -> None:
        workers = list(self.workers.values())
        interests: list[Interest] = [
            (socket, zmq.POLLIN) for worker in workers for socket in (worker.output.socket, worker.output.monitor)
        ]
        interests += [(socket, zmq.POLLIN) for socket in (self._wake_fd, self._handshake, self._input)]
        timeout = _RETRY_MS if any(worker.unsent for worker in workers) else _POLL_MS
        events = ready(interests, timeout)
        if self._wake_fd in events:
            os.eventfd_read(self._wake_fd)
        self._run_jobs()
        if self._handshake in events:
            self._receive_each(self._handshake, self._greet)
        if self._input in events:
            self._receive_each(self._input, self._register)
        now = time.monotonic()
        for worker in workers:
            self._attend(worker, events, now)

    def _attend(self, worker: RemoteWorker, events: set[object], now: float) -> None:
        """Receive from and send to a worker, and check its connection."""
        if worker.output.socket in events:
            self._receive(worker)
        if self.workers.get(worker.identity) is not worker:
            return
        if worker.output.monitor in events:
            worker.output.watch()
        self._flush(worker)
        if worker.output.lost(now):
            self._give_up(worker, EngineDead(f"worker {worker.index} is gone"))

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _receive_each(self, socket: "zmq.Socket[bytes]", handle: Callable[[bytes, bytes], None]) -> None:
        """Call `handle(identity, frame)` for each message of a socket; drop and count malformed messages."""
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
        """Handle HELLO and READY. If the identity is in use, HELLO is answered once that worker is gone."""
        if len(identity) == 2 and wire.decode(frame, wire.Status).status == "HELLO":
            self._welcome(identity)

    def _welcome(self, identity: bytes) -> None:
        known = self.workers.get(identity)
        if known is not None and known.output.connected:
            logger.warning("a second worker with index %d waits until the first is gone", known.index)
            self._standby.add(identity)
            return
        if known is not None:
            self._give_up(known, EngineDead(f"worker {known.index} restarted"))
        self._outputs += 1
        output = self._bind(zmq.PULL, self._data_address(f"output-{self._outputs}"))
        address = output.getsockopt_string(zmq.LAST_ENDPOINT)
        self.workers[identity] = RemoteWorker(identity, self._outputs, MonitoredSocket(output))
        addresses = wire.Addresses([self._input_address], [address])
        init = wire.Init(addresses, heartbeat=HEARTBEAT_SECONDS, salt_key=self._salt_key)
        with suppress(zmq.ZMQError):  # it is gone again
            self._handshake.send_multipart([identity, wire.encode(init)], zmq.DONTWAIT)

    def _register(self, identity: bytes, frame: bytes) -> None:
        """Handle the first message of a worker on the input socket."""
        worker = self.workers.get(identity)
        if worker is None or worker.ready is not None:
            raise wire.Malformed("message from an unknown worker")
        worker.ready = wire.decode(frame, wire.Ready)
        self._balancer.joined(worker.serial, worker.ready)
        with self.changed:
            self.changed.notify_all()

    def _receive(self, worker: RemoteWorker) -> None:
        """Receive the outputs of a worker."""
        for _ in range(_BURST):
            try:
                frames = worker.output.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            if frames == [wire.DEAD]:
                self._give_up(worker, EngineDead(f"worker {worker.index} has died"))
                return
            try:
                self._deliver(worker, wire.decode(frames[0], wire.EngineCoreOutputs))
            except wire.Malformed as error:
                self._drop(worker.identity, error)

    def _deliver(self, worker: RemoteWorker, message: wire.EngineCoreOutputs) -> None:
        """Put outputs and replies into their inboxes."""
        for output in message.outputs:
            inbox = worker.requests.get(output.request_id)
            if output.finished:
                worker.requests.pop(output.request_id, None)
                self._balancer.ended(output.request_id)
            if inbox is not None:
                inbox.put(output)
        reply = message.utility_output
        if reply is not None and (inbox := worker.calls.pop(reply.call_id, None)) is not None:
            inbox.put(reply)

    def _send(self, worker: RemoteWorker, frames: list[bytes]) -> None:
        worker.unsent.append([worker.identity, *frames])
        self._flush(worker)

    def _flush(self, worker: RemoteWorker) -> None:
        while worker.unsent:
            try:
                self._input.send_multipart(worker.unsent[0], zmq.DONTWAIT)
            except zmq.Again:
                return
            except zmq.ZMQError:  # no connection; the output socket's monitor tells whether the worker is dead
                return
            worker.unsent.popleft()

    def _give_up(self, worker: RemoteWorker, error: RadixgenError) -> None:
        """Remove a worker, and fail its requests and calls with `error`."""
        if self.workers.get(worker.identity) is worker:
            del self.workers[worker.identity]
        self._balancer.died(worker.serial)
        worker.ready = None
        for inbox in (*worker.requests.values(), *worker.calls.values()):
            inbox.put(error)
        worker.requests.clear()
        worker.calls.clear()
        worker.unsent.clear()
        worker.output.close()
        with self.changed:
            self.changed.notify_all()
        if worker.identity in self._standby and self._end is None:
            self._standby.discard(worker.identity)
            self._welcome(worker.identity)

    def _drop(self, identity: bytes, error: Exception) -> None:
        if not self.dropped:
            logger.warning("dropped a malformed message of %s; others are only counted: %s", identity.hex(), error)
        self.dropped += 1

    # -- inside -------------------------------------------------------------------------------------------

    def _post(self, worker: RemoteWorker, job: Callable[[], None], inbox: Inbox | None) -> None:
        """Run `job` in the front end's thread. If the worker is gone by then, `inbox` gets `EngineDead`."""

        def checked() -> None:
            if self.workers.get(worker.identity) is worker:
                job()
            elif inbox is not None:
                inbox.put(EngineDead(f"worker {worker.index} is gone"))

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

    def _require_room(self, worker: RemoteWorker, payload: bytes) -> None:
        if len(payload) > self.limits.max_frame_bytes:
            raise InvalidRequest("len(request)", len(payload), f"at most {self.limits.max_frame_bytes} bytes")
        waiting, most = len(worker.unsent) + len(self._jobs), self.limits.max_waiting
        if waiting >= most:
            raise QueueFull("unsent", waiting + 1, f"at most {most} unsent messages per worker")

    def _ensure_open(self) -> None:
        if self._end is not None:
            raise self._end

    def _make_folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="radixgen-")  # accessible to its owner only
        self._closing.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _data_address(self, name: str) -> str:
        """Address of a data socket: ipc in this front end's folder, or TCP on the handshake's host."""
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
        """Accept only workers whose public keys are in the folder `curve.peers`."""
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        self._closing.callback(authenticator.stop)
        authenticator.configure_curve(domain="*", location=str(Path(curve.peers)))
