"""`RunAhead`: begins the next step before the host knows the tokens of this one.

While every sequence decodes alone on its leaf, everything about the next step except its tokens is known. The device
begins it with tokens that the host has not read yet, while the host updates its state. The scheduler still makes the
real batch from the tokens once it has them. The result is used only if every row of the real batch was predicted with
the same node, token, position and slot. Otherwise the step is run normally. The KV that the discarded step wrote is in
reserved slots, which are written again before anything reads them.
"""

import logging
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from radixgen.kernels.upload import upload
from radixgen.model.base import Logits, Model, SupportsKeyScores, SupportsRunAhead
from radixgen.sampling.sampler import PendingTokens
from radixgen.scheduler.batch import Batch, StepInput
from radixgen.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class StepLogits(NamedTuple):
    """The logits of a step, and the rows that each kind of reader uses."""

    values: Logits
    """`[n, vocab]`"""
    drawing: list[int]
    """Row of the logits for each of `Batch.drawing`."""
    branching: list[int]
    """The same for `Batch.branching`."""
    scoring: list[int]
    """The same for the rows of `Batch.scoring`, concatenated."""
    keys: Seq[NDArray[np.float32]] = ()
    """Scores of keys for each of `Batch.pressing`."""

    @property
    def whole(self) -> Tensor:
        """`values` on one device."""
        return self.values if isinstance(self.values, Tensor) else self.values.gather()


def run_step(model: Model, step: StepInput) -> StepLogits:
    """Run a step, and score keys if prompts are to be pressed after it."""
    inputs, keys = (step.plan, step.token_ids, step.slots, step.logit_rows), list[NDArray[np.float32]]()
    if step.pressing:
        assert isinstance(model, SupportsKeyScores)
        logits, keys = model.run_scored(*inputs, step.pressing)
    else:
        logits = model.run(*inputs)
    return StepLogits(logits, step.drawing, step.branching, step.scoring, keys)


class _PendingStep(NamedTuple):
    """A step that was begun before its tokens were known."""

    logits: Logits
    """One row per row of the batch, in its order"""
    batch: Batch
    draws: PendingTokens
    order: list[int]
    """For each row of the batch, the index of its token in `draws`"""


class RunAhead:
    """Begins steps ahead if `model` supports it, and returns their results."""

    def __init__(self, model: Model, scheduler: Scheduler, *, enabled: bool = True) -> None:
        self.wasted_rows = 0
        self._model = model if enabled and isinstance(model, SupportsRunAhead) else None
        self._scheduler = scheduler
        self._step: _PendingStep | None = None

    @property
    def pending(self) -> int:
        """Number of rows in the step begun ahead, which new requests cannot join; 0 if there is none."""
        return self._step.batch.num_rows if self._step else 0

    def begin(self, batch: Batch, draws: PendingTokens) -> None:
        """Begin the step after `batch` with the tokens in `draws`, if the scheduler can predict its rows."""
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
        """Return the precomputed logits if `batch` matches the prediction, else None."""
        step, self._step = self._step, None
        if step is None:
            return None
        rows = _rows_of(step, batch)
        self.wasted_rows += step.batch.num_rows - (0 if rows is None else batch.num_rows)
        if rows is None:
            return None
        return StepLogits(step.logits, [rows[row] for row in batch.drawing_rows], [], [])

    def drop(self) -> None:
        """Discard the step begun ahead, if any."""
        self.wasted_rows += self.pending
        self._step = None


def _indices(sequences: Seq[object], among: Seq[object]) -> list[int]:
    """Return the index in `among` of each of `sequences`."""
    if sequences == among:
        return list(range(len(among)))
    index_of = {sequence: index for index, sequence in enumerate(among)}
    return [index_of[sequence] for sequence in sequences]


def _in_order(tokens: Tensor, order: list[int]) -> Tensor:
    """Return `tokens[order]`, with 0 in place of missing tokens."""
    if order != list(range(tokens.numel())):
        tokens = tokens.index_select(0, upload(np.array(order), tokens.device))
    return tokens.clamp(min=0)


def _rows_of(step: _PendingStep, batch: Batch) -> Seq[int] | None:
    """Return the row of `step` that matches each row of `batch`, or None if a row has no match."""
    if batch.scoring or batch.branching or batch.pressing or len(batch.last_row) != batch.num_rows:
        return None
    drawn, expected = step.draws.wait(), step.batch
    tokens = [drawn[index] for index in step.order]
    nodes = list(batch.last_row)
    if nodes == expected.nodes:
        rows: Seq[int] = range(batch.num_rows)
    else:
        row_of = {node: row for row, node in enumerate(expected.nodes)}
        rows = [row_of.get(node, -1) for node in nodes]
    actual = zip(batch.row_positions, batch.row_slots, batch.row_marks, batch.row_tokens, strict=True)
    predicted = list(zip(expected.row_positions, expected.row_slots, expected.row_marks, tokens, strict=True))
    same = all(row >= 0 and values == predicted[row] for row, values in zip(rows, actual, strict=True))
    return rows if same else None
