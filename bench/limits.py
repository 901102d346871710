"""The least time that a chip can take for what a workload asks: weights and distinct keys read once a step.

A step takes the longer of reading the weights and multiplying by them, and in every layer the longer of reading each
distinct key once and multiplying by all keys that its rows see.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.device import Ceilings
from bench.shapes import Shape
from bench.workloads import Answers, Ask, Tokens

TokenPath = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLimit:
    """Of a Llama of this shape, on a chip with these ceilings. Times are seconds."""

    shape: Shape
    ceilings: Ceilings
    itemsize: int = 2
    """Bytes of each number of weights, keys and values"""

    def weights(self, rows: int, logit_rows: int) -> float:
        """Of reading the weights once, or multiplying `rows` by them, `logit_rows` of which give logits."""
        shape, ceilings = self.shape, self.ceilings
        width = shape.head_dim * (2 * shape.q_heads + 2 * shape.kv_heads)
        layers = shape.layers * shape.hidden * (width + 3 * shape.inner)
        head = shape.hidden * shape.vocab
        read = self.itemsize * (layers + head) / ceilings.read
        return max(read, 2 * (rows * layers + logit_rows * head) / ceilings.matrix)

    def step(self, rows: int, logit_rows: int, keys: int, pairs: float) -> float:
        """Of a step that reads `keys` distinct tokens; `pairs` counts every row with every key that it sees."""
        shape, ceilings = self.shape, self.ceilings
        read = 2 * self.itemsize * shape.layers * shape.kv_heads * shape.head_dim * keys / ceilings.read
        multiplied = 4 * shape.layers * shape.q_heads * shape.head_dim * pairs / ceilings.matrix
        return self.weights(rows, logit_rows) + max(read, multiplied)


class WorkloadLimit:
    """What the asks of one workload take at least, in their order: the cache holds all that was asked before."""

    def __init__(self, limit: StepLimit, step_tokens: int) -> None:
        """step_tokens: rows of a step at the most."""
        self._limit, self._step_tokens = limit, step_tokens
        self._cached: list[TokenPath] = []

    def seconds(self, ask: Ask, answers: Answers) -> float:
        """From the first prompt to the last token. Prompts and answers are cached afterwards."""
        prompts = [_path(prompt) for prompt in ask.prompts]
        fresh = distinct([*self._cached, *prompts]) - distinct(self._cached)
        rows, length = ask.n * len(prompts), sum(map(len, prompts)) / len(prompts)
        keys, seen = distinct(prompts), float(ask.n * sum(map(len, prompts)))
        # Fresh tokens lie at the ends of their paths, and see half of each other.
        pairs = fresh * (length - fresh / len(prompts) / 2)
        steps = max(1, -(-fresh // self._step_tokens))
        first = steps * self._limit.step(-(-fresh // steps), len(prompts), keys // steps, pairs / steps)
        later = sum(self._limit.step(rows, rows, keys + rows * turn, seen + rows * turn) for turn in range(1, ask.new))
        for prompt, some in zip(ask.prompts, answers, strict=True):
            self._cached += [_path(prompt + answer) for answer in some]
        return first + later


def distinct(paths: list[TokenPath]) -> int:
    """Tokens of the radix tree of these paths."""
    ordered = sorted(paths, key=lambda path: path.astype(">i4").tobytes())
    return sum(map(len, paths)) - sum(_common(*pair) for pair in zip(ordered, ordered[1:], strict=False))


def _common(one: TokenPath, other: TokenPath) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if differ.size else length


def _path(tokens: Tokens) -> TokenPath:
    return np.array(tokens, np.int32)
