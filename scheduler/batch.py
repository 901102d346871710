"""The batch of one step: its rows, the sequences that need logits, and their conversion to arrays."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import KVMoves, Node, token_ids
from radixgen.core import Plan
from radixgen.core.plan import ScoredPrompt
from radixgen.core.reading import Press
from radixgen.scheduler.run_reuse import TakenRuns
from radixgen.scheduler.sequence import Request, Sequence


class PromptRows(NamedTuple):
    """Rows of a batch that score the next tokens of a request's prompt."""

    request: Request
    rows: list[int]


class PressingRows(NamedTuple):
    """Rows of a batch that score the keys of a sequence's prompt, after which the prompt is pressed."""

    sequence: Sequence
    policy: Press
    rows: list[int]
    """The last rows of the prompt."""
    slots: NDArray[np.int64]
    """`[tokens]`: slots of the prompt."""


@dataclass(slots=True)
class Batch:
    """The spans of one step, and the sequences that need logits. `Scheduler.freeze` turns it into arrays and a plan."""

    step: int
    """The pool's number of the step: slots released while it is in flight stay fenced until it retires."""
    all_admitted: bool = True
    """Whether every waiting request with room was admitted."""
    nodes: list[Node] = field(default_factory=list)
    """Nodes with a span in this step."""
    row_nodes: list[int] = field(default_factory=list)
    """`[rows]`: node ids."""
    row_positions: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    row_slots: list[int] = field(default_factory=list)
    row_marks: list[int] = field(default_factory=list)
    """Mark of the policy by which each row reads."""
    read_slots: dict[int, int] = field(default_factory=dict)
    """Slots, by row, of the KV that rows reading cached tokens read."""
    last_row: dict[Node, int] = field(default_factory=dict)
    """Row of a node's last token."""
    spans: dict[Node, tuple[int, int]] = field(default_factory=dict)
    """First row of a node's span, or of its last part after copied tokens, and its position."""
    read_rows: dict[tuple[Node, int], int] = field(default_factory=dict)
    """Rows that only read, by node and offset, except those of a node's last token."""
    drawing: list[Sequence] = field(default_factory=list)
    """Sequences that sample a token."""
    drawing_rows: list[int] = field(default_factory=list)
    """Row whose logits each of them uses. Sequences on one node share a row."""
    branching: list[Sequence] = field(default_factory=list)
    """Beams whose next tokens are selected together."""
    branching_rows: list[int] = field(default_factory=list)
    """Row whose logits each of them uses."""
    scoring: list[PromptRows] = field(default_factory=list)
    num_scored: int = 0
    """Rows that score prompts."""
    pressing: dict[str, PressingRows] = field(default_factory=dict)
    """By namespace, which has no other prompt."""
    prompt_tokens: int = 0
    """Rows scheduled for sequences without output."""
    moves: list[KVMoves] = field(default_factory=list)
    """KV that is copied before the step."""

    def add_span(self, request: Request, node: Node, first: int, slots: NDArray[np.int64]) -> None:
        """Compute the node's tokens from `first` on, one per slot, as the request reads them."""
        count = slots.size
        begin = node.start + first
        if not self.nodes or self.nodes[-1] is not node:
            self.nodes.append(node)
        self.spans[node] = len(self.row_nodes), begin
        self.row_nodes.extend([node.id] * count)
        self.row_positions.extend(range(begin, begin + count))
        self.row_tokens.extend(token_ids(node.tokens[first : first + count]).tolist())
        self.row_slots.extend(slots.tolist())
        self.row_marks.extend(request.marks_of(begin, begin + count))
        if first + count == node.known:
            self.last_row[node] = len(self.row_nodes) - 1

    def add_copies(self, runs: TakenRuns, first: int, slots: NDArray[np.int64]) -> None:
        """Copy the KV of the tokens from position `first` on, one per slot."""
        part = slice(first, first + slots.size)
        places = np.arange(first, first + slots.size)
        self.moves.append(KVMoves(runs.slots[part].copy(), slots, runs.positions[part], places))

    @property
    def num_moved(self) -> int:
        """Number of tokens whose KV is copied."""
        return sum(moves.targets.size for moves in self.moves)

    def add_next(self, request: Request, node: Node, token: int, slot: int) -> None:
        """Compute the node's last token, the only one without KV."""
        self.nodes.append(node)
        self.last_row[node] = len(self.row_nodes)
        self._add_row(request, node, node.start + node.known - 1, token, slot)

    def add_read(self, request: Request, node: Node, offset: int) -> int:
        """Add a row for a token whose KV exists: it reads its path, gives logits and writes no KV. Returns the row."""
        self._add_row(request, node, node.start + offset, int(token_ids(node.tokens[offset : offset + 1])[0]), -1)
        row = len(self.row_nodes) - 1
        if offset == node.known - 1:
            self.last_row[node] = row
            if node.children:
                self.read_slots[row] = node.extents[-1].end - 1
        else:
            self.read_rows[node, offset] = row
        return row

    def row_of(self, node: Node, offset: int) -> int | None:
        """Return the row of the node's token at `offset`, which has a slot, or None if the step has none."""
        if offset == node.known - 1:
            return self.last_row.get(node)
        row, position = self.spans.get(node, (0, node.end))
        inside = node.start + offset - position
        return row + inside if inside >= 0 else self.read_rows.get((node, offset))

    def draw(self, sequence: Sequence, row: int) -> None:
        """Let a sequence use the logits of `row`."""
        if sequence.request.search is not None:
            self.branching.append(sequence)
            self.branching_rows.append(row)
        else:
            self.drawing.append(sequence)
            self.drawing_rows.append(row)

    @property
    def num_rows(self) -> int:
        return len(self.row_nodes)

    def _add_row(self, request: Request, node: Node, position: int, token: int, slot: int) -> None:
        self.row_nodes.append(node.id)
        self.row_positions.append(position)
        self.row_tokens.append(token)
        self.row_slots.append(slot)
        self.row_marks.append(request.mark if request.mark and position >= request.first_read else 0)


@dataclass(frozen=True, slots=True)
class StepInput:
    """A batch as arrays, with rows in the plan's order."""

    plan: Plan
    token_ids: NDArray[np.int64]
    """`[rows]`"""
    slots: NDArray[np.int64]
    """`[rows]`, -1 if a row's KV exists already."""
    logit_rows: NDArray[np.int64]
    """`[n]`, each row once."""
    drawing: list[int]
    """For each of `Batch.drawing`, its row of the logits `[n, vocab]`."""
    branching: list[int]
    """The same for `Batch.branching`."""
    scoring: list[int]
    """The same for all rows of `Batch.scoring`, concatenated."""
    pressing: list[ScoredPrompt]
    """For each of `Batch.pressing`."""


def make_step_input(batch: Batch, plan: Plan) -> StepInput:
    """Convert a batch to arrays, with rows in the depth-first order of its plan."""
    order = plan.row_order
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    scoring = [row for part in batch.scoring for row in part.rows]
    wanted = batch.drawing_rows + batch.branching_rows + scoring
    rows, index = np.unique(np.array(wanted, np.int64), return_inverse=True)
    which = index.tolist()
    drawn, branched = len(batch.drawing), len(batch.drawing) + len(batch.branching)
    return StepInput(
        plan=plan,
        token_ids=np.array(batch.row_tokens, np.int64)[order],
        slots=np.array(batch.row_slots, np.int64)[order],
        logit_rows=place[rows],
        drawing=which[:drawn],
        branching=which[drawn:branched],
        scoring=which[branched:],
        pressing=[
            ScoredPrompt(place[part.rows], part.slots, part.policy.num_scored(part.slots.size), part.policy.kernel)
            for part in batch.pressing.values()
        ],
    )


def slots_used(batch: Batch) -> NDArray[np.int64]:
    """Return for each row the slot that it writes, or reads if it follows cached tokens, else -1, `[rows]`."""
    slots = np.array(batch.row_slots, np.int64)
    if batch.read_slots:
        slots[list(batch.read_slots)] = list(batch.read_slots.values())
    return slots
