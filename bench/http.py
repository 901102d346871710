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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import Report
from bench.server import free_port, server
from bench.streams import CORES, Prompts, Turn, begin, compare, here, on_core
from radixgen import Engine


async def there(port: int, prompts: Prompts, new_tokens: int) -> Turn:
    """Through a server."""
    async for _ in events(port, "/reset_prefix_cache", {}):
        pass
    turn = Turn()

    async def one(number: int, prompt: list[int]) -> None:
        asked = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        async for event in events(port, "/v1/completions", asked | {"stream": True, "return_token_ids": True}):
            turn.see(number, json.loads(event)["choices"][0]["token_ids"])

    await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    return turn.end()


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
    """One number of streams."""
    own, served = list[Turn](), list[Turn]()
    for _ in range(chosen.repeats + 1):
        own.append(here(engine, prompts, chosen.new_tokens))
        served.append(asyncio.run(there(port, prompts, chosen.new_tokens)))
    compare(
        report, "HTTP", chosen.new_tokens, own, served, at_least=0.8, first_at_most=1.2 if len(prompts) == 8 else None
    )


def main(arguments: Sequence[str] | None = None, path: Path | None = None) -> int:
    chosen, report, path = begin("http", __doc__, arguments, path)
    port = free_port()
    with (
        on_core(1),
        server(path, port, "--dtype", "float32", "--kv-tokens", str(chosen.kv_tokens), core=CORES[0]),
        Engine(path, dtype="float32", kv_tokens=chosen.kv_tokens, device="cpu") as engine,
    ):
        for count in chosen.streams:
            measure(report, engine, port, chosen.prompts[:count], chosen)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
