"""Serving over HTTP: what `radixgen serve` gives, against the same engine in this process.

`python -m bench.http [--check] [--streams N …] [--prompt-tokens N] [--new-tokens N] [--repeats N]`

SmolLM2 in float32 on one thread, greedy, end-of-sequence ignored, an empty cache; every stream has a prompt of its own
of random tokens, and is told of each token as it comes. In turns, so many streams at once go through `Engine.step` in
this process, and as server-sent events through a server in a process of its own; the median of the ratios counts. The
limit is reading the weights once a step, at the rate of one matrix-vector product over them measured in the same run.
TTFT is from the request to its first token, at the caller.

Bias: where there are two cores, engines have the first and the client has the second; the server's event loop shares
its engine's core and interpreter. The client's reading is not on the engine's time, as it is in the other turn; it
speaks HTTP/1.0, a connection a stream. The server is alive, and idle, during the turns of the engine here.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.baseline import Generate
from bench.report import Report, benchmark_options
from bench.server import free_port, server
from bench.unrelated import weight_seconds
from radixgen import Engine, SamplingParams
from radixgen.model import smollm2

Prompts = list[list[int]]
CORES = sorted(os.sched_getaffinity(0))


@dataclass
class Turn:
    """What one burst of streams took. `firsts`: seconds to the first token of each; `events`: that were received."""

    seconds: float
    firsts: list[float]
    tokens: dict[int, list[int]]
    events: int

    def see(self, number: int, tokens: list[int], begin: float) -> None:
        if not self.tokens[number]:
            self.firsts.append(time.perf_counter() - begin)
        self.tokens[number] += tokens
        self.events += 1


def new_turn(count: int) -> Turn:
    return Turn(0.0, [], {number: [] for number in range(count)}, 0)


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep to one core, where there are several; threads that begin meanwhile keep to it for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def here(engine: Engine, prompts: Prompts, new_tokens: int) -> Turn:
    """Through `Engine.step`."""
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    turn = new_turn(len(prompts))
    begin = time.perf_counter()
    numbers = {engine.submit(prompt, params, output_kind="delta"): n for n, prompt in enumerate(prompts)}
    while engine.has_unfinished:
        for output in engine.step():
            turn.see(numbers[output.request_id], output.outputs[0].token_ids, begin)
    turn.seconds = time.perf_counter() - begin
    return turn


async def there(port: int, prompts: Prompts, new_tokens: int) -> Turn:
    """Through a server."""
    async for _ in events(port, "/reset_prefix_cache", {}):
        pass
    turn = new_turn(len(prompts))
    begin = time.perf_counter()

    async def one(number: int, prompt: list[int]) -> None:
        asked = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        async for event in events(port, "/v1/completions", asked | {"stream": True, "return_token_ids": True}):
            turn.see(number, json.loads(event)["choices"][0]["token_ids"], begin)

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    turn.seconds = time.perf_counter() - begin
    return turn


async def events(port: int, path: str, body: Any) -> Any:
    """The data of each server-sent event of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    assert b" 200 " in status, status
    while line := await reader.readline():
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield line[6:]
    writer.close()


def measure(report: Report, engine: Engine, port: int, prompts: Prompts, chosen: Any) -> None:
    """One number of streams: the first turn of each is not counted."""
    count = len(prompts)
    own: list[Turn] = []
    served: list[Turn] = []
    for repeat in range(chosen.repeats + 1):
        with on_core(0):
            mine = here(engine, prompts, chosen.new_tokens)
        theirs = asyncio.run(there(port, prompts, chosen.new_tokens))
        assert mine.tokens == theirs.tokens, "a server's tokens differ from the engine's"
        if repeat:
            own.append(mine)
            served.append(theirs)
    for key, name, turns in (("engine", "engine here", own), ("http", "through HTTP", served)):
        seconds = median(turn.seconds for turn in turns)
        report.contender(f"seconds_{count}_{key}", f"{count} streams: {name}", seconds)
        firsts = [first for turn in turns for first in turn.firsts]
        p50, p99 = np.percentile(firsts, (50, 99)) * 1e3
        rate = count * chosen.new_tokens / seconds
        report.say(f"{'':24} {rate:,.1f} tokens/s; TTFT p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(firsts)}")
        report.keep(**{f"ttft_ms_{count}_{key}": [p50, p99], f"rate_{count}_{key}": rate})
    ratio = median(mine.seconds / theirs.seconds for mine, theirs in zip(own, served, strict=True))
    text = f"{count} streams: throughput through HTTP / engine here: {ratio:.3f}"
    report.figure(f"ratio_{count}", ratio, text, at_least=0.8)
    told = median(turn.events / (count * chosen.new_tokens) for turn in served)
    report.figure(f"events_{count}", told, f"{count} streams: {told:.3f} events a token")


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def main(arguments: Sequence[str] | None = None, path: Path | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = max(chosen.streams), chosen.prompt_tokens
    prompts = np.random.default_rng(0).integers(3, 150 if path else 40_000, shape).tolist()
    path = path or smollm2.fetch()
    report = Report("http")
    report.keep(prompt_tokens=chosen.prompt_tokens, new_tokens=chosen.new_tokens)
    report.limit("reading the weights once a step", weight_seconds(Generate(path).model) * chosen.new_tokens)
    kv_tokens = max(chosen.streams) * (chosen.prompt_tokens + chosen.new_tokens)
    port = free_port()
    with (
        on_core(1),
        server(path, port, "--kv-tokens", str(kv_tokens), core=CORES[0]),
        Engine(path, kv_tokens=kv_tokens, device="cpu") as engine,
    ):
        for count in chosen.streams:
            measure(report, engine, port, prompts[:count], chosen)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
