"""A front end in plain pyzmq and msgspec, which knows nothing of `radixgen.serve`. As a script: one to be killed."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"
STOP, LENGTH, ABORTED, ERROR = range(4)
PATIENCE = 30.0


class FakeFront:
    """Binds, shakes hands with one worker, and keeps what it is told: the tokens and ends of every request."""

    def __init__(self, folder: Path, *, heartbeat: float = 0.0, high_water: int = 1000, processes: int = 1) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.context = zmq.Context()
        self.address = f"ipc://{folder}/handshake"
        self.handshake = self._bind(zmq.ROUTER, self.address, high_water)
        inputs = [f"ipc://{folder}/input{n}" for n in range(processes)]
        outputs = [f"ipc://{folder}/output{n}" for n in range(processes)]
        self.inputs = [self._bind(zmq.ROUTER, address, high_water) for address in inputs]
        self.outputs = [self._bind(zmq.PULL, address, high_water) for address in outputs]
        self.init: dict[str, Any] = {"addresses": {"inputs": inputs, "outputs": outputs}, "parallel_config": {}}
        if heartbeat:
            self.init["heartbeat"] = heartbeat
        self.identity = b""
        self.ready: dict[str, Any] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[tuple[int, Any]]] = {}
        self.outputs_of: dict[str, list[list[Any]]] = {}
        self.replies: dict[int, list[Any]] = {}
        self.dead = False
        self._calls = 0

    def _bind(self, kind: int, address: str, high_water: int) -> "zmq.Socket[bytes]":
        socket = self.context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, high_water)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.bind(address)
        return socket

    def _receive(self, socket: "zmq.Socket[bytes]") -> list[bytes]:
        assert socket.poll(PATIENCE * 1e3), "nothing came"
        return socket.recv_multipart()

    def accept(self) -> "FakeFront":
        """HELLO, INIT, READY, and the first message on each input."""
        self.identity, hello = self._receive(self.handshake)
        assert decode(hello)["status"] == "HELLO"
        self.handshake.send_multipart([self.identity, encode(self.init)])
        for socket in self.inputs:
            identity, ready = self._receive(socket)
            assert identity == self.identity
            self.ready = decode(ready)
        identity, status = self._receive(self.handshake)
        assert (identity, decode(status)["status"]) == (self.identity, "READY")
        return self

    def send(self, *frames: bytes, process: int = 0) -> None:
        self.inputs[process].send_multipart([self.identity, *frames])

    def add(self, name: str, prompt: list[int], process: int = 0, salt: str | None = None, **sampling: Any) -> None:
        sampling = {"temperature": 0.0, "max_tokens": 12} | sampling
        request = [name, prompt, None, sampling, None, time.time(), None, salt, None, None, None, process]
        self.send(ADD, encode(request), process=process)

    def abort(self, *names: str) -> None:
        self.send(ABORT, encode(list(names)))

    def post(self, method: str, *arguments: Any) -> int:
        """A call whose reply is not waited for; its id."""
        self._calls += 1
        self.send(UTILITY, encode([0, self._calls, method, list(arguments)]))
        return self._calls

    def call(self, method: str, *arguments: Any) -> Any:
        call = self.post(method, *arguments)
        self.until(lambda: call in self.replies)
        _, failure, *result = self.replies.pop(call)
        if failure is not None:
            raise RuntimeError(failure)
        return result[0][1]

    def until(self, done: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Take in what comes until something holds."""
        deadline = time.monotonic() + patience
        while not done():
            assert time.monotonic() < deadline, f"it never came: {self.ends}"
            self.pump(50)

    def ended(self, *names: str) -> None:
        """Wait for the end of these requests."""
        self.until(lambda: all(name in self.ends for name in names))

    def pump(self, milliseconds: int = 0) -> None:
        """Take in what has come."""
        for socket, _ in zmq.zmq_poll([(one, zmq.POLLIN) for one in self.outputs], milliseconds):
            while socket.poll(0):
                self._take(socket.recv_multipart())

    def _take(self, frames: list[bytes]) -> None:
        if frames == [b"ENGINE_CORE_DEAD"]:
            self.dead = True
            return
        _, outputs, _, _, *rest = [*decode(frames[0]), None][:5]
        for output in outputs:
            name, tokens, *more = output
            self.outputs_of.setdefault(name, []).append(output)
            self.tokens.setdefault(name, []).extend(tokens)
            if len(more) > 3 and more[3] is not None:
                self.ends.setdefault(name, []).append((more[3], more[4] if len(more) > 4 else None))
        if rest[0] is not None:
            call_id, *answer = rest[0]
            self.replies[call_id] = [call_id, *answer, None][:3]

    def close(self) -> None:
        """Every connection at once, as the end of a process does."""
        self.context.destroy(0)


def main() -> None:
    """`fake_front.py FOLDER REQUESTS`: ask for that much, say so, and read nothing any more."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    front = FakeFront(folder, heartbeat=0.1)
    print(front.address, flush=True)
    front.accept()
    for number in range(count):
        front.add(f"doomed-{number}", [number % 8, number // 8 % 8], max_tokens=100_000)
    front.until(lambda: len(front.tokens) == count)
    print("asked", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
