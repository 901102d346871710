"""KV in host memory: how fast it is fetched, what a fetched prefix saves, and agents whose KV the pool cannot hold.

    python -m bench.host_tier [--vllm] [--check] [--save]

- *Rates*: fetches and saves of paths whose host slots lie in pieces of 16, 256 and 4,096 tokens, in random order. The
  limit is the rate of copying one large piece of pinned memory.
- *First token*: time to the first token with a prefix of 16,256 tokens in the host, over computing the prefix.
- *Agents*: each resends a growing conversation behind one system prompt, in turn, four at a time. The pool holds a
  third of all tokens. Tokens a second with and without a host tier.
  With --vllm only these, by vLLM with and without its offloading connector (`host_tier_vllm.json`).
- *Nothing shared*: requests that have nothing in common, where a host tier costs time and saves none.

A Llama of 8B shape in bfloat16 with random weights on a GPU, where limits are measured in the same run; elsewhere toy
sizes in float32, without limits. Bounds with --check: those of each line.

Bias. Host memory and GPU are idle otherwise. One run a figure: differences under 10 % are noise.
"""

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.contenders import Contender, Options, Radixgen, Vllm
from bench.report import Report, benchmark_options
from bench.shapes import SHAPES, build
from bench.workloads import Ask
from radixgen import Engine, SamplingParams
from radixgen.cache.storage import KVStorage, LayerShape
from radixgen.model.host_kv import HostKV

PIECES = (16, 256, 4096)
TOGETHER = 4
"""Agents that run at the same time."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes in tokens."""

    copied: int
    prefix: int
    agents: int
    turns: int
    system: int
    own: int
    """Of each agent at the first turn"""
    message: int
    new: int
    unshared: tuple[int, int, int]
    """Requests, prompt tokens, new tokens"""

    @property
    def all_agents(self) -> int:
        """Tokens of all agents in the end."""
        return self.system + self.agents * (self.own + self.turns * (self.message + self.new))


FULL = Scale(16_384, 16_256, 16, 4, 3_000, 8_000, 300, 32, (64, 1024, 128))
TOY = Scale(4_096, 120, 6, 2, 30, 60, 8, 4, (4, 16, 8))


class Bench:
    """A model, and what is measured with it."""

    def __init__(self, report: Report, scale: Scale, network: PreTrainedModel, vocab: int) -> None:
        self.report, self.scale, self.network, self.vocab = report, scale, network, vocab
        self.device = network.device

    def tokens(self, seed: int, count: int) -> list[int]:
        return tokens(seed, count, self.vocab)

    def engine(self, kv_tokens: int, host_kv_tokens: int = 0) -> Engine:
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
        return Engine(
            self.network, kv_tokens=kv_tokens, host_kv_tokens=host_kv_tokens, torch_compile=cuda, warm_up=False
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def tokens(seed: int, count: int, vocab: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(3, vocab, count).tolist()
    return drawn


def greedy(new: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)


# -- rates ------------------------------------------------------------------------------------------------


def report_rates(bench: Bench, layers: Sequence[LayerShape]) -> None:
    """Report the bytes a second of paths in pieces, as a share of one large copy."""
    count, record = bench.scale.copied, sum(layer.bytes_per_token for layer in layers)
    limits = {"fetch": 0.0, "save": 0.0}
    if bench.device.type == "cuda":
        limits = measure_copies(count * record, bench.device)
        for way, rate in limits.items():
            bench.report.say(f"one copy of {count * record / 1e9:.2f} GB, {way}: {rate / 1e9:.1f} GB/s")
            bench.report.keep(**{f"{way}_limit": rate})
    storage = KVStorage(layers, count, bench.device)
    host = HostKV(storage, 2 * count, bench.device)
    slots = np.arange(count)
    for piece in PIECES:
        starts = np.random.default_rng(piece).permutation(2 * count // piece)[: count // piece] * piece
        host_slots = (starts[:, None] + np.arange(piece)).ravel()
        for way in ("save", "fetch"):
            taken = []
            for _ in range(4):
                copy = host.save(slots, host_slots) if way == "save" else host.load(host_slots, slots)
                copy.wait()
                taken.append(copy.seconds)
            rate = count * record / float(np.median(taken[1:]))
            share = rate / limits[way] if limits[way] else 0.0
            text = f"{way} in pieces of {piece:,} tokens: {rate / 1e9:.1f} GB/s, {share:.0%} of the limit"
            bound = 0.85 if way == "fetch" and limits[way] else None
            bench.report.figure(f"{way}_{piece}", share, text, at_least=bound)
    host.release()


def measure_copies(size: int, device: torch.device) -> dict[str, float]:
    """Bytes a second of copies of one piece of pinned memory to the device, and back; the median of five."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    here.zero_()
    rates = {}
    for way, (target, source) in {"fetch": (there, here), "save": (here, there)}.items():
        taken = []
        for _ in range(6):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
            target.copy_(source, non_blocking=True)
            events[1].record()
            events[1].synchronize()
            taken.append(events[0].elapsed_time(events[1]) / 1e3)
        rates[way] = size / float(np.median(taken[1:]))
    return rates


# -- first token ------------------------------------------------------------------------------------------


def report_first_token(bench: Bench) -> None:
    length = bench.scale.prefix
    with bench.engine(length + 1024, length + 1024) as engine:
        prefixes = [bench.tokens(seed, length) for seed in range(4)]
        seconds_computed = [first_token_seconds(engine, prefix) for prefix in prefixes]
        host = engine._core.host
        assert host is not None
        fetched = []
        for seed in range(10, 15):
            host.saves.complete()
            engine._core.tree.reset()
            fetched.append(first_token_seconds(engine, prefixes[-1] + bench.tokens(seed, 16)))
        stats = engine.stats()
    seconds, computed = float(np.median(fetched)), float(np.median(seconds_computed[1:]))
    text = (
        f"first token with {length:,} tokens in the host: {1e3 * seconds:.1f} ms, computed {1e3 * computed:.1f} ms: "
        f"{seconds / computed:.3f}"
    )
    bench.report.figure("first_token", seconds / computed, text, at_most=1 / 6)
    bench.report.keep(fetched_ms=1e3 * seconds, computed_ms=1e3 * computed, fetched_tokens=stats.host_fetched_tokens)


def first_token_seconds(engine: Engine, prompt: list[int]) -> float:
    begin = time.perf_counter()
    engine.generate(prompt, greedy(1))
    return time.perf_counter() - begin


# -- agents -----------------------------------------------------------------------------------------------


def report_agents(bench: Bench) -> None:
    scale, total = bench.scale, bench.scale.all_agents
    pools = {"without": 0, "with": total}
    bench.report.say(f"{scale.agents} agents of {total:,} tokens in all, {scale.turns} turns, {TOGETHER} at a time")
    rates = {}
    for name, host in pools.items():
        with bench.engine(total // 3, host) as engine:
            contender = Radixgen(engine)
            serve_agents(scale, bench.vocab, contender, seed=100, agents=TOGETHER, turns=1)
            engine.reset_prefix_cache()
            before = engine.stats()
            rates[name] = serve_agents(scale, bench.vocab, contender, seed=0, agents=scale.agents, turns=scale.turns)
            stats = engine.stats()
        rows, fetched = stats.computed_rows - before.computed_rows, stats.host_fetched_tokens
        waited = stats.host_waited_seconds
        bench.report.say(
            f"{name} a host tier: {rates[name]:,.0f} tokens/s, {rows:,} rows computed, {fetched:,} tokens fetched, of "
            f"{stats.host_fetch_seconds:.2f} s {waited:.2f} s waited"
        )
        bench.report.keep(**{f"agents, {name}": {"tokens_per_second": rates[name], "rows": rows, "fetched": fetched}})
    ratio = rates["with"] / rates["without"]
    bench.report.figure("agents", ratio, f"agents, with the host tier over without: {ratio:.2f}×", at_least=2.0)


def serve_agents(scale: Scale, vocab: int, contender: Contender, *, seed: int, agents: int, turns: int) -> float:
    """Serve all turns of all agents. Returns new tokens a second."""
    system = tokens(seed, scale.system, vocab)
    talks = [system + tokens(seed + 1 + agent, scale.own, vocab) for agent in range(agents)]
    begin = time.perf_counter()
    for turn in range(turns):
        for first in range(0, agents, TOGETHER):
            group = range(first, min(first + TOGETHER, agents))
            for agent in group:
                talks[agent] += tokens(seed + 1000 * (turn + 1) + agent, scale.message, vocab)
            answers = contender.answer(Ask([talks[agent] for agent in group], scale.new))
            for agent, answer in zip(group, answers, strict=True):
                talks[agent] += answer[0]
    return agents * turns * scale.new / (time.perf_counter() - begin)


def report_vllm(report: Report) -> None:
    """Report the agents by vLLM with and without its offloading connector, each in a process of its own."""
    total, rates = FULL.all_agents, {}
    for name, host in {"without": 0, "with": total}.items():
        with get_context("spawn").Pool(1) as pool:
            rates[name] = pool.apply(serve_by_vllm, (host,))
        report.say(f"vLLM, {name} its offloading connector: {rates[name]:,.0f} tokens/s")
        report.keep(**{f"agents, {name}": {"tokens_per_second": rates[name]}})
    ratio = rates["with"] / rates["without"]
    report.figure("agents", ratio, f"vLLM, with the connector over without: {ratio:.2f}×")


def serve_by_vllm(host_kv_tokens: int) -> float:
    """New tokens a second of the agents."""
    shape, total = SHAPES["8B"], FULL.all_agents
    contender = Vllm(Options(shape, total // 3, 64, 32_768, None, host_kv_tokens=host_kv_tokens))
    serve_agents(FULL, shape.vocab, contender, seed=100, agents=TOGETHER, turns=1)
    contender.reset()
    return serve_agents(FULL, shape.vocab, contender, seed=0, agents=FULL.agents, turns=FULL.turns)


def report_unshared(bench: Bench) -> None:
    requests, length, new = bench.scale.unshared
    total = requests * (length + new)
    rates = {}
    for name, host in {"without": 0, "with": total}.items():
        with bench.engine(total + 1024, host) as engine:
            for seed in (0, 1000):
                prompts = [bench.tokens(seed + row, length) for row in range(requests)]
                begin = time.perf_counter()
                engine.generate(prompts, greedy(new))
                rates[name] = requests * new / (time.perf_counter() - begin)
                engine.reset_prefix_cache()
    ratio = rates["with"] / rates["without"]
    text = (
        f"nothing shared: {rates['without']:,.0f} tokens/s without, {rates['with']:,.0f} with a host tier: {ratio:.3f}"
    )
    bench.report.figure("unshared", ratio, text, at_least=0.97)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--vllm", action="store_true", help="the agents by vLLM, which must be installed")
    options = parser.parse_args(arguments)
    if options.vllm:
        report = Report("host_tier_vllm")
        report_vllm(report)
        return report.finish(check=options.check, save=options.save)
    report, cuda = Report("host_tier"), torch.cuda.is_available()
    shape = SHAPES["8B" if cuda else "toy"]
    network = build(shape, torch.device("cuda" if cuda else "cpu"))
    bench = Bench(report, FULL if cuda else TOY, network, shape.vocab)
    layer = LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim, network.dtype)
    report_rates(bench, [layer] * shape.layers)
    report_first_token(bench)
    report_agents(bench)
    report_unshared(bench)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
