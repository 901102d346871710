"""Connection of a worker to one process of a front end: requests in, a bounded outbox of messages out."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from radixgen.core import Limits
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.endpoint import Context, Curve, MonitoredSocket, open_socket
from radixgen.serve.zmq.service import Message, Peer

logger = logging.getLogger(__name__)


OVERFLOW = "outbox overflow: the front end reads too slowly, unsent messages were dropped"


@dataclass(slots=True)
class _Waiting:
    """Message that could not be sent yet."""

    data: bytes
    kept: list[Message]
    """Last outputs of requests, and replies: they survive an overflow."""


class Link:
    """Sockets to the input and output address of one front-end process. Used by the I/O thread only.

    The outbox holds at most `Limits.max_outbox_bytes`. When it overflows, it is reduced to a last output per request
    (`abort`, since tokens were lost) and a failure per call; until those are sent, nothing is read from this front end.
    """

    def __init__(
        self,
        context: Context,
        peer: Peer,
        addresses: tuple[str, str],
        *,
        engine_index: int,
        limits: Limits,
        curve: Curve | None = None,
        heartbeat: float = 0.0,
    ) -> None:
        """addresses: input and output address of the front end."""
        self.peer = peer
        self.output_address = addresses[1]
        self.overflowed = False
        """Whether the outbox overflowed, and its rest is not sent yet"""
        self._engine_index = engine_index
        self._limits = limits
        self._outbox: deque[_Waiting] = deque()
        self._outbox_bytes = 0
        self._open: set[str] = set()
        """Requests with an output, but without their last output"""
        self._cut: set[str] = set()
        """Open requests of which outputs were dropped"""
        sockets = []
        for address, kind in zip(addresses, (zmq.DEALER, zmq.PUSH), strict=True):
            identity = engine_index.to_bytes(2, "little") if kind == zmq.DEALER else None
            payloads = kind == zmq.DEALER
            socket = open_socket(
                context, kind, limits, identity=identity, payloads=payloads, heartbeat=heartbeat, once=True
            )
            if curve is not None and address.startswith("tcp:"):
                curve.connect(socket)
            sockets.append(MonitoredSocket(socket))
            socket.connect(address)
        self.input, self.output = sockets

    @property
    def waiting(self) -> int:
        """Bytes in the outbox."""
        return self._outbox_bytes

    def lost(self, now: float) -> bool:
        """Whether a connection to the front end was lost."""
        return self.input.lost(now) or self.output.lost(now)

    def watch(self) -> None:
        """Read the connection events of both sockets."""
        self.input.watch()
        self.output.watch()

    def greet(self, ready: wire.Ready) -> None:
        """Send the first message on the input socket."""
        self.input.socket.send(wire.encode(ready), zmq.DONTWAIT)

    def receive(self) -> list[bytes] | None:
        """Frames of the next message, or None if there is none."""
        try:
            frames = self.input.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        self.peer.counters.received += 1
        return frames

    def tell(self, messages: Sequence[Message], load: wire.Load | None = None) -> bool:
        """Send messages, or queue them. Returns False if the outbox overflows: then abort the front end's requests."""
        outputs = [message for message in messages if isinstance(message, wire.Output)]
        if self._cut:
            outputs = self._abridge(outputs)
        if outputs:
            self._enqueue(outputs, load)
        for reply in messages:
            if isinstance(reply, wire.Reply):
                self._enqueue_reply(reply)
        self.flush()
        if self._outbox_bytes <= self._limits.max_outbox_bytes or self.overflowed:
            return True
        self._overflow()
        return False

    def flush(self) -> None:
        """Send as much of the outbox as the socket accepts."""
        while self._outbox:
            try:
                self.output.socket.send(self._outbox[0].data, zmq.DONTWAIT)
            except zmq.Again:
                return
            self._outbox_bytes -= len(self._outbox.popleft().data)
            self.peer.counters.sent += 1
        self.overflowed = bool(self._cut)

    def farewell(self) -> None:
        """Notify the front end that the engine is dead."""
        self.flush()
        try:
            self.output.socket.send(wire.DEAD, zmq.DONTWAIT)
        except zmq.Again:
            logger.warning("%s does not read, and was not notified that the engine is dead", self.peer.name)

    def close(self, linger: float = 0.0) -> None:
        self.input.close()
        self.output.close(linger)

    # -- inside -------------------------------------------------------------------------------------------

    def _enqueue(self, outputs: list[wire.Output], load: wire.Load | None = None) -> None:
        for output in outputs:
            (self._open.discard if output.finished else self._open.add)(output.request_id)
        message = wire.EngineCoreOutputs(self._engine_index, outputs, load, time.monotonic())
        self._wait(message, [output for output in outputs if output.finished])

    def _enqueue_reply(self, reply: wire.Reply) -> None:
        self._wait(wire.EngineCoreOutputs(self._engine_index, [], None, time.monotonic(), reply), [reply])

    def _wait(self, message: wire.EngineCoreOutputs, kept: "list[wire.Output] | list[wire.Reply]") -> None:
        data = wire.encode(message)
        self._outbox.append(_Waiting(data, [*kept]))
        self._outbox_bytes += len(data)

    def _overflow(self) -> None:
        logger.error("%s does not read, its outbox overflows: its requests are aborted", self.peer.name)
        self.overflowed = True
        self.peer.counters.overflows += 1
        kept = [message for waiting in self._outbox for message in waiting.kept]
        self._outbox.clear()
        self._outbox_bytes = 0
        self._cut |= self._open
        aborts = [_abort_output(message) for message in kept if isinstance(message, wire.Output)]
        if aborts:
            self._enqueue(aborts)
        for message in kept:
            if isinstance(message, wire.Reply):
                self._enqueue_reply(wire.Reply(message.call_id, OVERFLOW))

    def _abridge(self, outputs: list[wire.Output]) -> list[wire.Output]:
        """Reduce the outputs of requests that lost tokens to their last output."""
        abridged = []
        for output in outputs:
            if output.request_id not in self._cut:
                abridged.append(output)
            elif output.finished:
                self._cut.discard(output.request_id)
                abridged.append(_abort_output(output))
        return abridged


def _abort_output(output: wire.Output) -> wire.Output:
    """Last output of a request that lost tokens: `abort`, whatever its finish reason was."""
    return wire.Output(output.request_id, [], finish_reason=wire.FINISH.index("abort"), stop_reason=OVERFLOW)
