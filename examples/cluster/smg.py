"""SMG, a gateway in Rust, with two radixgen workers with SmolLM2 over vLLM's ZMQ wire, all on this machine.

    pip install '.[smg]'
    python examples/cluster/smg.py

SMG renders the chat template, finds the worker whose earlier prompts begin most alike, and turns tokens into text; a
worker sees token ids. Some conversations take turns, and each stays with its worker. Then one worker is killed while it
streams: its sentinel notifies SMG, which ends the client's stream, and the other worker keeps serving. Finally the
remaining worker gets SIGTERM while it streams, and finishes its request. Exits with 1 if any of this does not hold.
"""

import sys
from email.message import Message
from typing import Any

from local import Cluster, free_port, main, python

from radixgen.model import smollm2


class SMG(Cluster):
    """A gateway, and workers that connect to it at the address that their URL implies."""

    def start(self, workers: int) -> None:
        self.model = str(smollm2.fetch())
        for number in range(workers):
            url = f"ipc://{self.folder}/engine{number}"
            serve = ["worker", "--backend", "zmq", "--smg", url, "--kv-tokens", "8192", *self.drain]
            self.workers[url] = self.run(f"worker{number}", *python("radixgen", *serve))
        logs = [self.log(f"worker{number}") for number in range(workers)]
        self.wait("the workers", lambda: all("connects to" in log.read_text() for log in logs))
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        engines = ["--worker-urls", *self.workers, "--backend", "vllm", "--model-path", self.model]
        route = ["--policy", "cache_aware", "--health-check-interval-secs", "1", "--disable-retries"]
        self.run("smg", *python("smg.launch_router", *address, *metrics, *engines, *route))
        self.wait("SMG", lambda: all(one["status"] == "ready" for one in self.get("/workers")["workers"]))
        self.wait("SMG's tokenizer", lambda: self.get("/v1/tokenizers")["tokenizers"])  # loads after "ready"

    def worker_of(self, headers: Message, answer: dict[str, Any]) -> str:
        return str(headers["x-smg-routed-worker-id"])


if __name__ == "__main__":
    sys.exit(main(SMG, __doc__))
