"""Replicas of one model behind one front end, beside a single one: throughput of agents, and prompt tokens computed.

    python -m bench.data_parallel [--replicas 2] [--agents 64] [--check] [--save]

Agents resend a growing conversation with the same long system prompt, turn by turn, as in `bench.compare`; each goes on
as soon as it is answered. One replica serves `--agents` agents, then `--agents` times `--replicas`, as one large pool.
Then `--replicas` replicas with a GPU each serve the larger number. A Llama of 8B shape with random weights in
bfloat16; token ids go through `AsyncClient`, whose routing is that of `radixgen serve --data-parallel-size`. Each
measurement runs once untimed, so that what it needs is compiled and captured, and then three times; the run of median
duration counts.

The limit of the speed-up is the number of replicas. Bounds for `--check`, on GPUs: 0.95 of the limit, and a hit rate at
most one point below that of the single large pool.

Bias. Neither HTTP nor text is in it. The front end and its callers share a process, and without GPUs
the replicas share the processor.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.contenders import Options, saved_config
from bench.report import Report
from bench.shapes import SHAPES
from bench.workloads import FULL, TOY, Scale, Tokens, Workloads
from radixgen import AsyncClient, EngineDead, SamplingParams
from radixgen.serve.replicas import ReplicaOptions, Replicas

_START_SECONDS = 600.0
_RUNS = 3


@dataclass(slots=True)
class Counts:
    """Duration and token counts of one run of all agents."""

    seconds: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    """Prompt tokens that were computed: neither cached nor computed for another request at that time"""
    rows: int = 0
    """Rows that went through the model, of all replicas"""
    steps: int = 0
    """Steps of all replicas"""

    @property
    def throughput(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were not computed."""
        return 1 - self.computed_tokens / self.prompt_tokens


async def talk(client: AsyncClient, workloads: Workloads, agent: int, counts: Counts) -> None:
    """Run one conversation, which is resent in every turn."""
    scale = workloads.scale
    history: Tokens = workloads.tokens(0, scale.system)
    params = SamplingParams(temperature=0.0, max_tokens=scale.answer, ignore_eos=True)
    for turn in range(scale.turns):
        history += workloads.tokens(1 + turn * scale.agents + agent, scale.tool)
        counts.prompt_tokens += len(history)
        answer: Tokens = []
        async for output in client.generate(list(history), params):
            answer += output.outputs[0].token_ids
        counts.output_tokens += len(answer)
        history += answer


async def run_agents(client: AsyncClient, scale: Scale, vocab: int) -> Counts:
    """Run all agents at once from an empty cache, once untimed and then `_RUNS` times. Returns the median run."""
    runs = [await run_once(client, Workloads(scale, vocab, seed)) for seed in range(1 + _RUNS)]
    return sorted(runs[1:], key=lambda counts: counts.seconds)[_RUNS // 2]


async def run_once(client: AsyncClient, workloads: Workloads) -> Counts:
    """Run all agents at once from an empty cache."""
    for worker in client.workers:
        await client.call("reset_prefix_cache", worker=worker)
    counts, before = Counts(), await engine_totals(client)
    begin = time.perf_counter()
    await asyncio.gather(*(talk(client, workloads, agent, counts) for agent in range(workloads.scale.agents)))
    counts.seconds = time.perf_counter() - begin
    counts.computed_tokens, counts.rows, counts.steps = await engine_totals(client) - before
    return counts


async def engine_totals(client: AsyncClient) -> NDArray[np.int64]:
    """Prompt tokens computed, rows computed and steps since the start, of all replicas together, `[3]`."""
    stats = [(await client.call("stats", worker=worker))["engine"] for worker in client.workers]
    return np.array(
        [[one[name] for name in ("computed_prompt_tokens", "computed_rows", "steps")] for one in stats]
    ).sum(0)


@contextmanager
def start_replicas(client: AsyncClient, count: int, folder: str, kv_tokens: int) -> Iterator[None]:
    """Replicas of a model with random weights, as processes that connect to `client`."""
    worker = ("--model", folder, "--load-format=dummy", f"--kv-tokens={kv_tokens}", "--no-warm-up")
    options = ReplicaOptions(count, worker=worker)
    commands = [options.command(client.address, index) for index in range(count)]
    started = Replicas(commands, options.environments(), lambda reason: client.fail(EngineDead(reason)))
    try:
        yield
    finally:
        started.close()


async def serve(count: int, options: Options, folder: str, scales: Sequence[Scale]) -> list[Counts]:
    """Start `count` replicas and run the agents of each scale."""
    async with AsyncClient(workers=count, timeout=_START_SECONDS) as client:
        with start_replicas(client, count, folder, options.kv_tokens):
            await client.wait()
            return [await run_agents(client, scale, options.shape.vocab) for scale in scales]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--agents", type=int, default=64, help="for each replica")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound is missed")
    parser.add_argument("--save", action="store_true", help="keep the JSON line under bench/results/")
    chosen = parser.parse_args(arguments)
    report, cuda = Report("data_parallel"), torch.cuda.is_available()
    options = Options(
        SHAPES["8B" if cuda else "toy"],
        kv_tokens=600_000 if cuda else 20_000,
        max_seqs=1024,
        max_model_len=32_768 if cuda else 512,
        step_tokens=None,
    )
    few = replace(FULL if cuda else TOY, agents=chosen.agents if cuda else 3)
    many = replace(few, agents=chosen.replicas * few.agents)
    report.say(f"limit: {chosen.replicas}× the throughput of one replica")
    with tempfile.TemporaryDirectory() as folder:
        saved = saved_config(options, Path(folder))
        one, pool = asyncio.run(serve(1, options, saved, [few, many]))
        (several,) = asyncio.run(serve(chosen.replicas, options, saved, [many]))
    for name, scale, counts in (("1", few, one), ("1", many, pool), (str(chosen.replicas), many, several)):
        report.say(
            f"{name} × {scale.agents} agents: {counts.seconds:.2f} s, {counts.throughput:,.0f} tokens/s "
            f"({counts.throughput / one.throughput:.2f}×), {counts.hit_rate:.1%} of prompts not computed, "
            f"{counts.steps:,} steps of {counts.rows / counts.steps:.0f} rows"
        )
        report.keep(**{f"{name} x {scale.agents}": {"throughput": counts.throughput, "hit_rate": counts.hit_rate}})
    speed_up, points = several.throughput / one.throughput, 100 * (several.hit_rate - pool.hit_rate)
    least = {"at_least": 0.95 * chosen.replicas} if cuda else {}
    report.figure("speed_up", speed_up, f"throughput over one replica: {speed_up:.2f}×", **least)
    report.figure("points", points, f"hit rate over one pool: {points:+.2f} points", at_least=-1.0 if cuda else None)
    return report.finish(check=chosen.check, save=chosen.save)


if __name__ == "__main__":
    sys.exit(main())
