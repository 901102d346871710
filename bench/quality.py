"""What inexact keys, or inexact reading of them, cost a small model: texts, needles in them, and how answers compare."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from radixgen import Engine, RequestOutput, SamplingParams

LONG_TEXT = 8_000
CITIES = (
    "Paris", "Rome", "Madrid", "Lisbon", "Vienna", "Berlin", "London", "Dublin", "Oslo", "Athens", "Warsaw", "Prague",
    "Cairo", "Tokyo", "Delhi", "Lima",
)  # fmt: skip
NEEDLE = "\nThe secret number of {city} is {number}.\n"
QUESTION = "\nThe secret number of {city} is"

Tokens = list[int]


def document(engine: Engine) -> Tokens:
    """Up to 8,000 tokens of the demo's document."""
    text = files("radixgen.demo").joinpath("document.md").read_text(encoding="utf-8")
    return engine.tokenize(text).tolist()[:LONG_TEXT]


def topic_tokens(engine: Engine) -> Tokens:
    """The topics of the Python documentation."""
    return engine.tokenize("\n".join(topics.values())).tolist()


def run(
    engine: Engine, prompts: Sequence[Tokens], params: SamplingParams, options: dict[str, Any] | None = None
) -> list[RequestOutput]:
    """The outputs of all prompts, in their order. `options` are those of `Engine.submit`."""
    ids = [engine.submit(prompt, params, output_kind="final", **(options or {})) for prompt in prompts]
    outputs = {}
    while len(outputs) < len(ids):
        outputs |= {output.request_id: output for output in engine.receive() if output.finished}
    return [outputs[request] for request in ids]


def perplexity(engine: Engine, tokens: Tokens, options: dict[str, Any] | None = None) -> float:
    """Perplexity of `tokens`, given the first of them."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = run(engine, [tokens], params, options)
    assert output.prompt_logprobs is not None
    each = [logprobs[token] for token, logprobs in zip(tokens, output.prompt_logprobs, strict=True) if logprobs]
    return math.exp(-float(np.mean(each)))


def continue_each(
    engine: Engine, prompts: Sequence[Tokens], count: int, options: dict[str, Any] | None = None
) -> list[Tokens]:
    """Greedy continuations of `count` tokens, whatever they are."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return [output.outputs[0].token_ids for output in run(engine, prompts, params, options)]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far continuations agree with exact ones."""

    equal: int
    """Continuations that are equal to their ends."""
    of: int
    tokens: float
    """Tokens before the first that differs, on average."""

    @classmethod
    def between(cls, exact: Sequence[Tokens], others: Sequence[Tokens]) -> "Agreement":
        pairs = [list(zip(a, b, strict=True)) for a, b in zip(exact, others, strict=True)]
        equal = [len(list(takewhile(lambda pair: pair[0] == pair[1], pair))) for pair in pairs]
        whole = sum(count == len(pair) for count, pair in zip(equal, pairs, strict=True))
        return cls(whole, len(equal), float(np.mean(equal)))


@dataclass(frozen=True, slots=True)
class Needles:
    """Numbers hidden in a long text, each at its own depth, and a question for each."""

    text: Tokens
    questions: list[Tokens]
    answers: list[str]

    @classmethod
    def hidden(cls, engine: Engine, length: int) -> "Needles":
        """A number for each of 16 cities, at even distances in a text of about `length` tokens."""
        numbers = [str(number) for number in random.Random(length).sample(range(1_000, 10_000), len(CITIES))]
        filler, size = topic_tokens(engine), length // (len(CITIES) + 1)
        text = filler[:size]
        for place, (city, number) in enumerate(zip(CITIES, numbers, strict=True), start=1):
            text += engine.tokenize(NEEDLE.format(city=city, number=number)).tolist()
            text += filler[place * size : (place + 1) * size]
        questions = [engine.tokenize(QUESTION.format(city=city)).tolist() for city in CITIES]
        return cls(text, questions, numbers)

    def found(self, engine: Engine, options: dict[str, Any] | None = None) -> list[bool]:
        """Whether the greedy answer to each question begins with its number."""
        prompts = [self.text + question for question in self.questions]
        outputs = run(engine, prompts, SamplingParams(temperature=0.0, max_tokens=8), options)
        texts = [output.outputs[0].text.strip() for output in outputs]
        return [text.startswith(answer) for text, answer in zip(texts, self.answers, strict=True)]
