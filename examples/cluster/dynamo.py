"""NVIDIA Dynamo's frontend, routing by cache, before two radixgen workers with SmolLM2, all on this machine.

    pip install 'radixgen[dynamo]'
    python examples/cluster/dynamo.py

Some conversations take turns. The router hears from each worker which blocks it holds, so that every later turn goes
to the worker that holds the turns before it, which reports them as cached. Then a worker is killed in mid-stream: the
client is told at once, and the other worker goes on. At last that one is asked to stop in mid-stream: it ends what it
has begun. Exits with 1 where any of this does not hold.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

from rich.console import Console
from rich.table import Table

BLOCK_SIZE = 16
PLANES = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
TOPICS = ["ships", "bread", "clocks", "rivers", "chess", "birds", "glass", "music"]
Message = dict[str, str]


class Cluster:
    """A frontend and its workers, which find each other through a folder. Leaving it ends them."""

    def __init__(self, workers: int, patience: float) -> None:
        self.patience = patience
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="radixgen-cluster-")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}/v1"
        try:
            self._start(
                "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv",
                "--kv-cache-block-size", str(BLOCK_SIZE), *PLANES,
            )  # fmt: skip
            for _ in range(workers):
                process = self._start(
                    "radixgen.serve.dynamo", "--kv-tokens", "8192", "--block-size", str(BLOCK_SIZE), *PLANES
                )
                self._wait("a worker", lambda: self._instances() - self.workers.keys())
                self.workers[(self._instances() - self.workers.keys()).pop()] = process
            self._wait("the frontend", self._serves)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def chat(self, messages: list[Message], max_tokens: int) -> tuple[str, int, int, int]:
        """The answer; which worker gave it; of how many prompt tokens it computed how many were cached."""
        with self._post(messages, max_tokens, stream=False) as reply:
            told = json.load(reply)
        usage = told["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        worker = told["nvext"]["worker_id"]["decode_worker_id"]
        return told["choices"][0]["message"]["content"], worker, usage["prompt_tokens"], cached

    def stream(self, messages: list[Message], max_tokens: int) -> Iterator[dict[str, Any]]:
        """The events of a stream. Raises `ConnectionError` or a child of `OSError` where it breaks."""
        with self._post(messages, max_tokens, stream=True) as reply:
            for line in reply:
                text = line.decode().strip()
                if text.startswith("data: {"):
                    yield json.loads(text.removeprefix("data: "))
                elif text.startswith(("event: error", ":")):
                    yield {"error": text}

    def _post(self, messages: list[Message], max_tokens: int, *, stream: bool) -> IO[bytes]:
        body = {
            "model": "smollm2",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
            "ignore_eos": stream,
            "nvext": {"extra_fields": ["worker_id"]},
        }
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self._url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            reply: IO[bytes] = urllib.request.urlopen(asked, timeout=self.patience)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{error}: {error.read().decode()[:500]}") from error
        return reply

    def _start(self, module: str, *flags: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self._folder / f"{module}-{len(self.workers)}.log").open("wb"))
        place = {"DYN_FILE_KV": str(self._folder / "discovery")}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *flags], env=os.environ | place, stdout=log, stderr=log
        )
        self._stack.callback(_end, process)
        return process

    def _instances(self) -> set[int]:
        """The ids of the workers that are registered."""
        names = (unquote(path.name) for path in (self._folder / "discovery/v1/instances").glob("*"))
        return {int(name.rpartition("/")[2], 16) for name in names if "/generate/" in name}

    def _serves(self) -> bool:
        with urllib.request.urlopen(f"{self._url}/models", timeout=self.patience) as reply:
            return bool(json.load(reply)["data"])

    def _wait(self, what: str, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-2_000:] for path in self._folder.glob("*.log"))
        raise SystemExit(f"{what} did not come up in {self.patience:.0f} s\n{logs}")


class Talk:
    """A conversation, which should stay with the worker that had its first turn."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.history = [_system(topic)]
        self.home = -1
        self.turns = 0
        self.prompt = 0
        self.cached = 0
        self.faults: list[str] = []

    def turn(self, cluster: Cluster, max_tokens: int) -> None:
        """One question and its answer."""
        self.turns += 1
        self.history.append({"role": "user", "content": f"Tell me thing number {self.turns} about {self.topic}."})
        answer, worker, prompt, self.cached = cluster.chat(self.history, max_tokens)
        self.history.append({"role": "assistant", "content": answer})
        if self.turns == 1:
            self.home = worker
        elif worker != self.home:
            self.faults.append(f"turn {self.turns} about {self.topic} went to another worker")
        elif self.cached < self.prompt:
            self.faults.append(f"turn {self.turns} about {self.topic}: {self.cached} cached of {self.prompt} known")
        self.prompt = prompt
        time.sleep(0.2)  # for the router to hear of it


def converse(cluster: Cluster, talks: list[Talk], turns: int, max_tokens: int) -> list[str]:
    """Turn by turn, all conversations. Returns what did not hold."""
    table = Table("conversation", "turn", "worker", "prompt tokens", "cached")
    names = {worker: f"{index}" for index, worker in enumerate(cluster.workers, 1)}
    for _ in range(turns):
        for talk in talks:
            talk.turn(cluster, max_tokens)
            table.add_row(talk.topic, str(talk.turns), names[talk.home], str(talk.prompt), str(talk.cached))
    Console().print(table)
    faults = [fault for talk in talks for fault in talk.faults]
    if len(talks) > len(cluster.workers) and len({talk.home for talk in talks}) < 2:
        faults.append("all conversations went to one worker")
    return faults


def kill_one(cluster: Cluster, talks: list[Talk], within: float) -> list[str]:
    """Kill a worker that streams. Returns what did not hold."""
    story = [*talks[0].history, {"role": "user", "content": "Tell me a very long story."}]
    victim, faults, killed = talks[0].home, [], 0.0
    try:
        for heard, event in enumerate(cluster.stream(story, 2_000), 1):
            if "error" in event:
                break
            if heard == 5:
                cluster.workers[victim].kill()
                killed = time.monotonic()
        else:
            faults.append("the stream of a killed worker ended as if nothing had happened")
    except OSError as error:
        print(f"the stream broke: {error!r}")
    seconds = time.monotonic() - killed
    print(f"a client whose worker was killed was told in {seconds:.2f} s")
    if seconds > within:
        faults.append(f"the client was told after {seconds:.1f} s")
    for talk in talks:
        if talk.home != victim:
            talk.turn(cluster, 8)
            faults += talk.faults
            print(f"the other worker went on with {talk.topic}: {talk.cached} of {talk.prompt} tokens cached")
            break
    del cluster.workers[victim]
    return faults


def drain_one(cluster: Cluster, talks: list[Talk]) -> list[str]:
    """Ask the worker that streams to stop. Returns what did not hold."""
    ((home, process),) = cluster.workers.items()
    talk = next(talk for talk in talks if talk.home == home)
    story = [*talk.history, {"role": "user", "content": "Tell me a long story."}]
    reasons = []
    for heard, event in enumerate(cluster.stream(story, 60), 1):
        if heard == 5:
            process.terminate()
        if "error" in event:
            return [f"the stream of a worker that was asked to stop ended with {event}"]
        reasons += [choice["finish_reason"] for choice in event["choices"] if choice.get("finish_reason")]
    code = process.wait(60)
    print(f"a worker that was asked to stop ended its stream with {reasons} and exited with {code}")
    return [] if reasons == ["length"] and code == 0 else ["a worker that was asked to stop did not end its stream"]


def _system(topic: str) -> Message:
    return {"role": "system", "content": f"You know {topic}. " + f"Talk of {topic}, of nothing else than {topic}. " * 6}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--talks", type=int, default=4, help=f"conversations, at most {len(TOPICS)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--within", type=float, default=1.0, help="seconds in which a client hears of a killed worker")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for anything to come up or answer")
    options = parser.parse_args()
    with Cluster(2, options.patience) as cluster:
        talks = [Talk(topic) for topic in TOPICS[: options.talks]]
        faults = converse(cluster, talks, options.turns, options.max_tokens)
        if not faults:
            faults = kill_one(cluster, talks, options.within) + drain_one(cluster, talks)
    for fault in faults:
        print(f"does not hold: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
