"""What a reading policy leaves unread in logged prompts, measured on some of their rows. Requires the model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixgen.cache import TokenArray
from radixgen.core import InvalidRequest, Limits, Plan, PromptTooLong, check_integer
from radixgen.core.reading import (
    EXACT,
    Exact,
    PositionPolicy,
    ReadingPolicy,
    TopBlocks,
    check_reading,
    reading_to_json,
)
from radixgen.model.loader import LoadedModel
from radixgen.model.prepare import allocate_kv
from radixgen.model.runner import ModelRunner
from radixgen.model.tree_model import TreeModel
from radixgen.model.unread_attention import unread_attention
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import plan, plan_reading
from radixgen.scheduler.revise import StepRows

DEFAULT_PROMPTS, MAX_PROMPTS = 8, 1_024
DEFAULT_ROWS, MAX_ROWS = 16, 1_024
_STEP_TOKENS = 2_048
"""Rows of a step that computes a prompt"""


@dataclass(frozen=True, slots=True)
class UnreadAttention:
    """What some rows leave unread under a reading policy. Shares are from 0 to 1."""

    rows: int
    keys: float
    """Number of keys up to a row, its own included, on average"""
    keys_read: float
    """Number of keys that a row reads in a layer without a window, on average over rows and KV heads"""
    unread: float
    """Share of attention in keys that are not read, on average over rows, layers and query heads"""
    worst_layer: int
    worst_head: int
    """The layer and its query head, from 0, with the greatest share, on average over rows"""
    worst_unread: float
    """That share"""


@dataclass(frozen=True, slots=True)
class PromptReading:
    """What rows of one prompt leave unread."""

    prompt: int
    """Index of the prompt in the log"""
    tokens: int
    """Length of the prompt"""
    attention: UnreadAttention


@dataclass(frozen=True, slots=True)
class ReadingReport:
    """What a reading policy leaves unread in some prompts of a log."""

    reading: ReadingPolicy
    prompts: int
    """Number of prompts in the log"""
    measured: list[PromptReading]
    overall: UnreadAttention
    """Of the rows of all measured prompts"""

    def as_dict(self) -> dict[str, Any]:
        """The report, for JSON."""
        return asdict(self) | {"reading": reading_to_json(self.reading)}


class _Row(NamedTuple):
    keys: int
    keys_read: int
    unread: Tensor
    """`[layers, q_heads]`"""


def explain_reading(
    prompts: Sequence[Sequence[int] | TokenArray],
    model: LoadedModel,
    reading: ReadingPolicy,
    *,
    max_prompts: int = DEFAULT_PROMPTS,
    rows: int = DEFAULT_ROWS,
) -> ReadingReport:
    """Measure the share of attention that a reading policy leaves unread.

    prompts: token ids. At most `max_prompts` are measured, spread evenly over the sequence.
    rows: up to so many rows of each prompt are measured, spread evenly over those that the policy reads: a greedy
        answer of as many tokens at most, and if the policy reads prompts, also the prompt.

    Everything is computed exactly, and the attention of each row is computed twice in every layer: over all keys and
    over those that the policy reads. Each row is alone in its step. A key's share is that of its softmax weight among
    all keys; attention sinks that are no keys are left out.

    Raises `InvalidRequest`, `PromptTooLong`, `UnsupportedModel`.
    """
    check_reading("reading", reading)
    if not isinstance(reading, Exact | PositionPolicy | TopBlocks):
        raise InvalidRequest("reading", reading, "is not measured: must be a policy by position, or top_blocks")
    check_integer("max_prompts", max_prompts, 1, MAX_PROMPTS)
    check_integer("rows", rows, 1, MAX_ROWS)
    if not prompts:
        raise InvalidRequest("prompts", [], "must not be empty")
    tree_model = TreeModel(model.model, model.name, None, _STEP_TOKENS)
    try:
        runner = ModelRunner(tree_model, "auto", model.eos_token_ids, graphs=False)
        chosen = {
            index: _checked(index, prompts[index], runner, rows) for index in _spread(0, len(prompts), max_prompts)
        }
        slots = max(prompt.size for prompt in chosen.values()) + rows
        allocate_kv(runner, slots, Limits(), _STEP_TOKENS)
        found = {index: _measure(runner, prompt, reading, rows) for index, prompt in chosen.items()}
    finally:
        tree_model.release()
    each = [PromptReading(index, int(chosen[index].size), _summary(measured)) for index, measured in found.items()]
    return ReadingReport(
        reading, len(prompts), each, _summary([row for measured in found.values() for row in measured])
    )


def _checked(index: int, prompt: Sequence[int] | TokenArray, runner: ModelRunner, rows: int) -> TokenArray:
    """Return a prompt that leaves room for `rows` tokens after it."""
    tokens = np.asarray(prompt, np.int64)
    name = f"prompts[{index}]"
    if not tokens.size or tokens.min() < 0 or tokens.max() >= runner.vocab_size:
        raise InvalidRequest(name, prompt, f"must be token ids below {runner.vocab_size}, at least one")
    if tokens.size + rows > runner.max_model_len:
        limit = f"must leave {rows} of the {runner.max_model_len} tokens of the context"
        raise PromptTooLong(f"len({name})", tokens.size, limit)
    return tokens.astype(np.int32)


def _measure(runner: ModelRunner, prompt: TokenArray, reading: ReadingPolicy, rows: int) -> list[_Row]:
    """Measure up to `rows` rows of a prompt and its answer."""
    tokens = _answered(runner, prompt, rows)
    first = 0 if reading.reads_prompt else int(prompt.size)
    return [_measure_row(runner, int(tokens[at]), at, reading) for at in _spread(first, tokens.size, rows)]


def _answered(runner: ModelRunner, prompt: TokenArray, most: int) -> TokenArray:
    """Return a prompt with its greedy answer of 1 to `most` tokens, the KV of all in the slots from 0 on."""
    tokens, computed = prompt.tolist(), 0
    while len(tokens) < prompt.size + most:
        for first in range(computed, len(tokens), _STEP_TOKENS):
            logits = _compute(runner, tokens[first : first + _STEP_TOKENS], first)
        computed = len(tokens)
        tokens.append(int(logits[0].argmax()))
        if tokens[-1] in runner.eos_token_ids:
            break
    _compute(runner, tokens[computed:], computed)
    return np.array(tokens, np.int32)


def _compute(runner: ModelRunner, tokens: list[int], first: int) -> Tensor:
    """Compute the tokens at positions from `first` on. Returns logits `[1, vocab]` after the last."""
    positions = np.arange(first, first + len(tokens), dtype=np.int32)
    made = plan(_path(first + len(tokens)), np.zeros_like(positions), positions, cost=runner.costs)
    return runner.run(made, np.array(tokens), positions.astype(np.int64), np.array([len(tokens) - 1]))


def _measure_row(runner: ModelRunner, token: int, position: int, reading: ReadingPolicy) -> _Row:
    exact, sparse = (_plan_row(runner, position, policy) for policy in (EXACT, reading))
    return _Row(position + 1, sparse.kv_tokens_read, unread_attention(runner, exact, sparse, token).cpu())


def _plan_row(runner: ModelRunner, position: int, reading: ReadingPolicy) -> Plan:
    """Plan the row at `position`, whose KV is stored."""
    node, row = np.zeros(1, np.int32), np.full(1, position, np.int32)
    return plan_reading(_path(position + 1), StepRows(node, row, np.full(1, -1), node), [reading], cost=runner.costs)


def _path(length: int) -> Forest:
    """A single node with this many keys, in the slots from 0 on."""
    start, lengths = np.zeros(1, np.int32), np.full(1, length, np.int32)
    return Forest(start - np.int32(1), start, lengths, np.arange(2), start.astype(np.int64), lengths)


def _spread(first: int, stop: int, most: int) -> list[int]:
    """Up to `most` integers, spread evenly over `[first, stop)`, both ends included."""
    spread = np.linspace(first, stop - 1, min(most, stop - first)).round().astype(int)
    return [int(value) for value in spread]


def _summary(rows: Sequence[_Row]) -> UnreadAttention:
    by_head = torch.stack([row.unread for row in rows]).double().mean(0)
    layer, head = divmod(int(by_head.argmax()), by_head.shape[1])
    return UnreadAttention(
        rows=len(rows),
        keys=float(np.mean([row.keys for row in rows])),
        keys_read=float(np.mean([row.keys_read for row in rows])),
        unread=float(by_head.mean()),
        worst_layer=layer,
        worst_head=head,
        worst_unread=float(by_head[layer, head]),
    )
