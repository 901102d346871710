"""NVIDIA Dynamo's frontend, routing by cache, in front of two radixgen workers with SmolLM2, all on this machine.

    pip install '.[dynamo]'
    python examples/cluster/dynamo.py

Some conversations take turns. The router knows from cache events which blocks each worker holds, so every later turn
goes to the worker with the earlier turns, which reports them as cached. Then one worker is killed while it streams: its
client gets an error immediately, and the other worker keeps serving. Finally the remaining worker gets SIGTERM while it
streams, and finishes its request. Exits with 1 if any of this does not hold.
"""

import sys
from email.message import Message
from typing import Any, ClassVar
from urllib.parse import unquote

from local import Cluster, main, python

BLOCK_SIZE = "16"
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]


class Dynamo(Cluster):
    """A frontend and workers that find each other through a folder."""

    model = "smollm2"
    extra: ClassVar = {"nvext": {"extra_fields": ["worker_id"]}}

    def start(self, workers: int) -> None:
        place = {"DYN_FILE_KV": str(self.folder / "discovery")}
        flags = ["--http-host", "127.0.0.1", "--http-port", str(self.port), "--router-mode", "kv"]
        blocks = ["--kv-cache-block-size", BLOCK_SIZE]
        self.run("frontend", *python("dynamo.frontend", *flags, *blocks, *PLANES), **place)
        for number in range(workers):
            serve = ["worker", "--backend", "dynamo", "--kv-tokens", "8192", "--block-size", BLOCK_SIZE]
            process = self.run(f"worker{number}", *python("radixgen", *serve, *self.drain, *PLANES), **place)
            self.wait("a worker", lambda: self._instances() - self.workers.keys())
            self.workers[(self._instances() - self.workers.keys()).pop()] = process
        self.wait("the frontend", lambda: self.get("/v1/models")["data"])

    def worker_of(self, headers: Message, answer: dict[str, Any]) -> str:
        return str(answer["nvext"]["worker_id"]["decode_worker_id"])

    def _instances(self) -> set[str]:
        """The ids of the workers that are registered."""
        names = (unquote(path.name) for path in (self.folder / "discovery/v1/instances").glob("*"))
        return {str(int(name.rpartition("/")[2], 16)) for name in names if "/generate/" in name}


if __name__ == "__main__":
    sys.exit(main(Dynamo, __doc__))
