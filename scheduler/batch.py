"""Which spans run in a step: admission, chunked prefill under a token budget, preemption.

There is no prefill mode and no decode mode. A sequence's span is whatever its path still lacks, from the
first token without a slot to its cursor; when nothing is lacking any more, its cursor's last token gives
logits.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedKeyList

from radixgen.cache import ExtentPool, Node, RadixTree
from radixgen.core import Plan
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.sequence import Request, Sequence

_FIRST_RESERVE = 16
_LARGEST_RESERVE = 256


@dataclass(slots=True)
class Batch:
    """One step: its spans, and the sequences that read logits. `freeze` turns it into arrays and a plan."""

    step: int
    fence: int = 0
    """Slots released while the step is in flight wait behind this fence of the pool."""
    nodes: list[Node] = field(default_factory=list)
    """Nodes with a span in this step."""
    readers: dict[Node, list[Sequence]] = field(default_factory=dict)
    """The sequences whose cursor stands at a node's end, for every node that gives logits."""
    row_ids: list[int] = field(default_factory=list)
    row_positions: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    row_slots: list[int] = field(default_factory=list)
    last_row: dict[Node, int] = field(default_factory=dict)
    """The row of a node's last token."""

    def add_span(self, node: Node, first: int, slots: NDArray[np.int64]) -> None:
        """Compute the node's tokens from `first` on, one for each slot."""
        count = slots.size
        begin = node.start + first
        self.nodes.append(node)
        self.row_ids.extend([node.id] * count)
        self.row_positions.extend(range(begin, begin + count))
        self.row_tokens.extend(node.tokens[first : first + count].tolist())
        self.row_slots.extend(slots.tolist())
        if first + count == node.known:
            self.last_row[node] = len(self.row_ids) - 1

    def add_read(self, node: Node) -> None:
        """One row for the node's last token, whose KV exists: it reads and writes nothing."""
        self.last_row[node] = len(self.row_ids)
        self.row_ids.append(node.id)
        self.row_positions.append(node.end - 1)
        self.row_tokens.append(int(node.tokens[-1]))
        self.row_slots.append(-1)

    @property
    def num_rows(self) -> int:
        return len(self.row_ids)


@dataclass(frozen=True, slots=True)
class StepInput:
    """A batch as arrays, rows in the plan's order."""

    plan: Plan
    token_ids: NDArray[np.int64]
    """`[rows]`"""
    slots: NDArray[np.int64]
    """`[rows]`, -1 where a row's KV exists already"""
    logit_rows: NDArray[np.int64]
    """`[readers]`, in the order of `Batch.readers`"""


class Scheduler:
    """Owns the waiting and the running sequences, and moves their cursors."""

    def __init__(
        self, tree: RadixTree, planner: Planner, *, max_step_tokens: int, max_num_seqs: int, debug: bool = False
    ) -> None:
        self.tree = tree
        self.planner = planner
        self.max_step_tokens = max_step_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: SortedKeyList[Sequence] = SortedKeyList(key=_rank)
        self.running: SortedKeyList[Sequence] = SortedKeyList(key=_rank)
        self.debug = debug
        self.preemptions = 0
        self._steps = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.computed_prompt_tokens = 0

    def add(self, request: Request) -> None:
        self.waiting.update(request.sequences)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out for good: it ended or was cancelled. Its tokens stay cached."""
        if sequence.cursor is None:
            self.waiting.discard(sequence)
        else:
            self.running.remove(sequence)
            self.tree.unlock(sequence.cursor)
            sequence.cursor = None
        if sequence.namespace != sequence.request.namespace:
            self.tree.discard(sequence.namespace)

    # -- one step -----------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None where nothing can run. Slots are taken and new cursors set."""
        self._steps += 1
        batch = Batch(self._steps)
        # Admission may split nodes, and a span must not be split: all cursors are set before any slot is
        # taken.
        self._admit()
        budget = self.max_step_tokens
        for sequence in self._by_turn():
            if sequence.cursor is not None:
                budget -= self._extend(sequence, budget, batch)
        if batch.num_rows == 0:
            return None
        batch.fence = self.tree.pool.begin_step()
        return batch

    def freeze(self, batch: Batch) -> StepInput:
        """Plan the batch and lay its rows out depth-first."""
        plan = self.planner.plan(np.array(batch.row_ids, np.int32), np.array(batch.row_positions, np.int32))
        if self.debug:
            _check_slots(plan, self.tree.pool)
        order = plan.row_order
        place = np.empty_like(order)
        place[order] = np.arange(order.size)
        return StepInput(
            plan=plan,
            token_ids=np.array(batch.row_tokens, np.int64)[order],
            slots=np.array(batch.row_slots, np.int64)[order],
            logit_rows=place[[batch.last_row[node] for node in batch.readers]],
        )

    def commit(self, batch: Batch) -> None:
        """The step has run: what it scheduled is computed."""
        for node in batch.nodes:
            self.tree.commit(node)
        self.tree.pool.retire_step(batch.fence)

    def rollback(self, batch: Batch) -> None:
        """The step failed: nothing of it was computed."""
        for node in reversed(batch.nodes):
            self.tree.rollback(node)
        self.tree.pool.retire_step(batch.fence)

    def advance(self, drawn: Seq[tuple[Sequence, int]]) -> None:
        """Move cursors by the tokens drawn for them; sequences on one node that drew alike stay together."""
        groups: dict[tuple[Node, int], list[Sequence]] = {}
        for sequence, token in drawn:
            assert sequence.cursor is not None
            groups.setdefault((sequence.cursor.held, token), []).append(sequence)
        for (_, token), members in groups.items():
            self.tree.advance([m.cursor for m in members if m.cursor is not None], token)

    # -- inside -------------------------------------------------------------------------------------------

    def _by_turn(self) -> Iterable[Sequence]:
        """Running sequences that decode, then those that prefill; each by rank."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            node = sequence.cursor.held
            lacking = node.known - node.scheduled
            ready = lacking <= 1 and (node.parent is None or node.parent.complete)
            (decoding if ready else prefilling).append(sequence)
        return decoding + prefilling

    def _extend(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule what the sequence's path lacks, up to `budget` rows. Returns the rows taken.

        Without budget it still reads the logits of a row that another sequence has scheduled.
        """
        assert sequence.cursor is not None
        node = sequence.cursor.held
        left = budget
        for part in _lacking(node):
            count = min(left, part.known - part.scheduled)
            if count == 0 or not self._make_room(part, count, sequence, batch):
                return budget - left
            first = part.scheduled
            batch.add_span(part, first, self.tree.schedule(part, count, self._reserve(part, count)))
            sequence.scheduled_in = batch.step
            self.computed_prompt_tokens += 0 if sequence.output else count
            left -= count
            if part.scheduled < part.known:
                return budget - left
        if node not in batch.last_row:
            if left == 0:
                return budget
            batch.add_read(node)
            left -= 1
        sequence.scheduled_in = batch.step
        batch.readers.setdefault(node, []).append(sequence)
        return budget - left

    def _reserve(self, node: Node, count: int) -> int:
        """Slots to keep behind a span: the rest of the node's prompt, or room for a leaf to grow; a fair
        share.
        """
        share = self.tree.pool.free // max(len(self.running), 1)
        ahead = node.known - node.scheduled - count
        growth = min(max(_FIRST_RESERVE, node.known), _LARGEST_RESERVE)
        return min(share, ahead if ahead else growth)

    def _admit(self) -> None:
        """Let waiting sequences in, in order, while the whole of what they lack fits without preempting."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return
        tree = self.tree
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            tokens = sequence.tokens()
            match = tree.match_prefix(tokens, sequence.namespace)
            cursor = tree.insert(tokens, sequence.namespace, priority=sequence.request.priority)
            room = tree.pool.free + tree.evictable_tokens + tree.reserved_tokens
            if self.running and tree.unscheduled_tokens + len(self.running) > room:
                tree.unlock(cursor)
                return
            del self.waiting[0]
            sequence.cursor = cursor
            self.running.add(sequence)
            self._note_admission(sequence.request, match.computed if match else 0)

    def _note_admission(self, request: Request, cached: int) -> None:
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(cached, request.prompt.size)
            self.prompt_tokens += request.prompt.size
            self.cached_prompt_tokens += request.num_cached_tokens

    def _make_room(self, node: Node, count: int, sequence: Sequence, batch: Batch) -> bool:
        """Have the slots free for `count` tokens of `node`: reserves first, then the cache, then
        preemption.
        """
        tree = self.tree
        if tree.slots_wanted(node, count) <= tree.pool.free:
            return True
        tree.reclaim_reserves()
        while (short := tree.slots_wanted(node, count) - tree.pool.free) > 0:
            if tree.evict(short):
                continue
            victim = self._victim(sequence, batch)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _victim(self, sequence: Sequence, batch: Batch) -> Sequence | None:
        """The youngest sequence with slots of its own, outside this step; never the oldest of all."""
        younger: list[Sequence] = self.running[1:]
        for candidate in reversed(younger):
            busy = candidate is sequence or candidate.scheduled_in == batch.step
            if not busy and _exclusive_slots(candidate):
                return candidate
        return None

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue with its tokens kept; what it computed stays cached until it is evicted."""
        assert sequence.cursor is not None
        self.running.remove(sequence)
        self.tree.unlock(sequence.cursor)
        sequence.cursor = None
        self.waiting.add(sequence)
        self.preemptions += 1


def _check_slots(plan: Plan, pool: ExtentPool) -> None:
    """Assert that no segment of the plan names a free or fenced slot (I9)."""
    taken = np.ones(pool.capacity, np.bool_)
    for extent in (*pool.free_extents(), *pool.fenced_extents()):
        taken[extent.start : extent.end] = False
    for start, length in zip(plan.segment_starts.tolist(), plan.segment_lengths.tolist(), strict=True):
        assert taken[start : start + length].all(), f"a plan reads free slots in [{start}, {start + length})"


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _lacking(node: Node) -> list[Node]:
    """The nodes of the path, from the top, that have tokens without a slot."""
    found = []
    above: Node | None = node
    while above is not None and above.scheduled < above.known:
        found.append(above)
        above = above.parent
    return found[::-1]


def _exclusive_slots(sequence: Sequence) -> int:
    """Slots that would be cached or free if this sequence let go of its cursor."""
    total = 0
    node = sequence.cursor.held if sequence.cursor else None
    while node is not None and node.lock_count + node.locked_children == 1:
        total += node.capacity
        node = node.parent
    return total
