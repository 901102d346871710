"""The next step, begun before the tokens of this one are known.

While every sequence decodes alone on its leaf, the next step's rows are this step's, each one token further: the device
can begin it with tokens that only it knows, and the host keeps its books meanwhile. Nothing is decided early: the
scheduler makes the next batch from the tokens when it has them, and what was computed is used where the batch holds no
row that was not foreseen, in node, token, position and slot. Otherwise the step is run as if nothing had been begun;
what that wrote lies in slots that the leaves hold in reserve, and whoever gets them later writes them first.
"""

import logging
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixgen.cache import Node
from radixgen.kernels.upload import upload
from radixgen.model.base import Model, RunsAhead
from radixgen.sampling import Draws
from radixgen.scheduler.batch import Batch, Scheduler

logger = logging.getLogger(__name__)


class Ran(NamedTuple):
    """The logits of a step and who reads them."""

    logits: Tensor
    """`[n, vocab]` float32"""
    drawing: list[int]
    """The row of the logits for each of `Batch.drawing`."""
    branching: list[int]
    """The same for `Batch.branching`."""
    reading: list[int]
    """The same for all rows of `Batch.reads`, one after the other."""


class _Foreseen(NamedTuple):
    position: int
    slot: int
    draw: int
    """Which of the draws gave its token"""
    logits_row: int


class _Begun(NamedTuple):
    logits: Tensor
    draws: Draws
    rows: dict[Node, _Foreseen]


class RunAhead:
    """Begins steps of `model`, where it can, and hands out their results."""

    def __init__(self, model: Model, scheduler: Scheduler, *, enabled: bool = True) -> None:
        self.wasted_rows = 0
        self._model = model if enabled and isinstance(model, RunsAhead) else None
        self._scheduler = scheduler
        self._begun: _Begun | None = None
        self._resumable = True

    @property
    def pending(self) -> int:
        """Rows of the step that is under way, in which nobody new can take part; 0 where none is."""
        return len(self._begun.rows) if self._begun else 0

    def begin(self, batch: Batch, drawing: Seq[int], draws: Draws) -> None:
        """Begin the step after `batch`, whose draws read rows `drawing` of the logits, where nobody waits for whom
        there is room, each sequence draws from a row of its own, and every leaf has the next slot in reserve.
        """
        if self._model is None or not self._resumable or batch.reads:
            return
        if len(self._scheduler.waiting) and not batch.admitting:
            return
        if not batch.num_rows == len(batch.last_row) == len(batch.drawing) == len(self._scheduler.running):
            return
        if any(s.request.params.logprobs is not None for s in batch.drawing):
            return
        if any(node.next_slot != batch.row_slots[row] + 1 for node, row in batch.last_row.items()):
            return
        ordered = torch.empty_like(draws.tokens)
        ordered.index_copy_(0, upload(np.array(drawing), ordered.device), draws.tokens.clamp(min=0))
        try:
            logits = self._model.run_ahead(ordered)
        except AssertionError:
            raise
        except Exception:
            logger.exception("a step could not be begun ahead of its tokens")
            return
        if logits is not None:
            draw_of = {row: draw for draw, row in enumerate(batch.drawing_rows)}
            rows = {
                node: _Foreseen(
                    batch.row_positions[row] + 1, batch.row_slots[row] + 1, draw_of[row], drawing[draw_of[row]]
                )
                for node, row in batch.last_row.items()
            }
            self._begun = _Begun(logits, draws, rows)

    def claim(self, batch: Batch) -> Ran | None:
        """The results for `batch`, if it was begun as it turned out to be."""
        begun, self._begun, self._resumable = self._begun, None, True
        if begun is None:
            return None
        found = self._found(begun, batch)
        self.wasted_rows += len(begun.rows) - (batch.num_rows if found else 0)
        # Rows that are gone would be moved on with the others, into slots that are theirs no more.
        self._resumable = found is not None and batch.num_rows == len(begun.rows)
        return found

    def drop(self) -> None:
        """Nobody will claim what was begun."""
        self.wasted_rows += self.pending
        self._begun, self._resumable = None, True

    def _found(self, begun: _Begun, batch: Batch) -> Ran | None:
        if batch.reads or batch.branching or len(batch.last_row) != batch.num_rows:
            return None
        tokens, which = begun.draws.wait(), {}
        for node, row in batch.last_row.items():
            one = begun.rows.get(node)
            if one is None or (batch.row_positions[row], batch.row_slots[row]) != (one.position, one.slot):
                return None
            if batch.row_tokens[row] != tokens[one.draw]:
                return None
            which[row] = one.logits_row
        return Ran(begun.logits, [which[row] for row in batch.drawing_rows], [], [])
