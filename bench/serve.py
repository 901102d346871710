"""Serving over ZeroMQ: what a worker behind its sockets gives, against the same engine in this process.

`python -m bench.serve [--check] [--streams N …] [--prompt-tokens N] [--new-tokens N] [--repeats N]`

SmolLM2 in float32 on one thread, greedy, end-of-sequence ignored, an empty cache; every stream has a prompt of its own
of random tokens, and is told of each token as it comes. In turns, so many streams at once go through `Engine.step` in
this process, and through `radixgen worker` in a process of its own, asked by `radixgen.AsyncClient` in this one; the
median of the ratios counts. The limit is reading the weights once a step, at the rate of one matrix-vector product over
them measured in the same run. TTFT is from the request to its first token, at the caller.

Bias: where there are two cores, engines have the first and the client has the second; a worker's I/O shares its
engine's core. The client's reading is not on the engine's time, as it is in the other turn. The worker is alive, and
idle, during the turns of the engine here.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.baseline import Generate
from bench.report import Report, benchmark_options
from bench.unrelated import weight_seconds
from radixgen import AsyncClient, Engine, SamplingParams
from radixgen.model import smollm2

if TYPE_CHECKING:
    from collections.abc import Iterator

Prompts = list[list[int]]
CORES = sorted(os.sched_getaffinity(0))


@dataclass
class Turn:
    """What one burst of streams took."""

    seconds: float
    firsts: list[float]
    """Seconds to the first token of each stream"""
    tokens: dict[int, list[int]]
    deltas: int
    """Outputs that were received"""


@contextmanager
def on_core(number: int) -> "Iterator[None]":
    """Keep to one core, where there are several; threads that begin meanwhile keep to it for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def here(engine: Engine, prompts: Prompts, params: SamplingParams) -> Turn:
    """Through `Engine.step`."""
    engine.reset_prefix_cache()
    turn = Turn(0.0, [], {number: [] for number in range(len(prompts))}, 0)
    begin = time.perf_counter()
    numbers = {engine.submit(prompt, params, output_kind="delta"): n for n, prompt in enumerate(prompts)}
    while engine.has_unfinished:
        for output in engine.step():
            tokens = turn.tokens[numbers[output.request_id]]
            if not tokens:
                turn.firsts.append(time.perf_counter() - begin)
            tokens += output.outputs[0].token_ids
            turn.deltas += 1
    turn.seconds = time.perf_counter() - begin
    return turn


async def there(client: AsyncClient, prompts: Prompts, params: SamplingParams) -> Turn:
    """Through a worker."""
    await client.call("reset_prefix_cache")
    turn = Turn(0.0, [], {number: [] for number in range(len(prompts))}, 0)
    begin = time.perf_counter()

    async def one(number: int, prompt: list[int]) -> None:
        async for output in client.generate(prompt, params):
            if not turn.tokens[number]:
                turn.firsts.append(time.perf_counter() - begin)
            turn.tokens[number] += output.outputs[0].token_ids
            turn.deltas += 1

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    turn.seconds = time.perf_counter() - begin
    return turn


@contextmanager
def worker(path: Path, address: str, kv_tokens: int) -> "Iterator[None]":
    """`radixgen worker` in a process of its own, on the first core."""
    options = ["--model", str(path), "--handshake", address, "--kv-tokens", str(kv_tokens), "--device", "cpu"]
    command = [sys.executable, "-m", "radixgen", "worker", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        os.sched_setaffinity(child.pid, {CORES[0]})
        try:
            yield
        finally:
            child.terminate()


async def measure(report: Report, engine: Engine, client: AsyncClient, prompts: Prompts, chosen: Any) -> None:
    """One number of streams: the first turn of each is not counted."""
    count = len(prompts)
    params = SamplingParams(temperature=0.0, max_tokens=chosen.new_tokens, ignore_eos=True)
    own: list[Turn] = []
    served: list[Turn] = []
    for repeat in range(chosen.repeats + 1):
        with on_core(0):
            mine = here(engine, prompts, params)
        theirs = await there(client, prompts, params)
        assert mine.tokens == theirs.tokens, "a worker's tokens differ from the engine's"
        if repeat:
            own.append(mine)
            served.append(theirs)
    for key, name, turns in (("engine", "engine here", own), ("zmq", "through ZMQ", served)):
        report.contender(f"seconds_{count}_{key}", f"{count} streams: {name}", _median(turn.seconds for turn in turns))
        firsts = [first for turn in turns for first in turn.firsts]
        p50, p99 = np.percentile(firsts, (50, 99)) * 1e3
        rate = count * chosen.new_tokens / _median(turn.seconds for turn in turns)
        report.say(f"{'':24} {rate:,.1f} tokens/s; TTFT p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(firsts)}")
        report.keep(**{f"ttft_ms_{count}_{key}": [p50, p99], f"rate_{count}_{key}": rate})
    ratio = _median(mine.seconds / theirs.seconds for mine, theirs in zip(own, served, strict=True))
    text = f"{count} streams: throughput through ZMQ / engine here: {ratio:.3f}"
    report.figure(f"ratio_{count}", ratio, text, at_least=0.9)
    deltas = _median(turn.deltas / (count * chosen.new_tokens) for turn in served)
    report.figure(f"deltas_{count}", deltas, f"{count} streams: {deltas:.3f} outputs a token", at_least=1)


def _median(values: "Iterator[float]") -> float:
    return statistics.median(list(values))


async def run(report: Report, path: Path, prompts: Prompts, chosen: Any) -> None:
    kv_tokens = max(chosen.streams) * (chosen.prompt_tokens + chosen.new_tokens)
    async with AsyncClient(timeout=600) as client:
        with worker(path, client.address, kv_tokens), Engine(path, kv_tokens=kv_tokens, device="cpu") as engine:
            await client.wait()
            for count in chosen.streams:
                await measure(report, engine, client, prompts[:count], chosen)


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
    report = Report("serve")
    report.keep(prompt_tokens=chosen.prompt_tokens, new_tokens=chosen.new_tokens)
    report.limit("reading the weights once a step", weight_seconds(Generate(path).model) * chosen.new_tokens)
    with on_core(1):
        asyncio.run(run(report, path, prompts, chosen))
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
