"""A worker: one engine, driven by front ends that speak vLLM's EngineCore wire. Workers connect, front ends bind."""

import logging
import os
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from math import inf

import zmq
from msgspec import Raw

from radixgen.core import InvalidRequest, RadixgenError, check_integer
from radixgen.engine.engine import Engine
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.counters import Counters, PeerCounters
from radixgen.serve.zmq.endpoint import (
    LINGER_SECONDS,
    Context,
    Curve,
    Interest,
    MonitoredSocket,
    check_endpoint,
    check_library,
    open_socket,
    ready,
)
from radixgen.serve.zmq.kv_events import KVEvents
from radixgen.serve.zmq.link import OVERFLOW, Link
from radixgen.serve.zmq.sentinel import Sentinel
from radixgen.serve.zmq.service import Message, Peer
from radixgen.serve.zmq.worker_thread import WorkerThread

logger = logging.getLogger(__name__)

_POLL_MS = 100
_BURST = 256
"""Messages read of one front end before others get their turn."""
_MAX_PROCESSES = 64
"""Of one front end"""
_RECONNECT_SECONDS = 0.2


class Worker:
    """Serves an engine, which it owns, to the front ends at some handshake addresses.

    Two threads: the one that calls `run` does all I/O, another one steps. A front end that goes away has its requests
    aborted; the worker keeps trying to reconnect to it.
    """

    def __init__(
        self,
        engine: Engine,
        handshakes: Sequence[str],
        *,
        engine_index: int = 0,
        curve: Curve | None = None,
        insecure_tcp: bool = False,
        drain_timeout: float = 30.0,
        stall_timeout: float = 60.0,
        sentinel: Sentinel | None = None,
        kv_events: KVEvents | None = None,
    ) -> None:
        """
        handshakes: one address for each front end, ipc in a folder of this user's alone, or TCP on loopback; other TCP
            takes `curve`, or `insecure_tcp`.
        engine_index: index of this worker, unique per front end; its name on the wire.
        drain_timeout: seconds that open requests have after `drain`.
        stall_timeout: seconds without a finished step, where there is work, after which the worker is unhealthy.
        sentinel: notifies front ends if this process dies.
        kv_events: the publisher of the engine's cache events, whose address front ends get.

        Raises `InvalidRequest`, `InsecureEndpoint`.
        """
        check_library()
        check_worker(handshakes, engine_index, drain_timeout, stall_timeout)
        for address in handshakes:
            check_endpoint(address, curve=curve, insecure_tcp=insecure_tcp)
        self.counters = Counters()
        self.engine_index = engine_index
        self.limits = engine.limits
        self.curve = curve
        self.insecure_tcp = insecure_tcp
        self.context: Context = zmq.Context()
        self._timeouts = drain_timeout, stall_timeout
        self._sentinel = sentinel
        self._signals = 0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stalled = False
        self._aborting = False
        self._links: dict[Peer, Link] = {}
        self._thread = WorkerThread(engine, secrets.token_bytes(32), self.wake)
        self.greeting = self._thread.service.ready()
        if kv_events is not None:
            self.greeting.kv_events_config = Raw(wire.encode(kv_events.bound_config))
        self._sessions = [_Session(self, address) for address in handshakes]

    # -- from any thread ----------------------------------------------------------------------------------

    def connect(self, address: str) -> None:
        """Serve one more front end. Raises `InvalidRequest`, `InsecureEndpoint`."""
        check_endpoint(address, curve=self.curve, insecure_tcp=self.insecure_tcp)
        self._sessions.append(_Session(self, address))
        self.wake()

    def drain(self) -> None:
        """Take no more requests, end those that are open within the drain timeout, and return from `run`. Called once
        more: at once. May be called by a signal handler.
        """
        self._signals += 1
        self.wake()

    def wake(self) -> None:
        if self._wake_fd >= 0:
            with suppress(OSError):  # it can't count any further
                os.eventfd_write(self._wake_fd, 1)

    @property
    def draining(self) -> bool:
        return self._signals > 0

    @property
    def healthy(self) -> bool:
        """False once the engine failed, and while it has work and has finished no step for too long."""
        return self._thread.failure is None and not self._thread.stalled(self._timeouts[1])

    # -- in the thread that polls -------------------------------------------------------------------------

    def run(self) -> bool:
        """Serve until `drain` is called or the engine fails. Whether it was drained, with the end of every request
        sent. To be called once.
        """
        with ExitStack() as stack:
            stack.callback(self._close_wake)
            stack.callback(self.context.destroy, 0)
            self._thread.engine_thread.start()
            stack.callback(self._stop)
            return self._serve()

    def open_link(self, link: Link) -> None:
        self._links[link.peer] = link
        self._inform_sentinel()

    def drop_link(self, link: Link) -> None:
        """Its front end is gone."""
        del self._links[link.peer]
        self._inform_sentinel()
        self._thread.post(partial(self._thread.service.leave, link.peer))
        link.close()

    def counters_of(self, name: str) -> PeerCounters:
        return self.counters.peers.setdefault(name, PeerCounters())

    def _serve(self) -> bool:
        drain_timeout, _ = self._timeouts
        deadline: float | None = None
        while self._thread.failure is None:
            self._poll()
            now = time.monotonic()
            for session in self._sessions:
                session.attend(now)
            self._check_health()
            if self._signals > 1:
                logger.warning("stopped at once")
                return False
            if self._signals and deadline is None:
                logger.info("draining for at most %g seconds", drain_timeout)
                deadline = now + drain_timeout
                self._thread.post(self._begin_drain)
            elif deadline is not None and self._drained(now, deadline):
                return self._end()
        self._deliver()
        self._end()
        return False

    def _poll(self) -> None:
        """Wait for something to happen, then do all I/O that can be done."""
        reading = self._may_read()
        watched: list[Interest] = [(self._wake_fd, zmq.POLLIN)]
        for link in self._links.values():
            watched += [(link.input.monitor, zmq.POLLIN), (link.output.monitor, zmq.POLLIN)]
            if reading and not link.overflowed:
                watched.append((link.input.socket, zmq.POLLIN))
            if link.waiting:
                watched.append((link.output.socket, zmq.POLLOUT))
        for session in self._sessions:
            watched += [(socket, zmq.POLLIN) for socket in session.sockets]
        happened = ready(watched, _POLL_MS)
        if self._wake_fd in happened:
            os.eventfd_read(self._wake_fd)
        self._deliver()
        for link in list(self._links.values()):
            if link.input.monitor in happened or link.output.monitor in happened:
                link.watch()
            if link.waiting or link.overflowed:
                link.flush()
            if link.input.socket in happened:
                self._read(link)

    def _may_read(self) -> bool:
        """Whether the engine keeps up with its jobs."""
        jobs, size = self._thread.backlog
        return jobs < self.limits.max_backlog and size < self.limits.max_backlog_bytes

    def _read(self, link: Link) -> None:
        for _ in range(_BURST):
            if link.overflowed or not self._may_read():
                return
            frames = link.receive()
            if frames is None:
                return
            self._handle(link, frames)

    def _handle(self, link: Link, frames: list[bytes]) -> None:
        """Read a message of a front end, whatever it is."""
        counters = link.peer.counters
        kind, payload = frames[0], frames[1] if len(frames) > 1 else b""
        if kind not in (wire.ADD, wire.ABORT, wire.START_WAVE, wire.UTILITY):
            self._note(link, "unknown", f"a message of type {kind[:8]!r}")
            counters.unknown += 1
            return
        try:
            if not 2 <= len(frames) <= self.limits.max_frames:
                raise wire.Malformed(f"{len(frames)} frames")
            self._dispatch(link, kind, payload)
        except wire.Malformed as error:
            self._note(link, "malformed", str(error))
            counters.malformed += 1
            name = wire.request_id_of(payload) if kind == wire.ADD else None
            if name is not None:
                refuse = partial(self._thread.service.refuse_unread, link.peer, name, error)
                self._thread.post(refuse, len(name))

    def _dispatch(self, link: Link, kind: bytes, payload: bytes) -> None:
        """Post a message of a front end to the engine. Raises `Malformed`."""
        peer, service, post = link.peer, self._thread.service, self._thread.post
        if kind == wire.ADD:
            request = wire.decode(payload, wire.Add)
            peer.counters.adds += 1
            post(partial(service.add, peer, request), len(payload))
        elif kind == wire.ABORT:
            names = wire.decode(payload, list[str])
            peer.counters.aborts += 1
            post(partial(service.abort, peer, names), len(payload))
        elif kind == wire.UTILITY:
            call = wire.decode(payload, wire.Call)
            peer.counters.calls += 1
            if call.method == "is_healthy":
                self._check_health()
                self._send(link, [wire.Reply(call.call_id, None, (None, self.healthy))])
            elif call.method == "counters":
                self._send(link, [wire.Reply(call.call_id, None, (None, self.counters.as_dict()))])
            else:
                post(partial(service.call, peer, call), len(payload))
        else:
            peer.counters.ignored += 1

    def _deliver(self) -> None:
        """Send the engine's messages."""
        new = self._thread.take()
        load, self._thread.load = self._thread.load, None
        messages: dict[Peer, list[Message]] = {}
        for peer, message in new:
            messages.setdefault(peer, []).append(message)
        for peer, own in messages.items():
            if peer in self._links:
                self._send(self._links[peer], own, load)

    def _send(self, link: Link, messages: list[Message], load: wire.Load | None = None) -> None:
        if not link.tell(messages, load):
            self._thread.post(partial(self._thread.service.abort_overflowed, link.peer, OVERFLOW))

    def _note(self, link: Link, field: str, what: str) -> None:
        """Log the first of its kind of a front end; the rest are counted."""
        if not getattr(link.peer.counters, field):
            logger.warning("%s: dropped %s, and will not mention others: %s", link.peer.name, field, what)

    def _check_health(self) -> None:
        stalled = self._thread.stalled(self._timeouts[1])
        if stalled and not self._stalled:
            self.counters.stalls += 1
            logger.critical("unhealthy: there is work, and nothing was done for %g seconds", self._timeouts[1])
        elif self._stalled and not stalled:
            logger.warning("healthy again")
        self._stalled = stalled

    def _inform_sentinel(self) -> None:
        if self._sentinel is not None:
            self._sentinel.watch([link.output_address for link in self._links.values()])

    # -- the end ------------------------------------------------------------------------------------------

    def _begin_drain(self) -> None:
        self._thread.service.draining = True

    def _drained(self, now: float, deadline: float) -> bool:
        """Whether everything was sent, or must be given up."""
        if self._thread.quiet:
            self._deliver()
            return not any(link.waiting for link in self._links.values()) or now > deadline + LINGER_SECONDS
        if now > deadline and not self._aborting:
            self._aborting = True
            self._thread.post(partial(self._thread.service.abort_all, "the worker stops"))
        return now > deadline + LINGER_SECONDS

    def _end(self) -> bool:
        """Tell front ends that the engine has ended. Whether the end of every request was sent."""
        for link in self._links.values():
            link.farewell()
        return self._thread.quiet and not any(link.waiting for link in self._links.values())

    def _close_wake(self) -> None:
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)

    def _stop(self) -> None:
        for link in self._links.values():
            link.close(LINGER_SECONDS if self._signals < 2 else 0.0)
        self._links.clear()
        for session in self._sessions:
            session.close()
        self._thread.engine_thread.stop()
        if self._signals < 2 and not self._thread.engine_thread.join(LINGER_SECONDS):
            logger.error("the step that runs is not waited for")
        # Closed sockets linger in the context's own thread; it is destroyed when they are done.
        if self._signals < 2:
            self.context.term()


def check_worker(handshakes: Sequence[str], engine_index: int, drain_timeout: float, stall_timeout: float) -> None:
    """Raise `InvalidRequest` for the first that is out of its range."""
    if not handshakes:
        raise InvalidRequest("handshakes", handshakes, "must name at least one address: --handshake or --smg")
    check_integer("engine_index", engine_index, 0, 2**16 - 1)
    for field, seconds in (("drain_timeout", drain_timeout), ("stall_timeout", stall_timeout)):
        if not 0 <= seconds < 1e9:
            raise InvalidRequest(field, seconds, "must be a number of seconds from 0")


class _Session:
    """A worker and one front end: the handshake, then a link to each of its processes, and again when it is gone."""

    def __init__(self, worker: Worker, address: str) -> None:
        self.address = address
        self._worker = worker
        self._socket: MonitoredSocket | None = None
        self._links: list[Link] = []
        self._reconnect_at = 0.0

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """Those of a handshake."""
        return [self._socket.socket, self._socket.monitor] if self._socket is not None else []

    def connect(self) -> None:
        """Say HELLO; a front end that is not there yet gets it when it comes."""
        worker = self._worker
        logger.info("worker %d connects to %s", worker.engine_index, self.address)
        identity = worker.engine_index.to_bytes(2, "little")
        socket = open_socket(worker.context, zmq.DEALER, worker.limits, identity=identity)
        if worker.curve is not None and self.address.startswith("tcp:"):
            worker.curve.connect(socket)
        self._socket = MonitoredSocket(socket)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            worker.counters.bad_handshakes += 1
            logger.error("cannot connect to %s: %s", self.address, error)
            self._hang_up(time.monotonic())
            return
        socket.send(wire.encode(wire.Status("HELLO", local=True, headless=True)), zmq.DONTWAIT)

    def attend(self, now: float) -> None:
        """Go on with the handshake, or see whether the front end is still there."""
        if self._links:
            if any(link.lost(now) for link in self._links):
                self._lose(now)
        elif self._socket is None:
            if now >= self._reconnect_at:
                self.connect()
        else:
            self._shake(self._socket, now)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _shake(self, socket: MonitoredSocket, now: float) -> None:
        socket.watch()
        try:
            frames = socket.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            if socket.lost(-inf):  # it got HELLO, and went away
                self._hang_up(now)
            return
        try:
            self._open(wire.decode(frames[0], wire.Init))
        except (RadixgenError, zmq.ZMQError) as error:
            self._worker.counters.bad_handshakes += 1
            logger.error("%s: a bad handshake: %s", self.address, error)
            self._hang_up(now)
        else:
            self._worker.counters.handshakes += 1
            logger.info("%s: linked", self.address)
            socket.socket.send(wire.encode(wire.Status("READY")), zmq.DONTWAIT)
            socket.close(LINGER_SECONDS)
            self._socket = None

    def _open(self, init: wire.Init) -> None:
        """Link to each of the front end's processes. Raises `RadixgenError`; then to none."""
        worker, addresses = self._worker, init.addresses
        if not 0 < len(addresses.inputs) == len(addresses.outputs) <= _MAX_PROCESSES:
            limit = f"as many as outputs, from 1 to {_MAX_PROCESSES}"
            raise InvalidRequest("len(inputs)", len(addresses.inputs), limit)
        pairs = list(zip(addresses.inputs, addresses.outputs, strict=True))
        for address in (*addresses.inputs, *addresses.outputs):
            check_endpoint(address, curve=worker.curve, insecure_tcp=worker.insecure_tcp)
        heartbeat = min(max(init.heartbeat, 0.1), 60.0) if init.heartbeat > 0 else 0.0
        try:
            for number, pair in enumerate(pairs):
                name = f"{self.address}#{number}"
                self._link(Peer(name, worker.counters_of(name), salt_key=init.salt_key), pair, heartbeat)
        except BaseException:
            self._drop_links()
            raise

    def _link(self, peer: Peer, pair: tuple[str, str], heartbeat: float) -> None:
        worker = self._worker
        link = Link(
            worker.context,
            peer,
            pair,
            engine_index=worker.engine_index,
            limits=worker.limits,
            curve=worker.curve,
            heartbeat=heartbeat,
        )
        link.greet(worker.greeting)
        self._links.append(link)
        worker.open_link(link)

    def _lose(self, now: float) -> None:
        logger.warning("%s is gone: its requests are aborted", self.address)
        for link in self._links:
            link.peer.counters.lost += 1
        self._drop_links()
        self._reconnect_at = now

    def _drop_links(self) -> None:
        for link in self._links:
            self._worker.drop_link(link)
        self._links.clear()

    def _hang_up(self, now: float) -> None:
        self.close()
        self._reconnect_at = now + _RECONNECT_SECONDS


def run_until_signalled(worker: Worker) -> bool:
    """As `Worker.run`, from the main thread: SIGTERM and SIGINT drain, and the second of them ends the process."""

    def stop(*_: object) -> None:
        if worker.draining:
            os._exit(1)
        worker.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return worker.run()
