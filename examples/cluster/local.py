"""A cluster on this machine: processes that find each other, clients that talk to them, and what is tried with them."""

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from rich.console import Console
from rich.table import Table

TOPICS = ["ships", "bread", "clocks", "rivers", "chess", "birds", "glass", "music"]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What one turn brought: which worker gave it, and how many of its prompt's tokens were cached there."""

    text: str
    worker: str
    prompt_tokens: int
    cached_tokens: int


class Cluster(ABC):
    """A front end with OpenAI's API on `port`, and its workers. Leaving it ends them."""

    model: str
    """As the front end calls it"""
    extra: ClassVar[Mapping[str, Any]] = {}
    """What the front end wants with each request, besides"""

    def __init__(self, patience: float) -> None:
        """patience: seconds for anything to come up or to answer."""
        self.patience = patience
        self.drain = ["--drain-timeout", str(patience)]
        """Options of each worker"""
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self._url = f"http://127.0.0.1:{self.port}"
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="radixgen-cluster-")))

    @abstractmethod
    def start(self, workers: int) -> None:
        """Have everything up, `self.workers` by name."""

    @abstractmethod
    def worker_of(self, headers: Message, answer: dict[str, Any]) -> str:
        """Which worker gave an answer."""

    def __enter__(self) -> Self:
        try:
            self.start(2)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    # -- processes ----------------------------------------------------------------------------------------

    def run(self, name: str, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        """A process that ends with the cluster and writes to a log of its name. Workers share the cores evenly."""
        log = self._stack.enter_context(self.log(name).open("wb"))
        threads = str(max(1, (os.cpu_count() or 2) // 2))
        surroundings = {"OMP_NUM_THREADS": threads} | os.environ | environment
        process = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log, cwd=self.folder)
        self._stack.callback(_end, process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def wait(self, what: str, ready: Callable[[], object]) -> None:
        """Until something is so. Raises `SystemExit`."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        logs = "\n".join(path.read_text()[-2_000:] for path in self.folder.glob("*.log"))
        raise SystemExit(f"{what} did not come up in {self.patience:.0f} s\n{logs}")

    # -- a client's view ----------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """JSON from the front end. Raises `OSError`."""
        with urllib.request.urlopen(self._url + path, timeout=self.patience) as reply:
            return json.load(reply)

    def chat(self, messages: Messages, max_tokens: int) -> Answer:
        """Raises `OSError`."""
        with self._post(messages, max_tokens, stream=False) as reply:
            told = json.load(reply)
            worker = self.worker_of(reply.headers, told)  # type: ignore[attr-defined]
        usage = told["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(told["choices"][0]["message"]["content"], worker, usage["prompt_tokens"], cached)

    def stream(self, messages: Messages, max_tokens: int) -> Iterator[dict[str, Any]]:
        """The events of a stream of so many tokens. Raises `OSError` where it breaks."""
        with self._post(messages, max_tokens, stream=True) as reply:
            for line in reply:
                text = line.decode().strip()
                if text.startswith("data: {"):
                    yield json.loads(text.removeprefix("data: "))
                elif text.startswith("event: error"):
                    yield {"error": text}

    def _post(self, messages: Messages, max_tokens: int, *, stream: bool) -> IO[bytes]:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
            "ignore_eos": stream,
            **self.extra,
        }
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self._url}/v1/chat/completions", json.dumps(body).encode(), headers)
        try:
            reply: IO[bytes] = urllib.request.urlopen(asked, timeout=self.patience)
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{error}: {error.read().decode()[:500]}") from error
        return reply


class Talk:
    """A conversation, which should stay with the worker that had its first turn."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.history: Messages = [_system(topic)]
        self.home = ""
        self.turns = 0
        self.known = 0
        """Tokens of the last turn's prompt"""
        self.cached = 0
        self.faults: list[str] = []

    def turn(self, cluster: Cluster, max_tokens: int) -> None:
        """One question and its answer."""
        self.turns += 1
        self.history.append({"role": "user", "content": f"Tell me thing number {self.turns} about {self.topic}."})
        answer = cluster.chat(self.history, max_tokens)
        self.history.append({"role": "assistant", "content": answer.text})
        if self.turns == 1:
            self.home = answer.worker
        elif answer.worker != self.home:
            self.faults.append(f"turn {self.turns} about {self.topic} went to another worker")
        elif answer.cached_tokens < self.known:
            self.faults.append(
                f"turn {self.turns} about {self.topic}: {answer.cached_tokens} cached of {self.known} known"
            )
        self.known, self.cached = answer.prompt_tokens, answer.cached_tokens
        time.sleep(0.2)  # for a router to hear of it


# -- what is tried --------------------------------------------------------------------------------------------


def converse(cluster: Cluster, talks: list[Talk], turns: int, max_tokens: int) -> list[str]:
    """Turn by turn, all conversations; the first turns at the same time. Returns what did not hold."""
    table = Table("conversation", "turn", "worker", "prompt tokens", "cached")
    names = {worker: f"{index}" for index, worker in enumerate(cluster.workers, 1)}
    with ThreadPoolExecutor(len(talks)) as pool:  # at the same time, for a router to see who is busy
        list(pool.map(lambda talk: talk.turn(cluster, max_tokens), talks))
    for turn in range(turns):
        for talk in talks:
            if turn:
                talk.turn(cluster, max_tokens)
            table.add_row(talk.topic, str(talk.turns), names[talk.home], str(talk.known), str(talk.cached))
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
                print(f"the stream ended with {event['error']}")
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
            print(f"the other worker went on with {talk.topic}: {talk.cached} of {talk.known} tokens cached")
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
    code = process.wait(cluster.patience)
    print(f"a worker that was asked to stop ended its stream with {reasons} and exited with {code}")
    return [] if reasons == ["length"] and code == 0 else ["a worker that was asked to stop did not end its stream"]


def main(make: Callable[[float], Cluster], description: str | None) -> int:
    """Converse, kill, drain; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--talks", type=int, default=4, help=f"conversations, at most {len(TOPICS)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--within", type=float, default=1.0, help="seconds in which a client hears of a killed worker")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds for anything to come up or answer")
    options = parser.parse_args()
    with make(options.patience) as cluster:
        talks = [Talk(topic) for topic in TOPICS[: options.talks]]
        faults = converse(cluster, talks, options.turns, options.max_tokens)
        if not faults:
            faults = kill_one(cluster, talks, options.within) + drain_one(cluster, talks)
    for fault in faults:
        print(f"does not hold: {fault}")
    return 1 if faults else 0


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def python(module: str, *flags: str) -> list[str]:
    """A command: a module under this interpreter."""
    return [sys.executable, "-m", module, *flags]


def _system(topic: str) -> dict[str, str]:
    return {"role": "system", "content": f"You know {topic}. " + f"Talk of {topic}, of nothing else than {topic}. " * 6}


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
