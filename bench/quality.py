"""What inexact keys, or inexact reading, cost a small model: texts, needles in them, and how answers compare."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pydoc_data.topics import topics

import numpy as np

from radixgen import Engine, SamplingParams
from radixgen.core.reading import EXACT, Reading

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


def perplexity(engine: Engine, tokens: Tokens, reading: Reading = EXACT) -> float:
    """Perplexity of `tokens`, given the first of them."""
    (output,) = engine.generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=0, reading=reading))
    assert output.prompt_logprobs is not None
    each = [logprobs[token] for token, logprobs in zip(tokens, output.prompt_logprobs, strict=True) if logprobs]
    return math.exp(-float(np.mean(each)))


def continue_each(engine: Engine, prompts: Sequence[Tokens], count: int, reading: Reading = EXACT) -> list[Tokens]:
    """Greedy continuations of `count` tokens, whatever they are."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, reading=reading)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, params)]


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

    def found(self, engine: Engine, reading: Reading = EXACT) -> list[bool]:
        """Whether the greedy answer to each question begins with its number."""
        prompts = [self.text + question for question in self.questions]
        params = SamplingParams(temperature=0.0, max_tokens=8, reading=reading)
        texts = [output.outputs[0].text.strip() for output in engine.generate(prompts, params)]
        return [text.startswith(answer) for text, answer in zip(texts, self.answers, strict=True)]
