"""Documents in new orders under `reuse="segments"`, beside exact prefix caching.

    python -m bench.segments [--check] [--save] [--recompute 0.15] [--min-run 64]
    python -m bench.segments --gpu [--check] [--save]

8 documents of 900 tokens, topics of the Python documentation, in 4 orders, each followed by questions; SmolLM2-135M in
float32. Both ways of reuse have a namespace each in one engine, and take turns.

- *Computed*: prompt tokens that went through the model, over those of prefix caching.
- *Time to first token*: of the first question in each order.
- *Perplexity*: of the greedy answers that the exact model gives, and of the text that follows each document, both read
  after the whole prompt; over that of the exact model.
- *Greedy*: how many tokens of the answers come before the first that differs.

With `--gpu`: a Llama of 8B shape with random weights in bfloat16, and 16 documents of 1,024 random tokens in new
orders; only times to first token are measured, because random weights say nothing of quality.

Bias. The model is small, and no document needs another to be understood. Answers of 40 tokens end in repetition.
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pydoc_data.topics import topics
from time import perf_counter

import numpy as np
import torch

from bench.report import Report, benchmark_options, track
from bench.shapes import SHAPES, build
from radixgen import Engine, SamplingParams, SegmentReuse
from radixgen.core import Reuse

COUNT, LENGTH = 8, 900
ORDERS = [(0, 1, 2, 3, 4, 5, 6, 7), (3, 1, 6, 0, 7, 2, 5, 4), (5, 4, 7, 6, 1, 0, 3, 2), (2, 7, 0, 4, 3, 6, 1, 5)]
ANSWER, FOLLOWING, REPEATED = 40, 64, 32
"""Tokens of an answer, of the text after a document, and of the document's end that precedes it in a question."""
WAYS: tuple[Reuse, ...] = ("prefix", "segments")
COMPUTED, COMPUTED_LATER, FIRST_TOKEN, PERPLEXITY, FIRST_TOKEN_GPU = 0.40, 0.20, 0.4, 0.03, 0.3
GPU_COUNT, GPU_LENGTH, GPU_ORDERS = 16, 1024, 4


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of documents, of questions about them, and of texts that follow them."""

    documents: list[list[int]]
    questions: list[list[int]]
    following: list[tuple[list[int], list[int]]]
    """Of each document: a question that repeats its end, and the text that follows."""

    def prompt(self, order: Sequence[int]) -> list[int]:
        return [token for number in order for token in self.documents[number]]


@dataclass(slots=True)
class Figures:
    """What one way of reuse took, order by order."""

    computed: list[int] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    answers: list[list[list[int]]] = field(default_factory=list)
    answer_loss: list[float] = field(default_factory=list)
    """Mean negative log-probability of the exact answers' tokens."""
    following_loss: list[float] = field(default_factory=list)


def read_texts(engine: Engine) -> Texts:
    """The first topics that are long enough."""
    names, tokens = [], []
    for name, text in topics.items():
        ids = engine.tokenize(text, special=False).tolist()
        if len(ids) >= LENGTH + FOLLOWING and len(names) < COUNT:
            names.append(name)
            tokens.append(ids)
    asked = [f"\n\nQuestion: What does the text about {name} explain?\nAnswer:" for name in names]
    again = engine.tokenize("\n\nOne of the texts goes on:\n", special=False).tolist()
    return Texts(
        documents=[ids[:LENGTH] for ids in tokens],
        questions=[engine.tokenize(text, special=False).tolist() for text in asked],
        following=[(again + ids[LENGTH - REPEATED : LENGTH], ids[LENGTH : LENGTH + FOLLOWING]) for ids in tokens],
    )


def first_token(engine: Engine, prompt: list[int], reuse: Reuse, namespace: str) -> tuple[float, int]:
    """Seconds until a prompt's first token, and the number of its tokens that were computed."""
    before = engine.stats().computed_prompt_tokens
    began = perf_counter()
    engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=1), reuse=reuse, namespace=namespace)
    while engine.has_unfinished:
        engine.step()
    return perf_counter() - began, engine.stats().computed_prompt_tokens - before


def answer(engine: Engine, prompt: list[int], reuse: Reuse) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    engine.submit(prompt, params, reuse=reuse, namespace=reuse, output_kind="final")
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs[-1].outputs[0].token_ids


def loss(engine: Engine, prompt: list[int], text: list[int], reuse: Reuse) -> float:
    (logprobs,) = engine.score(prompt, [text], namespace=reuse, reuse=reuse)
    return -float(np.mean(logprobs))


def measure(settings: SegmentReuse) -> dict[Reuse, Figures]:
    """Serve all orders in both ways."""
    found = {way: Figures() for way in WAYS}
    slots = 2 * len(ORDERS) * (COUNT * LENGTH + 1_500)
    with Engine("smollm2", dtype="float32", kv_tokens=slots, reuse=settings, warm_up=False) as engine:
        texts = read_texts(engine)
        for number, order in enumerate(track(ORDERS, "orders")):
            prompt = texts.prompt(order)
            for way in WAYS if number % 2 else WAYS[::-1]:
                seconds, computed = first_token(engine, prompt + texts.questions[order[0]], way, way)
                found[way].first_token.append(seconds)
                found[way].computed.append(computed)
            asked = [prompt + texts.questions[index] for index in order[1::2]]
            after = [(prompt + texts.following[index][0], texts.following[index][1]) for index in order[::2]]
            for way in WAYS:
                figures = found[way]
                figures.answers.append([answer(engine, each, way) for each in asked])
                expected = found["prefix"].answers[number]
                pairs = zip(asked, expected, strict=True)
                figures.answer_loss.append(statistics.mean(loss(engine, a, b, way) for a, b in pairs))
                figures.following_loss.append(statistics.mean(loss(engine, a, b, way) for a, b in after))
    return found


def report_orders(report: Report, settings: SegmentReuse) -> None:
    report.say(
        f"limit: {settings.recompute:.0%} of {COUNT * LENGTH} tokens are computed anew in orders two to {len(ORDERS)}"
    )
    found = measure(settings)
    exact, inexact = found["prefix"], found["segments"]
    for number in range(len(ORDERS)):
        report.say(
            f"order {number + 1}: {exact.computed[number]:,} tokens in {exact.first_token[number]:.2f} s, "
            f"with segments {inexact.computed[number]:,} in {inexact.first_token[number]:.2f} s"
        )
    whole = sum(inexact.computed) / sum(exact.computed)
    later = sum(inexact.computed[1:]) / sum(exact.computed[1:])
    report.figure("computed", whole, f"prompt tokens computed: {whole:.3f} × prefix caching", at_most=COMPUTED)
    text = f"prompt tokens computed in later orders: {later:.3f} × prefix caching"
    report.figure("computed_later", later, text, at_most=COMPUTED_LATER)
    ratio = statistics.median(b / a for a, b in zip(exact.first_token[1:], inexact.first_token[1:], strict=True))
    text = f"time to first token in later orders: {ratio:.3f} × prefix caching"
    report.figure("first_token", ratio, text, at_most=FIRST_TOKEN)
    for key, name in (("answer_loss", "the exact answers"), ("following_loss", "the texts that follow")):
        before, after = (statistics.mean(getattr(figures, key)[1:]) for figures in (exact, inexact))
        change = math.exp(after - before) - 1.0
        text = f"perplexity of {name}: {math.exp(before):.4f}, with segments {math.exp(after):.4f}, {change:+.2%}"
        report.figure(f"perplexity_{key.removesuffix('_loss')}", change, text, at_most=PERPLEXITY)
    report_greedy(report, exact, inexact)


def report_greedy(report: Report, exact: Figures, inexact: Figures) -> None:
    """How long answers in later orders agree."""
    pairs = [
        (a, b)
        for one, other in zip(exact.answers[1:], inexact.answers[1:], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    equal = [len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))) for a, b in pairs]
    whole = sum(length == ANSWER for length in equal)
    report.say(f"greedy: {whole} of {len(equal)} answers equal; the first {np.mean(equal):.1f} of {ANSWER} tokens")
    report.keep(greedy={"equal": whole, "of": len(equal), "tokens": float(np.mean(equal))})


def report_gpu(report: Report, settings: SegmentReuse) -> None:
    """Time to first token of known documents in a new order, at 8B shape."""
    generator = np.random.default_rng(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES["8B" if device.type == "cuda" else "toy"]
    documents = generator.integers(0, shape.vocab, (GPU_COUNT, GPU_LENGTH))
    question = generator.integers(0, shape.vocab, 32)
    orders = [generator.permutation(GPU_COUNT) for _ in range(1 + GPU_ORDERS)]
    size = GPU_COUNT * GPU_LENGTH + question.size
    report.say(f"limit: {settings.recompute:.0%} of {size:,} tokens are computed anew")
    ratios = []
    with Engine(
        build(shape, device), kv_tokens=(2 * len(orders) + 1) * size, reuse=settings, max_model_len=size + 8
    ) as engine:
        for number, order in enumerate(orders):
            prompt = [*documents[order].reshape(-1).tolist(), *question.tolist()]
            seconds = {way: first_token(engine, prompt, way, way) for way in (WAYS if number % 2 else WAYS[::-1])}
            line = ", ".join(f"{way} {s * 1e3:.1f} ms for {n:,} tokens" for way, (s, n) in sorted(seconds.items()))
            report.say(f"order {number + 1}: {line}")
            if number > 1:  # the first step of each kind is slow
                ratios.append(seconds["segments"][0] / seconds["prefix"][0])
    ratio = statistics.median(ratios)
    text = f"time to first token of {size:,} tokens in a new order: {ratio:.3f} × prefix caching"
    report.figure("first_token", ratio, text, at_most=FIRST_TOKEN_GPU)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="8B shape instead of SmolLM2")
    parser.add_argument("--min-run", type=int, default=SegmentReuse().min_run)
    parser.add_argument("--recompute", type=float, default=SegmentReuse().recompute)
    options: Namespace = parser.parse_args(arguments)
    settings = SegmentReuse(options.min_run, options.recompute)
    report = Report("segments_gpu" if options.gpu else "segments")
    report.keep(min_run=settings.min_run, recompute=settings.recompute)
    (report_gpu if options.gpu else report_orders)(report, settings)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
