"""A worker's connection to one process of a front end: its requests in, a bounded queue of messages out."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from radixgen.core import Limits
from radixgen.serve import wire
from radixgen.serve.endpoint import Context, Curve, Watched, open_socket
from radixgen.serve.service import Message, Peer

logger = logging.getLogger(__name__)


OVERFLOW = "the front end does not read: what waited for it was dropped"


@dataclass(slots=True)
class _Waiting:
    """A message that could not be sent yet."""

    data: bytes
    kept: list[Message]
    """Ends and replies, which can't be left out."""


class Link:
    """Sockets to one input and one output address. Belongs to the thread that polls.

    More than `Limits.max_outbox_bytes` may not wait to be sent. What then waits is reduced to the end of each request
    (`abort`, for it has lost tokens) and the failure of each call, and until all of that was taken nothing is read of
    this front end.
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
        """addresses: the front end's input and output."""
        self.peer = peer
        self.output_address = addresses[1]
        self.overflowed = False
        """Whether more waited than may, and not all of what is left was taken."""
        self._engine_index = engine_index
        self._limits = limits
        self._outbox: deque[_Waiting] = deque()
        self._outbox_bytes = 0
        self._open: set[str] = set()
        """Requests of which something was told, and not the end"""
        self._cut: set[str] = set()
        """Those of them of which something was dropped"""
        sockets = []
        for address, kind in zip(addresses, (zmq.DEALER, zmq.PUSH), strict=True):
            identity = engine_index.to_bytes(2, "little") if kind == zmq.DEALER else None
            payloads = kind == zmq.DEALER
            socket = open_socket(
                context, kind, limits, identity=identity, payloads=payloads, heartbeat=heartbeat, once=True
            )
            if curve is not None and address.startswith("tcp:"):
                curve.dial(socket)
            sockets.append(Watched(socket))
            socket.connect(address)
        self.input, self.output = sockets

    @property
    def waiting(self) -> int:
        """Bytes that could not be sent yet."""
        return self._outbox_bytes

    def lost(self, now: float) -> bool:
        """Whether the front end is gone."""
        return self.input.lost(now) or self.output.lost(now)

    def watch(self) -> None:
        self.input.watch()
        self.output.watch()

    def greet(self, ready: wire.Ready) -> None:
        """The first message on an input."""
        self.input.socket.send(wire.encode(ready), zmq.DONTWAIT)

    def receive(self) -> list[bytes] | None:
        """The frames of a message, or None where none has come."""
        try:
            frames = self.input.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        self.peer.counters.received += 1
        return frames

    def tell(self, messages: Sequence[Message], load: wire.Load | None = None) -> bool:
        """Send, or keep for later. False where that was too much: the front end's requests are to be aborted."""
        outputs = [one for one in messages if isinstance(one, wire.Output)]
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
        """Send of what waits as much as is taken."""
        while self._outbox:
            try:
                self.output.socket.send(self._outbox[0].data, zmq.DONTWAIT)
            except zmq.Again:
                return
            self._outbox_bytes -= len(self._outbox.popleft().data)
            self.peer.counters.sent += 1
        self.overflowed = bool(self._cut)

    def farewell(self) -> None:
        """The engine is no more."""
        self.flush()
        try:
            self.output.socket.send(wire.DEAD, zmq.DONTWAIT)
        except zmq.Again:
            logger.warning("%s was not told the engine's end: it does not read", self.peer.name)

    def close(self, linger: float = 0.0) -> None:
        self.input.close()
        self.output.close(linger)

    # -- inside -------------------------------------------------------------------------------------------

    def _enqueue(self, outputs: list[wire.Output], load: wire.Load | None = None) -> None:
        for one in outputs:
            (self._open.discard if one.finished else self._open.add)(one.request_id)
        message = wire.Outputs(self._engine_index, outputs, load, time.monotonic())
        self._wait(message, [one for one in outputs if one.finished])

    def _enqueue_reply(self, reply: wire.Reply) -> None:
        self._wait(wire.Outputs(self._engine_index, [], None, time.monotonic(), reply), [reply])

    def _wait(self, message: wire.Outputs, kept: "list[wire.Output] | list[wire.Reply]") -> None:
        data = wire.encode(message)
        self._outbox.append(_Waiting(data, [*kept]))
        self._outbox_bytes += len(data)

    def _overflow(self) -> None:
        logger.error("%s does not read: its requests are aborted", self.peer.name)
        self.overflowed = True
        self.peer.counters.overflows += 1
        kept = [one for waiting in self._outbox for one in waiting.kept]
        self._outbox.clear()
        self._outbox_bytes = 0
        self._cut |= self._open
        ended = [_cut_short(one) for one in kept if isinstance(one, wire.Output)]
        if ended:
            self._enqueue(ended)
        for one in kept:
            if isinstance(one, wire.Reply):
                self._enqueue_reply(wire.Reply(one.call_id, OVERFLOW))

    def _abridge(self, outputs: list[wire.Output]) -> list[wire.Output]:
        """Of requests that have lost something, their ends alone."""
        told = []
        for one in outputs:
            if one.request_id not in self._cut:
                told.append(one)
            elif one.finished:
                self._cut.discard(one.request_id)
                told.append(_cut_short(one))
        return told


def _cut_short(output: wire.Output) -> wire.Output:
    """An end without what came before it: where tokens were lost it is no `stop`."""
    return wire.Output(output.request_id, [], finish_reason=wire.FINISH.index("abort"), stop_reason=OVERFLOW)
