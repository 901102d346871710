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
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import Report
from bench.streams import CORES, Prompts, Turn, begin, compare, greedy, here, on_core
from radixgen import AsyncClient, Engine

if TYPE_CHECKING:
    from collections.abc import Iterator


async def there(client: AsyncClient, prompts: Prompts, new_tokens: int) -> Turn:
    """Through a worker."""
    await client.call("reset_prefix_cache")
    turn = Turn()

    async def one(number: int, prompt: list[int]) -> None:
        async for output in client.generate(prompt, greedy(new_tokens)):
            turn.see(number, output.outputs[0].token_ids)

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    return turn.end()


@contextmanager
def worker(path: Path, address: str, kv_tokens: int) -> "Iterator[None]":
    """`radixgen worker` in a process of its own, on the first core."""
    options = ["--model", str(path), "--handshake", address, "--kv-tokens", str(kv_tokens), "--device", "cpu"]
    options += ["--dtype", "float32"]
    command = [sys.executable, "-m", "radixgen", "worker", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        os.sched_setaffinity(child.pid, {CORES[0]})
        try:
            yield
        finally:
            child.terminate()


async def measure(report: Report, engine: Engine, client: AsyncClient, prompts: Prompts, chosen: Any) -> None:
    """One number of streams."""
    own, served = list[Turn](), list[Turn]()
    for _ in range(chosen.repeats + 1):
        own.append(here(engine, prompts, chosen.new_tokens))
        served.append(await there(client, prompts, chosen.new_tokens))
    compare(report, "ZMQ", chosen.new_tokens, own, served, at_least=0.9)


async def run(report: Report, path: Path, chosen: Any) -> None:
    async with AsyncClient(timeout=600) as client:
        with (
            worker(path, client.address, chosen.kv_tokens),
            Engine(path, dtype="float32", kv_tokens=chosen.kv_tokens, device="cpu") as engine,
        ):
            await client.wait()
            for count in chosen.streams:
                await measure(report, engine, client, chosen.prompts[:count], chosen)


def main(arguments: Sequence[str] | None = None, path: Path | None = None) -> int:
    chosen, report, path = begin("serve", __doc__, arguments, path)
    with on_core(1):
        asyncio.run(run(report, path, chosen))
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
