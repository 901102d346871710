"""A server under twice the load that it can bear, for long: every request ends once, and nothing piles up.

`python -m bench.soak [--check] [--seconds N] [--load N] [--max-tokens N] [--seats N] [--seed N]`

`radixgen serve` in a process of its own, with few seats and a short queue. First its capacity, by as many callers as
there are seats, each asking again when it is answered. Then requests arrive by a Poisson process at `--load` times that
rate, whatever becomes of them (open loop): conversations of up to four turns, half of them sessions, half of them
streams. 20 % are cancelled at some moment, 5 % are malformed, 5 % read slowly, 5 % of the connections die in the middle
of a request. Who is refused doesn't ask again.

Held against: one terminal event for each accepted request; refusals by 429 with Retry-After; memory, of the second
half against the end of the first, and descriptors; and that nothing runs, waits or is pinned in the end, and that all
that is held is cache. How long a refusal takes is measured by a process that does nothing else. The limit is the
capacity: what is answered at `--load` is a share of it.

Bias: all processes share the machine; that one comes late to look at an answer counts against the server.
"""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.report import Report, benchmark_options
from bench.server import figures, free_port, percentiles, server
from radixgen.model import smollm2

MALFORMED: list[Any] = [
    b"{",
    b'{"messages": []}',
    b'{"messages": "x"}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b"[" * 10_000,
    b"\xff\xfe",
]
WORDS = ["the", "sea", "is", "a", "river", "of", "many", "fishes", "and", "old", "boats", "go", "home"]
KINDS = {"whole": 0.65, "cancelled": 0.2, "malformed": 0.05, "slow": 0.05, "dying": 0.05}


@dataclass
class Seen:
    """What callers saw."""

    asked: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What must not be"""
    tokens: int = 0


class Caller:
    """Asks in all the ways that there are."""

    def __init__(self, url: str, client: httpx.AsyncClient, max_tokens: int, seen: Seen, seed: int) -> None:
        self.seen = seen
        self._url = url
        self._client = client
        self._max_tokens = max_tokens
        self._random = random.Random(seed)
        self._talks: list[tuple[str | None, list[dict[str, Any]]]] = []
        self._serial = 0

    async def ask(self, kind: str) -> None:
        """One request; what must not be is noted."""
        self.seen.asked[kind] += 1
        try:
            if kind == "malformed":
                await self._malformed()
            elif kind == "dying":
                await self._die()
            elif self._random.random() < 0.5 or kind == "slow":
                await self._stream(kind)
            else:
                await self._whole(kind)
        except httpx.TransportError as error:
            self.seen.faults.append(f"{kind}: {error!r}")

    def _body(self) -> tuple[str | None, list[dict[str, Any]], dict[str, Any]]:
        """A turn of a new conversation, or of one that was answered."""
        if self._talks and self._random.random() < 0.6:
            session, messages = self._talks.pop(self._random.randrange(len(self._talks)))
        else:
            self._serial += 1
            session = f"talk-{self._serial}" if self._random.random() < 0.5 else None
            messages = [{"role": "system", "content": "say it"}]
        text = " ".join(self._random.choices(WORDS, k=self._random.randint(1, 4)))
        messages = [*messages, {"role": "user", "content": text}]
        tokens = self._random.randint(1, self._max_tokens)
        body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True}
        return session, messages, body if session is None else body | {"session_id": session}

    def _keep(self, session: str | None, messages: list[dict[str, Any]], text: str) -> None:
        if len(messages) < 8:
            self._talks.append((session, [*messages, {"role": "assistant", "content": text}]))
            del self._talks[:-64]

    async def _whole(self, kind: str) -> None:
        session, messages, body = self._body()
        begin = time.perf_counter()
        request = self._client.post("/v1/chat/completions", json=body)
        if kind == "cancelled":
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.expovariate(5)):
                    await request
            return
        answer = await request
        if not self._accepted(answer, begin):
            return
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] != "length":
            self.seen.faults.append(f"ended with {choice['finish_reason']}")
        self._keep(session, messages, choice["message"]["content"])

    async def _stream(self, kind: str) -> None:
        session, messages, body = self._body()
        begin = time.perf_counter()
        leave = self._random.randint(0, 6) if kind == "cancelled" else None
        body["stream"] = True
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._accepted(answer, begin)
                return
            events: list[str] = []
            async for line in answer.aiter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                if leave is not None and len(events) > leave:
                    self.seen.statuses[200] += 1
                    return
                if kind == "slow":
                    await asyncio.sleep(0.05)
            self._accepted(answer, begin)
        self._check(events)
        chunks = [json.loads(one) for one in events[:-1]]
        text = "".join(c["delta"].get("content", "") for one in chunks for c in one.get("choices", []))
        self._keep(session, messages, text)

    def _check(self, events: list[str]) -> None:
        """One terminal event: a reason, or an error, and the end."""
        ends = [c["finish_reason"] for one in events[:-1] for c in json.loads(one).get("choices", [])]
        terminal = sum(end is not None for end in ends) + sum('{"error"' in one for one in events)
        if terminal != 1 or events[-1] != "[DONE]":
            self.seen.faults.append(f"{terminal} terminal events, then {events[-1][:40]}")

    def _accepted(self, answer: httpx.Response, begin: float) -> bool:
        seconds = time.perf_counter() - begin
        self.seen.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            if not answer.headers.get("retry-after", "").isdecimal():
                self.seen.faults.append("a refusal without Retry-After")
        elif answer.status_code == 200:
            self.seen.answered.append(seconds)
            if answer.headers["content-type"] == "application/json":
                self.seen.tokens += answer.json()["usage"]["completion_tokens"]
        else:
            self.seen.faults.append(f"{answer.status_code} {answer.text[:200]}")
        return answer.status_code == 200

    async def _malformed(self) -> None:
        data = self._random.choice(MALFORMED)
        answer = await self._client.post(
            "/v1/chat/completions", content=data, headers={"content-type": "application/json"}
        )
        self.seen.statuses[answer.status_code] += 1
        if answer.status_code not in (400, 429):
            self.seen.faults.append(f"malformed: {answer.status_code} {answer.text[:200]}")

    async def _die(self) -> None:
        """A connection that ends in the middle: of the head, of the body, or after it, by a reset."""
        data = json.dumps(self._body()[2] | {"stream": True}).encode()
        host, _, port = self._url.removeprefix("http://").partition(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        _, writer = await asyncio.open_connection(host, int(port))
        cut = self._random.choice([20, len(whole) - 5, len(whole)])
        writer.write(whole[:cut])
        with suppress(ConnectionError):
            await writer.drain()
            await asyncio.sleep(self._random.expovariate(20))
        # Linger of nothing: the connection is reset, not closed.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()


async def capacity(caller: Caller, seats: int, seconds: float) -> float:
    """Requests a second of so many callers who each wait for their answer."""
    stop = time.perf_counter() + seconds

    async def one() -> int:
        count = 0
        while time.perf_counter() < stop:
            await caller.ask("whole")
            count += 1
        return count

    counts = await asyncio.gather(*(one() for _ in range(seats)))
    return sum(counts) / seconds


async def overload(caller: Caller, rate: float, seconds: float, samples: list[dict[str, float]], url: str) -> float:
    """Requests at `rate` a second, and a sample of the server each second. Returns the seconds until all had ended."""
    begin = time.perf_counter()
    arrivals = random.Random(1)
    tasks: set[asyncio.Task[None]] = set()

    async def sample(client: httpx.AsyncClient) -> None:
        while True:
            samples.append(figures((await client.get("/metrics")).text))
            await asyncio.sleep(1.0)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        sampling = asyncio.create_task(sample(client))
        due = begin
        while (due := due + arrivals.expovariate(rate)) < begin + seconds:
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            (kind,) = arrivals.choices(list(KINDS), list(KINDS.values()))
            task = asyncio.create_task(caller.ask(kind))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        sampling.cancel()
    return time.perf_counter() - begin


async def settled(url: str) -> dict[str, float]:
    """The server's figures once it has nothing to do."""
    async with httpx.AsyncClient(base_url=url) as client:
        for _ in range(600):
            found = figures((await client.get("/metrics")).text)
            if not found["radixgen:num_requests_running"] + found["radixgen:num_requests_waiting"]:
                return found
            await asyncio.sleep(0.05)
    return found


async def run(report: Report, url: str, chosen: Any) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        warm = Seen()
        rate = await capacity(Caller(url, client, chosen.max_tokens, warm, chosen.seed), chosen.seats, chosen.warm_up)
        report.limit(f"{1000:,} requests at capacity, {rate:.1f}/s", 1000 / rate)
    before = await settled(url)
    seen = Seen()
    samples: list[dict[str, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        caller = Caller(url, client, chosen.max_tokens, seen, chosen.seed + 1)
        command = [sys.executable, "-m", "bench.probe", url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as probing:
            seconds = await overload(caller, rate * chosen.load, chosen.seconds, samples, url)
            refusals, _ = await asyncio.to_thread(probing.communicate, b"end\n")
    after = await settled(url)
    tell(report, warm, seen, seconds, chosen)
    refused(report, json.loads(refusals))
    piled_up(report, before, after, samples)


def tell(report: Report, warm: Seen, seen: Seen, seconds: float, chosen: Any) -> None:
    """What became of the requests."""
    answered = len(seen.answered)
    report.contender("seconds_overload", f"1,000 at {chosen.load:g} × that", 1000 * seconds / max(answered, 1))
    report.say(f"asked {dict(seen.asked)}, statuses {dict(seen.statuses)}")
    report.keep(asked=dict(seen.asked), statuses={str(key): count for key, count in seen.statuses.items()})
    for fault in [*warm.faults, *seen.faults][:20]:
        report.say(f"fault: {fault}")
    faults = len(warm.faults) + len(seen.faults)
    report.figure("faults", faults, f"{faults} answers that must not be", at_most=0)
    report.keep(answer_ms=list(percentiles(seen.answered)))


def refused(report: Report, seconds: Sequence[float]) -> None:
    """How long refusals took."""
    p50, p99, longest = percentiles(seconds)
    text = f"{len(seconds)} refusals took {p50:.1f} ms, p99 {p99:.1f}, at most {longest:.1f}"
    report.figure("refusal_ms", p99, text, at_most=20)
    report.keep(refusal_ms_all=[p50, p99, longest])


def piled_up(
    report: Report, before: dict[str, float], after: dict[str, float], samples: list[dict[str, float]]
) -> None:
    """What grew, and what is still held."""
    half = samples[len(samples) // 2 :] or [after]
    memory = [one["process_resident_memory_bytes"] for one in half]
    growth = max(after["process_resident_memory_bytes"], memory[-1]) / memory[0]
    report.figure("memory_growth", growth, f"memory in the second half: × {growth:.3f}", at_most=1.05)
    opened = after["process_open_fds"] - before["process_open_fds"]
    report.figure("descriptors", opened, f"{opened:.0f} descriptors more than before", at_most=0)
    held = after["radixgen:kv_tokens_used"] - after["radixgen:kv_tokens_cached"]
    left = held + sum(after[f"radixgen:{name}"] for name in ("num_requests_running", "num_requests_waiting", "pins"))
    report.figure("left", left, f"{left:.0f} requests, pins and slots are still held", at_most=0)
    report.keep(memory_bytes=[before["process_resident_memory_bytes"], *memory[:: max(len(memory) // 20, 1)]])


def main(arguments: Sequence[str] | None = None, path: Path | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds in which capacity is measured")
    parser.add_argument("--load", type=float, default=2.0)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seats", type=int, default=8)
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    path = path or smollm2.fetch()
    report = Report("soak")
    options = ["--max-num-seqs", str(chosen.seats), "--max-queue", str(chosen.seats), "--kv-tokens"]
    with server(path, free_port(), *options, str(chosen.kv_tokens)) as url:
        asyncio.run(run(report, url, chosen))
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
