"""Reading policies beside exact reading: what they find in a long text, how far they agree, and what they save.

    python -m bench.reading [--shares X ...] [--lengths N ...] [--check] [--save]

SmolLM2-135M in float32, whose context is 8,192 tokens; one thread. Every policy is set to read about the same share of
a text's keys at its end. Under each, as far as the policy has it, either answers alone are read inexactly, or prompts
too:

- *Needles*: a text with 16 numbers at 16 depths, and a question for each; greedy answers that are right. The policies
  run at the longest length at which exact reading finds at least 90 %. Where answers alone are inexact, the first token
  of an answer is still exact. Questions are asked one after another, and under `TopBlocks` once more all together,
  because their rows then choose together.
- *Perplexity* of the first 8,000 tokens of the Python documentation's topics, over the exact one; prompts are inexact.
- *Agreement*: greedy continuations of 32 tokens after 8 prefixes of that text, from half of it on; answers alone are
  inexact.
- *Time*: of 32 tokens after the text, and of the perplexity. Contenders take turns; medians. The limit is reading the
  weights and all keys of the text for each token, at the rate at which a large matrix is read.

`Press` computes each prompt anew. What it reads is counted at the end of the prompt.

Bias. One small model, trained on short texts: larger ones look further back, and find more in texts of this length.
Numbers in English sentences are easy needles. On a CPU a step of one row is mostly weights, so time says little about a
GPU with many rows.

Bound with --check: exact reading finds its needles at the length that policies are compared at.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from bench.baseline import cpu_ceilings
from bench.limits import StepLimit
from bench.quality import (
    LONG_TEXT,
    NUMBERS,
    Agreement,
    Needles,
    Tokenizer,
    Tokens,
    continue_each,
    perplexity,
    topic_tokens,
)  # fmt: skip
from bench.report import Report, benchmark_options
from bench.shapes import Shape
from radixgen import Engine
from radixgen.model import smollm2
from radixgen.reading import BigBird, Exact, Fading, PositionPolicy, Press, ReadingPolicy, TopBlocks, Window

EXACT = Exact()

SHARES = (0.0625, 0.125, 0.25, 0.5)
LENGTHS = (500, 1_000, 2_000, 3_000, 4_000, 6_000)
CONTINUATIONS, CONTINUATION = 8, 32
RIGHT = 0.9
"""Share of needles that exact reading must find at the length that policies are compared at."""
BLOCK, SINKS = 64, 4


def window(keys: int, context: int) -> ReadingPolicy:
    return Window(sinks=SINKS, window=max(keys - SINKS - BLOCK, 1), block=BLOCK)


def big_bird(keys: int, context: int) -> ReadingPolicy:
    """Half of the blocks in the window, the others random but for an eighth at the beginning."""
    blocks = keys // BLOCK
    head, near = max(blocks // 8, 1), max(blocks // 2, 1)
    return BigBird(block=BLOCK, global_blocks=head, window_blocks=near, random_blocks=max(blocks - head - near, 0))


def fading(keys: int, context: int) -> ReadingPolicy:
    """As few levels as reach over the context."""
    for levels in range(1, 32):
        size = max(int((keys - SINKS - BLOCK) / (1 + levels / 2)), 1)
        if size * 2**levels >= context:
            break
    return Fading(sinks=SINKS, window=size, levels=levels, block=BLOCK)


def top_blocks(keys: int, context: int) -> ReadingPolicy:
    """Chosen blocks, but for an eighth at the end and a block at the beginning."""
    recent = max(keys // 8, 1)
    always = recent + BLOCK
    return TopBlocks(budget=max(keys - always, 1) / (context - always), recent=recent, sinks=BLOCK)


def press(keys: int, context: int) -> ReadingPolicy:
    """At most half of the keys in the window."""
    return Press(ratio=keys / context, window=min(32, max(keys // 2, 1)), sinks=SINKS)


POLICIES: dict[str, Callable[[int, int], ReadingPolicy]] = {
    "window": window, "bigbird": big_bird, "fading": fading, "top_blocks": top_blocks, "press": press,
}  # fmt: skip
"""Policies by name: one that reads about so many keys at the end of a context."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy, and the share of a text's keys that it reads at the end."""

    name: str
    share: float

    @property
    def label(self) -> str:
        return f"{self.name} {self.share:.1%}"

    def reading(self, context: int) -> ReadingPolicy:
        return POLICIES[self.name](int(self.share * context), context)


def keys_read(reading: ReadingPolicy, position: int) -> int:
    """Keys that a row at `position`, of a prompt that ends there, reads on average over the KV heads."""
    if isinstance(reading, TopBlocks):
        always = reading.recent + reading.sinks
        return always + round(reading.budget * max(position + 1 - always, 0))
    if isinstance(reading, Press):
        return math.ceil(reading.ratio * (position + 1))
    if not isinstance(reading, PositionPolicy):
        return position + 1
    starts, stops = np.minimum(reading.visible(position // reading.block), position + 1).T
    return int((stops - starts).sum())


def inexact_prompts(reading: ReadingPolicy) -> ReadingPolicy | None:
    """The policy for prompts too; None if it is only for answers."""
    return replace(reading, prompt=True) if isinstance(reading, PositionPolicy) else None


class Bench:
    """Measures contenders on one engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, needles: int, context: int, repeats: int) -> None:
        self._engine, self._tokenizer, self._needles, self._repeats = engine, tokenizer, needles, repeats
        self._text = topic_tokens(tokenizer)[:context]

    def longest_length(self, report: Report, lengths: Sequence[int], *, bound: bool) -> int:
        """The longest of these lengths at which exact reading finds its needles; the shortest if it is none."""
        counts = {length: self.needles([EXACT], length)[0] for length in lengths}
        for length, count in counts.items():
            report.say(f"exact, {length:,} tokens: {count} of {self._needles} needles")
        report.keep(exact_needles=counts)
        enough = [length for length, count in counts.items() if count >= RIGHT * self._needles]
        chosen = max(enough, default=min(lengths))
        share = counts[chosen] / self._needles
        text = f"exact reading finds {share:.0%} of the needles in {chosen:,} tokens"
        report.figure("exact_share", share, text, at_least=RIGHT if bound else None)
        return chosen

    def decode_seconds(self, chosen: Sequence[ReadingPolicy]) -> list[float]:
        """Median seconds of tokens after the text under each policy. The text is computed before."""
        seconds: list[list[float]] = [[] for _ in chosen]
        for turn in range(self._repeats + 1):
            prompt = self._text[: len(self._text) - CONTINUATION - turn]
            for reading in chosen:
                continue_each(self._engine, [prompt], 1, reading)
            for reading, each in zip(chosen, seconds, strict=True):
                begin = time.perf_counter()
                continue_each(self._engine, [prompt], CONTINUATION, reading)
                each.append(time.perf_counter() - begin)
        return [float(np.median(each[1:])) for each in seconds]

    def continuations(self, reading: ReadingPolicy) -> list[Tokens]:
        """Greedy continuations of prefixes of the text, from its middle on."""
        ends = np.linspace(len(self._text) // 2, len(self._text) - CONTINUATION, CONTINUATIONS, dtype=int)
        return continue_each(self._engine, [self._text[:end] for end in ends], CONTINUATION, reading)

    def timed_perplexity(self, reading: ReadingPolicy) -> tuple[float, float]:
        """Perplexity of the text, and the seconds that it took, from an empty cache."""
        self._engine.reset_prefix_cache()
        begin = time.perf_counter()
        value = perplexity(self._engine, self._text, reading)
        return value, time.perf_counter() - begin

    def needles(self, readings: Sequence[ReadingPolicy], length: int, *, together: bool = False) -> list[int]:
        """How many needles each policy finds in one text, computed anew."""
        self._engine.reset_prefix_cache()
        hidden = Needles.hidden(self._tokenizer, length, self._needles)
        return [sum(hidden.found(self._engine, reading, together=together)) for reading in readings]


def measure_answers(
    report: Report, bench: Bench, chosen: Sequence[Contender], length: int, context: int
) -> list[dict[str, Any]]:
    """Figures of each contender with exact prompts, after those of exact reading."""
    readings = [one.reading(context) for one in chosen]
    seconds = bench.decode_seconds([EXACT, *readings])
    report.contender("seconds_exact", "exact", seconds[0])
    for one, decode in zip(chosen, seconds[1:], strict=True):
        report.contender(f"seconds_{one.label}", one.label, decode)
    exact = bench.continuations(EXACT)
    agreements = [Agreement.between(exact, bench.continuations(reading)) for reading in readings]
    needles = bench.needles([one.reading(length) for one in chosen], length)
    rows = []
    for one, reading, decode, agreement, count in zip(chosen, readings, seconds[1:], agreements, needles, strict=True):
        keys = keys_read(reading, context - 1)
        report.say(
            f"{one.label}: {keys:,} keys; {count} needles; {agreement.equal} of {agreement.of} continuations equal, "
            f"the first {agreement.tokens:.1f} tokens; decoding takes {decode / seconds[0]:.2f}×"
        )
        row = {"policy": one.name, "share": one.share, "keys": keys, "needles": count, "decode": decode / seconds[0]}
        rows.append({**row, "agreement": asdict(agreement)})
    choosing = [place for place, one in enumerate(chosen) if isinstance(one.reading(length), TopBlocks)]
    at_once = bench.needles([chosen[place].reading(length) for place in choosing], length, together=True)
    for place, count in zip(choosing, at_once, strict=True):
        rows[place]["needles_together"] = count
        report.say(f"{chosen[place].label}: {count} needles if all questions are asked together")
    return rows


def measure_prompts(
    report: Report, bench: Bench, chosen: Sequence[Contender], length: int, context: int
) -> list[dict[str, Any]]:
    """Figures of each contender with inexact prompts; none of one that reads prompts exactly."""
    exact, exact_seconds = bench.timed_perplexity(EXACT)
    report.keep(perplexity_exact=exact, perplexity_seconds_exact=exact_seconds)
    rows: list[dict[str, Any]] = []
    for one in chosen:
        reading, shorter = inexact_prompts(one.reading(context)), inexact_prompts(one.reading(length))
        rows.append({})
        if reading is not None and shorter is not None:
            value, seconds = bench.timed_perplexity(reading)
            (count,) = bench.needles([shorter], length)
            rows[-1] = {"perplexity": value / exact, "prefill": seconds / exact_seconds, "needles_prompts": count}
            report.say(
                f"{one.label}, prompts too: {count} needles; perplexity {value / exact:.3f}×, prefill "
                f"{seconds / exact_seconds:.2f}×"
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of a text's keys that are read")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of texts with needles")
    parser.add_argument("--needles", type=int, default=len(NUMBERS), help="numbers hidden in the text")
    parser.add_argument("--context", type=int, default=LONG_TEXT, help="tokens of the long text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--no-prompts", action="store_true", help="exact prompts alone; inexact ones take most time")
    parser.add_argument("--model", type=Path, help="a directory instead of SmolLM2, without bounds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report, path = Report("reading"), options.model or smollm2.fetch()
    limit = StepLimit(Shape.of(AutoConfig.from_pretrained(path)), cpu_ceilings(torch.float32), itemsize=4)
    step = limit.step(1, 1, options.context, options.context)
    report.limit(f"{CONTINUATION} tokens after {options.context:,}, all keys read", CONTINUATION * step)
    chosen = [Contender(name, share) for name in options.policies for share in options.shares]
    report.keep(context=options.context, repeats=options.repeats, continuation=CONTINUATION)
    with Engine(path, dtype="float32", kv_tokens=4 * options.context, warm_up=False) as engine:
        bench = Bench(engine, AutoTokenizer.from_pretrained(path), options.needles, options.context, options.repeats)
        length = bench.longest_length(report, options.lengths, bound=options.model is None)
        report.keep(needle_length=length, needles=options.needles)
        rows = measure_answers(report, bench, chosen, length, options.context)
        if not options.no_prompts:
            prompts = measure_prompts(report, bench, chosen, length, options.context)
            rows = [row | more for row, more in zip(rows, prompts, strict=True)]
    report.keep(rows=rows)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
