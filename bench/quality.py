"""What inexact keys, or inexact reading, cost a small model: texts, needles in them, and how answers compare."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from radixgen import Engine, SamplingParams
from radixgen.core.reading import EXACT, ReadingPolicy

LONG_TEXT = 8_000
NUMBERS = (
    "The phone number of Anna is", "The price of the red car is", "The room number of the teacher is",
    "The ticket number of Peter is", "The distance to the lake is", "The weight of the elephant is",
    "The code of the garage door is", "The number of books in the library is", "The depth of the well is",
    "The salary of the doctor is", "The population of the village is", "The flight to Tokyo has the number",
    "The bus that goes to school has the number", "The cost of the wedding is",
    "The combination of the bank safe is", "The length of the river is",
)  # fmt: skip
"""What the numbers are of that are hidden in a text"""

Tokens = list[int]
Tokenizer = Callable[..., Any]


def tokens_of(tokenizer: Tokenizer, text: str) -> Tokens:
    ids: Tokens = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
    return ids


def document(tokenizer: Tokenizer) -> Tokens:
    """Up to 8,000 tokens of the demo's document."""
    text = files("radixgen.demo").joinpath("document.md").read_text(encoding="utf-8")
    return tokens_of(tokenizer, text)[:LONG_TEXT]


def topic_tokens(tokenizer: Tokenizer) -> Tokens:
    """The topics of the Python documentation."""
    return tokens_of(tokenizer, "\n".join(topics.values()))


def perplexity(engine: Engine, tokens: Tokens, reading: ReadingPolicy = EXACT) -> float:
    """Perplexity of `tokens`, given the first of them."""
    (output,) = engine.generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=0, reading=reading))
    assert output.prompt_logprobs is not None
    each = [logprobs[token] for token, logprobs in zip(tokens, output.prompt_logprobs, strict=True) if logprobs]
    return math.exp(-float(np.mean(each)))


def continue_each(
    engine: Engine, prompts: Sequence[Tokens], count: int, reading: ReadingPolicy = EXACT
) -> list[Tokens]:
    """Greedy continuations of `count` tokens, whatever they are, one prompt after another: where rows with a common
    prefix choose their keys together, each shall choose alone.
    """
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, reading=reading)
    return [engine.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]


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
    def hidden(cls, tokenizer: Tokenizer, length: int, count: int) -> "Needles":
        """`count` numbers, at even distances in a text of about `length` tokens."""
        numbers = [str(number) for number in random.Random(length).sample(range(1_000, 10_000), count)]
        sentences = [f"\n{what} {number}.\n" for what, number in zip(NUMBERS, numbers, strict=False)]
        needles = [tokens_of(tokenizer, sentence) for sentence in sentences]
        size = max(length - sum(map(len, needles)), 0) // (count + 1)
        filler = topic_tokens(tokenizer)
        text = filler[:size]
        for place, needle in enumerate(needles, start=1):
            text = text + needle + filler[place * size : (place + 1) * size]
        return cls(text, [tokens_of(tokenizer, f"\n{what}") for what in NUMBERS[:count]], numbers)

    def found(self, engine: Engine, reading: ReadingPolicy = EXACT, *, together: bool = False) -> list[bool]:
        """Whether the greedy answer to each question begins with its number. `together`: all are asked at once."""
        prompts = [self.text + question for question in self.questions]
        params = SamplingParams(temperature=0.0, max_tokens=6, reading=reading)
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = [output for batch in batches for output in engine.generate(batch, params)]
        texts = [output.outputs[0].text.strip() for output in outputs]
        return [text.startswith(answer) for text, answer in zip(texts, self.answers, strict=True)]
