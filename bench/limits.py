"""The least that a chip can take for what a workload asks: weights and distinct keys read once, each product made once.

A step takes the longer of reading the weights and multiplying by them, and in every layer the longer of reading each
distinct key once and multiplying by all keys that its rows see.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.device import Ceilings
from bench.shapes import Shape
from bench.workloads import Answers, Ask, Tokens

BYTES = 2
"""Of a weight, a key's or value's number: bfloat16"""

Path = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Model:
    """What a step of a model of this shape takes a chip with these ceilings."""

    shape: Shape
    ceilings: Ceilings

    def step(self, rows: int, logit_rows: int, keys: int, pairs: float) -> float:
        """Seconds of a step of `rows` that reads `keys` distinct tokens.

        `logit_rows` of the rows give logits; `pairs` are
        those of a row and a key that it sees.
        """
        shape, ceilings = self.shape, self.ceilings
        width = shape.head_dim * (2 * shape.q_heads + 2 * shape.kv_heads)
        layers = shape.layers * shape.hidden * (width + 3 * shape.inner)
        head = shape.hidden * shape.vocab
        read = BYTES * (layers + head) / ceilings.read
        multiplied = 2 * (rows * layers + logit_rows * head) / ceilings.matrix
        keys_read = 2 * BYTES * shape.layers * shape.kv_heads * shape.head_dim * keys / ceilings.read
        keys_multiplied = 4 * shape.layers * shape.q_heads * shape.head_dim * pairs / ceilings.matrix
        return max(read, multiplied) + max(keys_read, keys_multiplied)


class Limit:
    """Adds up what a workload's asks take at least, on a model whose cache holds all that was asked before."""

    def __init__(self, model: Model, step_tokens: int) -> None:
        """step_tokens: rows of a step at the most."""
        self._model, self._step_tokens = model, step_tokens
        self._known: list[Path] = []

    def seconds(self, ask: Ask, answers: Answers) -> tuple[float, float]:
        """Seconds until all first tokens are there, and for all tokens. What was asked is known afterwards."""
        prompts = [_path(prompt) for prompt in ask.prompts]
        fresh = distinct([*self._known, *prompts]) - distinct(self._known)
        rows, length = ask.n * len(prompts), sum(map(len, prompts)) / len(prompts)
        keys, seen = distinct(prompts), float(ask.n * sum(map(len, prompts)))
        # Fresh tokens lie at the ends of their paths, and see half of each other.
        pairs = fresh * (length - fresh / len(prompts) / 2)
        steps = max(1, -(-fresh // self._step_tokens))
        first = steps * self._model.step(-(-fresh // steps), len(prompts), keys // steps, pairs / steps)
        later = sum(self._model.step(rows, rows, keys + rows * turn, seen + rows * turn) for turn in range(1, ask.new))
        for prompt, some in zip(ask.prompts, answers, strict=True):
            self._known += [_path(prompt + answer) for answer in some]
        return first, first + later


def distinct(paths: list[Path]) -> int:
    """Tokens of a tree of these paths."""
    ordered = sorted(paths, key=lambda path: path.astype(">i4").tobytes())
    return sum(map(len, paths)) - sum(_common(*pair) for pair in zip(ordered, ordered[1:], strict=False))


def _common(one: Path, other: Path) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length


def _path(tokens: Tokens) -> Path:
    return np.array(tokens, np.int32)
