"""The next step, begun before the tokens of this one are known.

While every sequence decodes alone on its leaf, all of the next step but its tokens is known: the device can begin it
with tokens that only it knows, and the host plans and keeps its books meanwhile. Nothing is decided early: the
scheduler makes the next batch from the tokens when it has them, and what was computed is used where the batch holds no
row that was not expected, in node, token, position and slot. Otherwise the step is run as if nothing had been begun;
what that wrote lies in slots that the leaves hold in reserve, and whoever gets them later writes them first.
"""

import logging
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from torch import Tensor

from radixgen.kernels.upload import upload
from radixgen.model.base import Model, SupportsRunAhead
from radixgen.sampling.sampler import PendingTokens
from radixgen.scheduler.batch import Batch
from radixgen.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class StepLogits(NamedTuple):
    """The logits of a step and who reads them."""

    values: Tensor
    """`[n, vocab]` float32"""
    drawing: list[int]
    """The row of the logits for each of `Batch.drawing`."""
    branching: list[int]
    """The same for `Batch.branching`."""
    reading: list[int]
    """The same for all rows of `Batch.reads`, one after the other."""


class _PendingStep(NamedTuple):
    """A step that was begun ahead of its tokens."""

    logits: Tensor
    """One row for each of the batch's, in its order"""
    batch: Batch
    draws: PendingTokens
    order: list[int]
    """For each row of the batch, which of the draws gave its token"""


class RunAhead:
    """Begins steps of `model`, where it can, and hands out their results."""

    def __init__(self, model: Model, scheduler: Scheduler, *, enabled: bool = True) -> None:
        self.wasted_rows = 0
        self._model = model if enabled and isinstance(model, SupportsRunAhead) else None
        self._scheduler = scheduler
        self._step: _PendingStep | None = None

    @property
    def pending(self) -> int:
        """Rows of the step that is under way, in which nobody new can take part; 0 where none is."""
        return self._step.batch.num_rows if self._step else 0

    def begin(self, batch: Batch, draws: PendingTokens) -> None:
        """Begin the step after `batch` with the tokens in `draws`, if the scheduler can tell who takes part in it."""
        if self._model is None or not self._model.runs_ahead:
            return
        if any(sequence.request.params.logprobs is not None for sequence in batch.drawing):
            return
        expected = self._scheduler.schedule_ahead(batch)
        if expected is None:
            return
        step = self._scheduler.freeze(expected)
        order = _indices(expected.drawing, batch.drawing)
        try:
            tokens = _in_order(draws.tokens, order)
            logits = self._model.run_ahead(step.plan, tokens, step.slots, step.logit_rows)
        except AssertionError:
            raise
        except Exception:
            logger.exception("a step could not be begun ahead of its tokens")
            return
        if logits is not None:
            self._step = _PendingStep(logits, expected, draws, order)

    def claim(self, batch: Batch) -> StepLogits | None:
        """The results for `batch`, if it was begun as it turned out to be."""
        step, self._step = self._step, None
        if step is None:
            return None
        rows = _rows_of(step, batch)
        self.wasted_rows += step.batch.num_rows - (0 if rows is None else batch.num_rows)
        if rows is None:
            return None
        return StepLogits(step.logits, [rows[row] for row in batch.drawing_rows], [], [])

    def drop(self) -> None:
        """Nobody will claim what was begun."""
        self.wasted_rows += self.pending
        self._step = None


def _indices(sequences: Seq[object], among: Seq[object]) -> list[int]:
    """The index in `among` of each of `sequences`."""
    if sequences == among:
        return list(range(len(among)))
    index_of = {sequence: index for index, sequence in enumerate(among)}
    return [index_of[sequence] for sequence in sequences]


def _in_order(tokens: Tensor, order: list[int]) -> Tensor:
    """The tokens that `order` names, 0 where none was drawn."""
    if order != list(range(tokens.numel())):
        tokens = tokens.index_select(0, upload(np.array(order), tokens.device))
    return tokens.clamp(min=0)


def _rows_of(step: _PendingStep, batch: Batch) -> Seq[int] | None:
    """The row of `step` that each row of `batch` is; None where one is none of them."""
    if batch.reads or batch.branching or len(batch.last_row) != batch.num_rows:
        return None
    drawn, expected = step.draws.wait(), step.batch
    tokens = [drawn[index] for index in step.order]
    nodes = list(batch.last_row)
    if nodes == expected.nodes:
        rows: Seq[int] = range(batch.num_rows)
    else:
        row_of = {node: row for row, node in enumerate(expected.nodes)}
        rows = [row_of.get(node, -1) for node in nodes]
    actual = zip(batch.row_positions, batch.row_slots, batch.row_tokens, strict=True)
    same = all(
        row >= 0 and values == (expected.row_positions[row], expected.row_slots[row], tokens[row])
        for row, values in zip(rows, actual, strict=True)
    )
    return rows if same else None
