"""Scheduler: admission, chunked prefill under a token budget, and preemption.

There are no separate prefill and decode modes. A sequence's span is what its path lacks, from the first token without a
slot to its cursor. If nothing is missing, the cursor's last token gives logits.
"""

from collections.abc import Sequence as Seq
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedKeyList

from radixgen.cache import HostTier, Node, RadixTree, TokenArray
from radixgen.cache.check import check_plan
from radixgen.core import Limits, SegmentReuse
from radixgen.core.reading import Press
from radixgen.scheduler.admission import Admission
from radixgen.scheduler.batch import Batch, PromptRows, StepInput, make_step_input, slots_used
from radixgen.scheduler.freeing import add_pressing_rows, awaits_press, free_unread, press
from radixgen.scheduler.paths import freed_slots, holds_alone, scheduled_end
from radixgen.scheduler.pins import Pins
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.queue import WaitingQueue
from radixgen.scheduler.reserves import FIRST_RESERVE, Reserves
from radixgen.scheduler.run_reuse import RunTaker
from radixgen.scheduler.sequence import Request, Sequence

_MAX_SCORED = 512
"""Maximum rows per step that score prompts, so that the logits of a long prompt fit in memory."""


class Scheduler:
    """Owns the waiting and running sequences, and moves their cursors."""

    def __init__(
        self,
        tree: RadixTree,
        planner: Planner,
        *,
        max_step_tokens: int,
        limits: Limits,
        host: HostTier | None = None,
        reuse: SegmentReuse | None = None,
        debug: bool = False,
    ) -> None:
        self.tree = tree
        self.host = host
        self.planner = planner
        self.max_step_tokens = max_step_tokens
        self.max_num_seqs = limits.max_num_seqs
        self.waiting = WaitingQueue(limits.max_overtaken)
        self.running: SortedKeyList[Sequence] = SortedKeyList(key=attrgetter("rank"))
        self.pins = Pins(tree)
        runs = RunTaker(tree, reuse) if reuse else None
        self.admission = Admission(tree, self.waiting, self.running, self.pins, host, limits.max_num_seqs, runs)
        self.takes_runs = runs is not None
        """Whether requests may take runs that are no prefix."""
        self._reserves = Reserves(tree, self.running, self.waiting)
        self._debug = debug
        self.now = 0.0
        """Time at which the current step began, in seconds on the engine's clock."""
        self._last_rows = 0
        self.preemptions = 0
        self.computed_prompt_tokens = 0
        self.moved_prompt_tokens = 0

    def add(self, request: Request) -> None:
        """Queue a request's sequences."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.waiting.add(sequence)

    def fork(self, origin: Sequence, sequence: Sequence) -> None:
        """Start `sequence`, a copy of `origin`, at the same position.

        It runs immediately if there is room for another sequence and `origin` runs in the same namespace; otherwise it
        is queued.
        """
        full = len(self.running) >= self.max_num_seqs
        if origin.cursor is None or full or origin.namespace != sequence.namespace:
            self.waiting.add(sequence)
            return
        sequence.cursor = self.tree.lock(origin.cursor.held)
        self.running.add(sequence)

    @property
    def path_tokens(self) -> int:
        """Total length of the paths of all cursors and pins, each counted separately, without tokens whose slots were
        freed.
        """
        ends: int = sum(sequence.cursor.held.end for sequence in self.running)
        freed = sum(freed_slots(sequence.cursor.held) for sequence in self.running if sequence.request.mark)
        return ends - freed + sum(pin.num_tokens for pin in self.pins)

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence that ended or was cancelled. Its tokens stay cached."""
        if sequence.cursor is not None:
            self._leave(sequence)
        elif sequence.choices is None:
            self.admission.withdraw(sequence)
        if sequence.namespace != sequence.request.namespace:
            self.tree.discard(sequence.namespace)

    def park(self, sequence: Sequence) -> None:
        """Release the cursor of a beam that has its choices until its siblings have theirs. Its tokens stay cached."""
        assert sequence.choices is not None
        self._leave(sequence)

    # -- one step -----------------------------------------------------------------------------------------

    def schedule(self, only: Request | None = None, *, admit: bool = True) -> Batch | None:
        """Return the next step, or None if nothing can run. Takes slots and sets new cursors.

        With `only`, just that request's sequences take part and nobody is admitted. Without `admit`, nobody is
        admitted.
        """
        pool = self.tree.pool
        if self.host is not None:
            self.host.poll(self.now, self._last_rows if self.running else 0)
        # Admission may split nodes, and a span must not be split: all cursors are set before any slot is
        # taken.
        batch = Batch(pool.num_steps + 1, all_admitted=only is None and admit and self.admission.admit(self.now))
        budget = self.max_step_tokens
        for sequence in self._in_schedule_order():
            if sequence.cursor is not None and only in (None, sequence.request):
                budget -= self._extend(sequence, budget, batch)
        self._last_rows = batch.num_rows
        if not batch.row_nodes:
            return None
        pool.begin_step()
        return batch

    def schedule_ahead(self, batch: Batch) -> Batch | None:
        """Return the step after `batch`, with 0 for the tokens, which are not known yet.

        Every sequence that has not reached `max_tokens` advances by one token: in its own leaf, if a slot is reserved,
        or along cached tokens. Returns None if other sequences may join, if a token may begin a new node, or if memory
        is short.
        """
        if batch.scoring or batch.branching or len(batch.drawing) != len(self.running):
            return None
        going = [s for s in self.running if len(s.output) + 1 < s.request.max_output]
        if len(self.waiting) and (not batch.all_admitted or len(going) < len(self.running)):
            return None
        nodes = [s.cursor.held for s in going]
        if any(node.lock_count != 1 or node.parent is None for node in nodes):
            return None  # the token may begin a new node
        if not nodes or not self._reserve_ahead(going, nodes, batch.step + 1):
            return None
        slots = [-1 if node.children else node.next_slot for node in nodes]
        if any(slot < 0 and not node.children for node, slot in zip(nodes, slots, strict=True)):
            return None  # cached tokens that it would have read were evicted
        reading = {row: node.extents[-1].end for row, node in enumerate(nodes) if node.children}
        if not all(self._reads_on(nodes[row], slot) for row, slot in reading.items()):
            return None
        return Batch(
            step=batch.step + 1,
            nodes=nodes,
            row_nodes=[node.id for node in nodes],
            row_positions=[node.end for node in nodes],
            row_tokens=[0] * len(nodes),
            row_slots=slots,
            read_slots=reading,
            drawing=going,
            row_marks=[s.request.mark for s in going],
            drawing_rows=list(range(len(nodes))),
        )

    def freeze(self, batch: Batch) -> StepInput:
        """Plan the batch and put its rows in depth-first order."""
        plan = self.planner.plan(
            np.array(batch.row_nodes, np.int32),
            np.array(batch.row_positions, np.int32),
            slots_used(batch),
            np.array(batch.row_marks, np.int32),
        )
        if self._debug:
            check_plan(plan, self.tree.pool)
        return make_step_input(batch, plan)

    def requests_of(self, batch: Batch) -> list[Request]:
        """Return the requests that take part in a step."""
        return list(dict.fromkeys(s.request for s in self.running if s.scheduled_in == batch.step))

    def commit(self, batch: Batch, key_scores: Seq[NDArray[np.float32]] = ()) -> None:
        """Mark what the step scheduled as computed. `key_scores`: scores of keys for each of `Batch.pressing`."""
        commit = self.tree.commit
        for node in batch.nodes:
            commit(node)
        self.computed_prompt_tokens += batch.prompt_tokens
        self.moved_prompt_tokens += batch.num_moved
        if self.takes_runs:
            for sequence in (*batch.drawing, *batch.branching):
                self._release_runs(sequence)
        self.tree.pool.retire_step(batch.step)
        for sequence in self.running:
            if sequence.request.reading.frees:
                free_unread(self.tree, sequence)
        for part, scores in zip(batch.pressing.values(), key_scores, strict=True):
            press(self.tree, part, scores)

    def rollback(self, batch: Batch) -> None:
        """Undo the scheduling of a failed step."""
        for node in reversed(batch.nodes):
            self.tree.rollback(node)
        self.planner.forget()
        self.tree.pool.retire_step(batch.step)

    def advance(self, drawn: Seq[tuple[Sequence, int]]) -> None:
        """Move cursors by the last tokens of the outputs. Sequences on one node with the same token stay together."""
        groups: dict[tuple[Node, int], list[Sequence]] = {}
        for sequence, token in drawn:
            assert sequence.cursor is not None
            node, token = sequence.cursor.held, sequence.request.in_tree(token, len(sequence.output) - 1)
            if node.lock_count == 1:
                self.tree.advance((sequence.cursor,), token)
            else:
                groups.setdefault((node, token), []).append(sequence)
        for (_, token), members in groups.items():
            self.tree.advance([m.cursor for m in members if m.cursor is not None], token)

    # -- spans --------------------------------------------------------------------------------------------

    def _in_schedule_order(self) -> list[Sequence]:
        """Return running sequences in decode, then those in prefill, each by rank."""
        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            node = sequence.cursor.node
            ready = node.known - node.scheduled <= 1 and (node.parent is None or node.parent.complete)
            (decoding if ready else prefilling).append(sequence)
        return decoding + prefilling

    def _extend(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        """Schedule what the sequence's path lacks, up to `budget` rows, and its draw. Returns the rows added.

        Without budget it still uses the logits of a row that another sequence scheduled.
        """
        assert sequence.cursor is not None
        node = sequence.cursor.held
        taken = 0
        to_press = awaits_press(sequence)
        if sequence.scores_prompt:
            before = max(sequence.request.next_scored - scheduled_end(node), 0)
            taken = self._schedule_path(sequence, node, min(budget, before + _MAX_SCORED - batch.num_scored), batch)
            added, finished = self._score_prompt(sequence, node, budget - taken, batch)
            taken += added
            if not finished or not sequence.request.max_output or to_press:
                return taken
        elif to_press:
            return self._extend_to_press(sequence, node, budget, batch)
        elif node not in batch.last_row and node.scheduled < node.known:
            if budget and self._schedule_next(sequence, node, batch):
                taken = 1
            else:
                taken = self._schedule_path(sequence, node, budget, batch)
        if node.scheduled < node.known:
            return taken
        row = batch.last_row.get(node)
        if row is None:
            if taken == budget:
                return taken
            row = batch.add_read(sequence.request, node, node.known - 1)
            taken += 1
        sequence.scheduled_in = batch.step
        batch.draw(sequence, row)
        return taken

    def _extend_to_press(self, sequence: Sequence, node: Node, budget: int, batch: Batch) -> int:
        """Schedule what a prompt lacks that is to be pressed, then the rows that score its keys. Returns the rows
        added. What follows the prompt is scheduled in later steps.
        """
        request = sequence.request
        taken = self._schedule_path(sequence, node, budget, batch)
        if request.scoring or scheduled_end(node) < request.prompt.size or sequence.namespace in batch.pressing:
            return taken
        assert isinstance(request.reading, Press)
        return taken + add_pressing_rows(sequence, request.reading, budget - taken, batch)

    def _schedule_next(self, sequence: Sequence, node: Node, batch: Batch) -> bool:
        """Schedule the last token of a leaf from its reserve, the common case. Returns False otherwise."""
        parent = node.parent
        if not sequence.output or node.known - node.scheduled != 1:
            return False
        if parent is not None and parent.scheduled < parent.known:
            return False
        slot = self.tree.schedule_next(node)
        if slot < 0:
            return False
        batch.add_next(sequence.request, node, sequence.output[-1], slot)
        return True

    def _schedule_path(self, sequence: Sequence, node: Node, budget: int, batch: Batch) -> int:
        """Schedule what the path to `node` lacks, from the top. Returns the rows added."""
        before = batch.num_rows
        for part in node.unscheduled_path():
            left = budget - (batch.num_rows - before)
            count = _span(sequence, part, left) if left else 0
            if count == 0 or not self._make_room(part, count, sequence, batch):
                break
            slots = self.tree.schedule(part, count, self._reserve(part, count, sequence, batch))
            _add_tokens(sequence, part, slots, batch)
            sequence.scheduled_in = batch.step
            if part.scheduled < part.known:
                break
        taken = batch.num_rows - before
        if not sequence.output:
            batch.prompt_tokens += taken
        return taken

    def _score_prompt(self, sequence: Sequence, node: Node, budget: int, batch: Batch) -> tuple[int, bool]:
        """Add rows that score the prompt, as far as its path has slots. Returns their number, and whether none are
        left.
        """
        request = sequence.request
        assert request.targets is not None
        position = request.next_scored
        stop = min(request.targets.size, position + _MAX_SCORED - batch.num_scored)
        rows: list[int] = []
        added = 0
        for part in node.path():
            while part.start <= position < min(stop, part.start + part.scheduled):
                row = batch.row_of(part, position - part.start)
                if row is None:
                    if added == budget:
                        break
                    row = batch.add_read(request, part, position - part.start)
                    added += 1
                rows.append(row)
                position += 1
        if rows:
            sequence.scheduled_in = batch.step
            batch.scoring.append(PromptRows(request, rows))
            batch.num_scored += len(rows)
        return added, position == request.targets.size

    def _reserve(self, node: Node, count: int, sequence: Sequence, batch: Batch) -> int:
        """Return the slots to reserve after a span: for the rest of the node's prompt, or for a leaf to grow."""
        ahead = node.known - node.scheduled - count
        left = sequence.request.max_output - len(sequence.output)
        reserves = self._reserves
        return min(reserves.share, ahead) if ahead else min(reserves.of_leaf(node, batch.step), left)

    def _reads_on(self, node: Node, slot: int) -> bool:
        """Return whether a sequence on `node` may find its next token cached in this slot, with no other reader there.

        Once a sequence has sampled a token of a cached child, it is expected to sample the next one too.
        """
        if node.locked_children or not self.tree.columns.following[node.id]:
            return False
        return node.next_cached_slot == slot

    def _reserve_ahead(self, sequences: Seq[Sequence], leaves: Seq[Node], step: int) -> bool:
        """Reserve slots for leaves without one for the token of `step`. Returns False if others may need them, which is
        decided once tokens are known.
        """
        full = [at for at, node in enumerate(leaves) if node.capacity == node.scheduled and not node.children]
        if not full:
            return True
        tree, reserves = self.tree, self._reserves
        if len(self.waiting) or reserves.share < FIRST_RESERVE:
            return False
        lacking, counts = [leaves[at] for at in full], []
        for at in full:
            left = sequences[at].request.max_output - len(sequences[at].output)
            counts.append(min(reserves.of_leaf(leaves[at], step) + 1, left - 1))
        tree.evict(sum(counts) - tree.pool.free)
        tree.reserve(lacking, counts)
        return True

    # -- memory -------------------------------------------------------------------------------------------

    def _make_room(self, node: Node, count: int, sequence: Sequence, batch: Batch) -> bool:
        """Make slots available for `count` tokens of `node`.

        First by eviction, including room for a reserve, because otherwise a full pool would be handed out slot by slot;
        then from the reserves of others, from pins, and by preemption. Pins that would free nothing are kept as long as
        a sequence can be preempted or nothing helps.
        """
        tree = self.tree
        if tree.slots_wanted(node, count) <= tree.pool.free:
            return True
        tree.evict(tree.slots_wanted(node, count) + self._reserve(node, count, sequence, batch) - tree.pool.free)
        short = tree.slots_wanted(node, count) - tree.pool.free
        if short > 0:
            tree.reclaim_reserves(short)
        while (short := tree.slots_wanted(node, count) - tree.pool.free) > 0:
            if tree.evict(short) or self._complete_copies() or self._release_idle_runs(sequence, batch):
                continue
            idle, from_pins = self._idle(sequence, batch), self.pins.freed_by_release()
            victim = None if from_pins else self._victim(sequence, idle)
            if victim is not None:
                self._preempt(victim)
            elif not from_pins or (not idle and from_pins < short) or not self.pins.release_weakest():
                return False
        return True

    def _complete_copies(self) -> bool:
        """Unlock paths that only copies from or to the host have locked. Returns False if there are none."""
        return self.host is not None and (self.host.saves.complete() or self.host.fetches.release_arrived())

    def _release_runs(self, sequence: Sequence) -> bool:
        """Unlock the runs that a sequence takes; what it has not copied yet, it computes. Returns False if none."""
        runs, sequence.runs = sequence.runs, None
        if runs is not None:
            runs.release(self.tree)
        return runs is not None

    def _release_idle_runs(self, sequence: Sequence, batch: Batch) -> bool:
        """Unlock the runs of all other sequences without a part in this step. Returns False if there are none."""
        if not self.takes_runs:
            return False
        others = [other for other in self.running if other is not sequence and other.scheduled_in != batch.step]
        return sum(self._release_runs(other) for other in others) > 0

    def _idle(self, sequence: Sequence, batch: Batch) -> list[Sequence]:
        """Return the other sequences without a part in this step, youngest first, without the oldest of all."""
        return [
            candidate
            for candidate in self.running.islice(1, reverse=True)
            if candidate is not sequence and candidate.scheduled_in != batch.step
        ]

    def _victim(self, sequence: Sequence, idle: Seq[Sequence]) -> Sequence | None:
        """Return the first of `idle` that holds slots exclusively.

        If all slots are shared, the oldest running sequence may preempt the first, so that the holders go one by one.
        """
        victim = next((candidate for candidate in idle if holds_alone(candidate.cursor)), None)
        if victim is None and idle and sequence is self.running[0]:
            return idle[0]
        return victim

    def _preempt(self, sequence: Sequence) -> None:
        """Return a sequence to the queue with its tokens. What it computed stays cached until it is evicted,
        unless its reading policy frees slots.
        """
        self._leave(sequence)
        self.waiting.add(sequence)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.cursor is not None
        self.running.remove(sequence)
        self._release_runs(sequence)
        node, request = sequence.cursor.held, sequence.request
        self.tree.unlock(sequence.cursor, idle=request.search is None)
        sequence.cursor = None
        if request.search is not None and self.tree.on_idle is not None:
            while node.start >= request.prompt.size and node.parent is not None:
                node = node.parent  # most beams will not be continued
            self.tree.on_idle(node)
        sequence.pressed = False
        if request.reading.frees:
            self.tree.discard(sequence.namespace)
            sequence.freed_block = -1

    def keep(self, tokens: TokenArray, namespace: str) -> None:
        """Use what is cached of `tokens` as if a sequence had ended there."""
        match = self.tree.match_prefix(tokens, namespace)
        if match is not None and match.computed:
            self.tree.unlock(self.tree.insert(tokens[: match.computed], namespace))


def _span(sequence: Sequence, node: Node, rows: int) -> int:
    """Return how many of the node's next tokens `rows` rows suffice for; none after a prompt that is to be pressed."""
    if awaits_press(sequence):
        rows = min(rows, max(sequence.request.prompt.size - node.start - node.scheduled, 0))
    if sequence.runs is None:
        return min(rows, node.known - node.scheduled)
    return sequence.runs.span(node.start + node.scheduled, node.end, rows)


def _add_tokens(sequence: Sequence, node: Node, slots: NDArray[np.int64], batch: Batch) -> None:
    """Add the node's last scheduled tokens to a step, one per slot: those of runs as copies, all others as rows."""
    first = node.scheduled - slots.size
    if sequence.runs is None:
        batch.add_span(sequence.request, node, first, slots)
        return
    start = node.start + first
    for begin, end, copied in sequence.runs.pieces(start, start + slots.size):
        part = slots[begin - start : end - start]
        if copied:
            batch.add_copies(sequence.runs, begin, part)
        else:
            batch.add_span(sequence.request, node, begin - node.start, part)
