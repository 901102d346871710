"""Bursts of streams: through an engine here, and what it takes to go through anything else instead."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.baseline import Generate
from bench.report import Report, benchmark_options
from bench.unrelated import weight_seconds
from radixgen import Engine, SamplingParams
from radixgen.model import smollm2

Prompts = list[list[int]]
CORES = sorted(os.sched_getaffinity(0))


@dataclass
class Turn:
    """What one burst took. `firsts`: seconds to the first token of each; `outputs`: that were received."""

    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    outputs: int = 0
    begin: float = field(default_factory=time.perf_counter)

    def see(self, number: int, tokens: list[int]) -> None:
        """What is new of a stream."""
        known = self.tokens.setdefault(number, [])
        if not known:
            self.firsts.append(time.perf_counter() - self.begin)
        known += tokens
        self.outputs += 1

    def end(self) -> "Turn":
        self.seconds = time.perf_counter() - self.begin
        return self


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep to one core, where there are several; threads that begin meanwhile keep to it for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CORES[number % len(CORES)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def greedy(new_tokens: int) -> SamplingParams:
    """So many tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


def here(engine: Engine, prompts: Prompts, new_tokens: int) -> Turn:
    """Through `Engine.step`, on the first core."""
    with on_core(0):
        engine.reset_prefix_cache()
        turn = Turn()
        numbers = {engine.submit(one, greedy(new_tokens), output_kind="delta"): n for n, one in enumerate(prompts)}
        while engine.has_unfinished:
            for output in engine.step():
                turn.see(numbers[output.request_id], output.outputs[0].token_ids)
        return turn.end()


def begin(name: str, doc: str | None, arguments: Sequence[str] | None, path: Path | None) -> tuple[Any, Report, Path]:
    """Options, a report with its limit, and the model: SmolLM2 unless `path` is another."""
    parser = benchmark_options(doc)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = max(chosen.streams), chosen.prompt_tokens
    chosen.prompts = np.random.default_rng(0).integers(3, 150 if path else 40_000, shape).tolist()
    chosen.kv_tokens = shape[0] * (shape[1] + chosen.new_tokens)
    path = path or smollm2.fetch()
    report = Report(name)
    report.keep(prompt_tokens=chosen.prompt_tokens, new_tokens=chosen.new_tokens)
    report.limit("reading the weights once a step", weight_seconds(Generate(path).model) * chosen.new_tokens)
    return chosen, report, path


def compare(
    report: Report, name: str, new_tokens: int, own: Sequence[Turn], served: Sequence[Turn], *, at_least: float,
    first_at_most: float | None = None,
) -> None:  # fmt: skip
    """Turns of an engine here and of the same burst through `name`; the first of each is not counted. The bounds are of
    throughput, and of the time to the first token; both are ratios.
    """
    assert all(one.tokens == other.tokens for one, other in zip(own, served, strict=True)), "tokens differ"
    count, key = len(own[0].tokens), name.lower()
    own, served = own[1:], served[1:]
    for which, says, turns in (("engine", "engine here", own), (key, f"through {name}", served)):
        seconds = statistics.median(turn.seconds for turn in turns)
        report.contender(f"seconds_{count}_{which}", f"{count} streams: {says}", seconds)
        firsts = [first for turn in turns for first in turn.firsts]
        p50, p99 = np.percentile(firsts, (50, 99)) * 1e3
        rate = count * new_tokens / seconds
        report.say(f"{'':24} {rate:,.1f} tokens/s; TTFT p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(firsts)}")
        report.keep(**{f"ttft_ms_{count}_{which}": [p50, p99], f"rate_{count}_{which}": rate})
    ratio = statistics.median(mine.seconds / theirs.seconds for mine, theirs in zip(own, served, strict=True))
    text = f"{count} streams: throughput through {name} / engine here: {ratio:.3f}"
    report.figure(f"ratio_{count}", ratio, text, at_least=at_least)
    later = statistics.median(
        float(np.median(theirs.firsts) / np.median(mine.firsts)) for mine, theirs in zip(own, served, strict=True)
    )
    text = f"{count} streams: median TTFT through {name} / engine here: {later:.3f}"
    report.figure(f"first_ratio_{count}", later, text, at_most=first_at_most)
    outputs = statistics.median(turn.outputs / (count * new_tokens) for turn in served)
    report.figure(f"outputs_{count}", outputs, f"{count} streams: {outputs:.3f} outputs a token")
