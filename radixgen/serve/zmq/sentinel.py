"""Process that notifies front ends if the worker dies without doing so itself: `kill -9`, a crash, out of memory.

Over ipc, vLLM's protocol has no other sign of it.
"""

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from radixgen.core import Limits
from radixgen.serve.zmq import wire
from radixgen.serve.zmq.endpoint import Curve, open_socket

logger = logging.getLogger(__name__)

_LINGER_MS = 1_000
_PATIENCE_SECONDS = 5.0


class Sentinel:
    """Notifies front ends if this process dies, unless closed before. It reads a pipe that only this process holds."""

    def __init__(self, curve: Curve | None = None) -> None:
        keys = [] if curve is None else [str(curve.own), str(curve.peers)]
        command = [sys.executable, "-m", "radixgen.serve.zmq.sentinel", *keys]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def watch(self, addresses: Sequence[str]) -> None:
        """Set the output addresses of the front ends to notify, in place of those before."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(addresses).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            logger.error("front ends will not be notified if this worker is killed: %s", error)

    def close(self) -> None:
        """Stop without notifying anyone."""
        assert self._process.stdin is not None
        self.watch([])
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def tell_end(addresses: Sequence[str], curve: Curve | None = None) -> None:
    """Notify the front ends at these output addresses that their engine is dead."""
    with zmq.Context() as context:
        for address in addresses:
            socket = open_socket(context, zmq.PUSH, Limits())
            if curve is not None and address.startswith("tcp:"):
                curve.connect(socket)
            socket.connect(address)
            socket.send(wire.DEAD)
            socket.close(_LINGER_MS)


def main(keys: Sequence[str]) -> None:
    """Read lists of addresses from stdin until it is closed, then notify those of the last line."""
    for number in (signal.SIGINT, signal.SIGTERM):  # signals to the process group are meant for the worker
        signal.signal(number, signal.SIG_IGN)
    addresses: list[str] = []
    for line in sys.stdin:
        addresses = json.loads(line)
    tell_end(addresses, Curve(*map(Path, keys)) if keys else None)


if __name__ == "__main__":
    main(sys.argv[1:])
