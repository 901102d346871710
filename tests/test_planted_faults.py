"""It would have been seen: faults that real serving engines had, planted by name, are each caught by the machine."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from churn import EngineMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray
from sizes import size

import radixgen.cache.boundary as boundary_module
import radixgen.cache.host_fetches as host_fetches_module
import radixgen.cache.slots as slots_module
import radixgen.engine.batch_draws as draws_module
import radixgen.engine.make_request as make_request_module
import radixgen.scheduler.admission as admission_module
import radixgen.scheduler.forest as forest_module
import radixgen.scheduler.freeing as freeing_module
import radixgen.scheduler.planner as planner_module
import radixgen.scheduler.run_reuse as run_reuse_module
import radixgen.scheduler.scheduler as scheduler_module
from radixgen.cache import PRIVATE, DiskTier, Extent, ExtentPool, HostTier, Lock, Node, RadixTree, Run
from radixgen.cache.disk_tier import DiskChunk, DiskJob
from radixgen.cache.eviction import EvictionQueue
from radixgen.cache.host_fetches import HostFetches
from radixgen.core import EngineDead, Plan
from radixgen.core.reading import Press, ReadingPolicy
from radixgen.engine.core import EngineCore
from radixgen.engine.output_processor import OutputProcessor
from radixgen.engine.run_ahead import RunAhead
from radixgen.scheduler.admission import Admission
from radixgen.scheduler.batch import Batch
from radixgen.scheduler.planner import Planner
from radixgen.scheduler.queue import WaitingQueue
from radixgen.scheduler.reading_marks import PolicyMarks
from radixgen.scheduler.revise import RowUpdates, StepRows
from radixgen.scheduler.scheduler import Scheduler
from radixgen.scheduler.sequence import Request

PROFILE = settings(
    max_examples=120,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def after(patch: Patch, owner: type, name: str, spoil: Callable[..., Any]) -> None:
    """`spoil(result, self, *arguments)` runs after the method and may give another result."""
    plain = getattr(owner, name)

    def spoilt(self: Any, *arguments: Any, **options: Any) -> Any:
        result = plain(self, *arguments, **options)
        other = spoil(result, self, *arguments)
        return result if other is None else other

    patch.setattr(owner, name, spoilt)


def before(patch: Patch, owner: type, name: str, spoil: Callable[..., Any]) -> None:
    """`spoil(self, *arguments)` runs before the method."""
    plain = getattr(owner, name)

    def spoilt(self: Any, *arguments: Any, **options: Any) -> Any:
        spoil(self, *arguments)
        return plain(self, *arguments, **options)

    patch.setattr(owner, name, spoilt)


# -- the tree and its slots -------------------------------------------------------------------------------


def a_lock_is_skipped(patch: Patch) -> None:
    patch.setattr(RadixTree, "lock", lambda self, node: Lock(node))


def a_split_drops_a_reference(patch: Patch) -> None:
    after(patch, RadixTree, "split", lambda upper, *_: setattr(upper, "locked_children", 0))


def a_split_is_off_by_one_slot(patch: Patch) -> None:
    """A node's extents then hold less than it says: the planner reads them uncompiled, since compiled loops go on past
    the ends of arrays, and may crash the process.
    """
    split, read = slots_module.split_extents, getattr(forest_module._read, "py_func", forest_module._read)

    def read_or_raise(ids: NDArray[np.int64], *columns: Any) -> Any:
        try:
            return read(ids, *columns)
        except IndexError:
            place = columns[-1]
            place[ids] = -1
            raise

    for module in (boundary_module, slots_module):
        patch.setattr(module, "split_extents", lambda extents, count: split(extents, max(count - 1, 0)))
    patch.setattr(forest_module, "_read", read_or_raise)


def a_slot_is_freed_twice(patch: Patch) -> None:
    after(patch, ExtentPool, "release", lambda _, pool, extent: pool._coalesce(extent))


def a_slot_is_freed_while_its_step_is_in_flight(patch: Patch) -> None:
    def free(_: object, scheduler: Scheduler, batch: Batch) -> None:
        for node in batch.nodes[:1]:
            scheduler.tree.pool._coalesce(node.extents[-1])

    after(patch, Scheduler, "freeze", free)


def an_evicted_slot_is_not_given_back(patch: Patch) -> None:
    plain = ExtentPool.release
    patch.setattr(ExtentPool, "release", lambda pool, extent: plain(pool, extent._replace(length=extent.length - 1)))


def a_locked_leaf_stays_among_the_evictable(patch: Patch) -> None:
    plain = RadixTree._protect

    def protect(tree: RadixTree, node: Any) -> None:
        queued = node in tree.evictable
        plain(tree, node)
        if queued:
            tree.evictable.add(node)

    patch.setattr(RadixTree, "_protect", protect)


def a_matched_leaf_keeps_its_place_among_the_evictable(patch: Patch) -> None:
    patch.setattr(EvictionQueue, "refresh", lambda *_: None)


def a_branch_leaves_the_reserve_standing(patch: Patch) -> None:
    plain = RadixTree._add_leaf

    def add_leaf(tree: RadixTree, *arguments: Any) -> Any:
        tree._slots.cut = lambda *_: None
        try:
            return plain(tree, *arguments)
        finally:
            del tree._slots.cut

    patch.setattr(RadixTree, "_add_leaf", add_leaf)


def more_is_committed_than_was_scheduled(patch: Patch) -> None:
    after(patch, RadixTree, "commit", lambda _, tree, node: setattr(node, "computed", node.known))


def a_failed_step_is_not_rolled_back(patch: Patch) -> None:
    patch.setattr(RadixTree, "rollback", lambda tree, node: None)


def namespaces_share_a_root(patch: Patch) -> None:
    plain = RadixTree.insert
    patch.setattr(RadixTree, "insert", lambda tree, tokens, namespace="", **options: plain(tree, tokens, **options))


# -- the plan ---------------------------------------------------------------------------------------------


def a_stale_plan_is_carried_on(patch: Patch) -> None:
    def carry(self: Planner, rows: StepRows) -> Plan | None:
        last = self._last
        return last.advance() if last and last.growing.size and rows.nodes.size == last.num_rows else None

    patch.setattr(Planner, "_carry", carry)


def a_new_extent_is_missed(patch: Patch) -> None:
    """The slot after the one before is taken for the row's own."""
    plain = planner_module.row_updates

    def row_updates(*arguments: Any) -> RowUpdates | None:
        updates = plain(*arguments)
        return updates and updates._replace(slots=np.full_like(updates.slots, -1), num_extended=0)

    patch.setattr(planner_module, "row_updates", row_updates)


def a_read_row_writes(patch: Patch) -> None:
    """Into the slot of the token before it."""

    def write(_: object, batch: Batch, request: Request, node: Any, offset: int) -> None:
        batch.row_slots[-1] = int(node.slots(max(offset - 1, 0), offset + 1)[0])

    after(patch, Batch, "add_read", write)


# -- requests ---------------------------------------------------------------------------------------------


def a_cancelled_request_takes_a_shared_chunk_along(patch: Patch) -> None:
    def lose(scheduler: Scheduler, sequence: Any) -> None:
        node = sequence.cursor.held if sequence.cursor else None
        if node is not None and node.lock_count > 1 and node.scheduled:
            scheduler.tree._slots.cut(node, node.scheduled - 1)

    before(patch, Scheduler, "drop", lose)


def a_cancelled_request_goes_on(patch: Patch) -> None:
    patch.setattr(EngineCore, "abort", lambda core, request, *_: None)


def a_deadline_is_never_looked_at(patch: Patch) -> None:
    patch.setattr(EngineCore, "_expire", lambda core, now: core.scheduler.pins.expire(now))


def a_fork_shares_the_list_of_tokens(patch: Patch) -> None:
    def share(fork: Any, _: EngineCore, request: Any) -> None:
        for origin, sequence in zip(request.sequences, fork.sequences, strict=True):
            sequence.output = sequence.sampling.output = origin.output

    after(patch, EngineCore, "fork", share)


def a_preempted_sequence_forgets_a_token(patch: Patch) -> None:
    after(patch, Scheduler, "_preempt", lambda _, scheduler, sequence: sequence.output.__delitem__(slice(-1, None)))


def randomness_follows_the_place_in_the_batch(patch: Patch) -> None:
    plain = draws_module.draw

    def draw(logits: Any, rows: Any, states: Any, drawable: None) -> Any:
        kept = [state.index for state in states]
        for place, state in enumerate(states):
            state.index = place + 1
        try:
            return plain(logits, rows, states)
        finally:
            for state, index in zip(states, kept, strict=True):
                state.index = index

    patch.setattr(draws_module, "draw", draw)


def rows_computed_ahead_are_taken_by_their_place(patch: Patch) -> None:
    plain = RunAhead.claim

    def claim(self: RunAhead, batch: Any) -> Any:
        logits = plain(self, batch)
        return logits and logits._replace(drawing=list(range(len(logits.drawing))))

    patch.setattr(RunAhead, "claim", claim)


def a_step_is_begun_without_slots_for_it(patch: Patch) -> None:
    """They are written where the first tokens are."""

    def misplace(expected: Batch | None, *_: object) -> None:
        if expected is not None:
            expected.row_slots = [node.extents[0].start for node in expected.nodes]

    after(patch, Scheduler, "schedule_ahead", misplace)


def a_prompt_is_scored_one_token_late(patch: Patch) -> None:
    before(patch, EngineCore, "_score_rows", lambda core, request, logits: logits.copy_(logits.roll(1, -1)))


def seats_are_not_counted(patch: Patch) -> None:
    after(patch, Admission, "_fits", lambda *_: True)
    before(patch, Admission, "admit", lambda admission, *_: setattr(admission, "_max_num_seqs", 1_000))


def anyone_may_be_overtaken_for_ever(patch: Patch) -> None:
    """The last that came goes first."""

    def last(queue: WaitingQueue, follow: Callable[[Any], Any]) -> Any:
        chosen = queue._requests[-1]
        chosen.waiting[0].followed or follow(chosen.waiting[0])
        return chosen

    patch.setattr(WaitingQueue, "choose", last)


def a_last_output_is_told_twice(patch: Patch) -> None:
    after(
        patch,
        OutputProcessor,
        "process",
        lambda processed, *_: processed._replace(
            outputs=processed.outputs + [o for o in processed.outputs if o.finished]
        ),
    )


def a_last_output_is_lost(patch: Patch) -> None:
    def lose(processed: Any, *_: object) -> Any:
        outputs = processed.outputs
        return processed._replace(outputs=[o for o in outputs if not o.finished] or outputs[:-1])

    after(patch, OutputProcessor, "process", lose)


# -- reading policies -------------------------------------------------------------------------------------


def inexact_output_is_not_marked(patch: Patch) -> None:
    patch.setattr(Request, "in_tree", lambda request, token, index: token)


def all_policies_have_one_mark(patch: Patch) -> None:
    """The last that was asked for."""

    def mark(policies: PolicyMarks, policy: ReadingPolicy) -> int:
        policies._by_mark[1:] = [policy]
        return int(not policy.exact)

    patch.setattr(PolicyMarks, "mark", mark)


def a_block_is_read_for_too_long(patch: Patch) -> None:
    patch.setattr(planner_module, "keep_views", lambda policies, old, rows, updates: updates)


def slots_are_freed_while_they_are_read(patch: Patch) -> None:
    plain = freeing_module.thin

    def thin(tree: RadixTree, node: Node, position: int, ranges: NDArray[np.int64]) -> None:
        plain(tree, node, position, np.delete(ranges, -2, axis=0) if len(ranges) > 1 else ranges)

    patch.setattr(freeing_module, "thin", thin)


def a_pressed_prompt_is_found_by_others(patch: Patch) -> None:
    def prompt_namespace(prompt: NDArray[np.int32], reading: ReadingPolicy, namespace: str) -> str:
        return f"{namespace}{PRIVATE}pressed" if isinstance(reading, Press) else namespace

    patch.setattr(make_request_module, "prompt_namespace", prompt_namespace)


def a_prompt_is_never_pressed(patch: Patch) -> None:
    patch.setattr(scheduler_module, "awaits_press", lambda sequence: False)


def other_keys_stay_than_those_with_the_highest_scores(patch: Patch) -> None:
    plain = freeing_module.press
    patch.setattr(scheduler_module, "press", lambda tree, part, scores: plain(tree, part, -scores))


def freed_slots_leave_positions_unchanged(patch: Patch) -> None:
    patch.setattr(forest_module, "_extent_positions", lambda forest, ids, thinned: forest.positions)


# -- the host tier ----------------------------------------------------------------------------------------


def finish(copies: Iterable[Any]) -> None:
    """Copies say that they have finished, and have not."""
    for one in copies:
        if one.copy is not None:
            one.copy.done = lambda: True


def a_fetch_is_used_before_it_has_arrived(patch: Patch) -> None:
    before(patch, HostTier, "poll", lambda host, *_: finish(host.fetches._fetches))


def a_save_counts_before_it_has_finished(patch: Patch) -> None:
    before(patch, HostTier, "poll", lambda host, *_: finish(host.saves._saves))


def fetched_slots_go_to_other_tokens(patch: Patch) -> None:
    plain = host_fetches_module.end_load

    def end_load(tree: RadixTree, node: Node, first: int, extents: list[Extent]) -> None:
        plain(tree, node, first, extents[::-1])

    patch.setattr(host_fetches_module, "end_load", end_load)


def what_is_saved_is_one_token_off(patch: Patch) -> None:
    plain = Node.path_slots
    patch.setattr(Node, "path_slots", lambda *arguments: np.roll(plain(*arguments), 1))


def a_fetch_that_nobody_waits_for_stays_locked(patch: Patch) -> None:
    patch.setattr(HostFetches, "leave", lambda self, fetch: None)


# -- the disk tier ----------------------------------------------------------------------------------------


def a_read_counts_before_it_has_finished(patch: Patch) -> None:
    patch.setattr(DiskJob, "done", lambda job: True)
    patch.setattr(DiskTier, "complete_read", lambda disk, job: True)
    patch.setattr(DiskJob, "seconds", 0.0)


def what_is_read_is_one_token_off(patch: Patch) -> None:
    plain = DiskTier.read
    patch.setattr(DiskTier, "read", lambda disk, chunks, first, slots: plain(disk, chunks, first, np.roll(slots, 1)))


def a_chunk_does_not_depend_on_those_before_it(patch: Patch) -> None:
    def chunks(disk: DiskTier, tokens: np.ndarray, namespace: str) -> list[DiskChunk]:
        size = disk.chunk_tokens
        starts = range(0, tokens.size - size + 1, size)
        return [DiskChunk(tokens[start : start + size].tobytes().hex().ljust(40, "0")[:40], start) for start in starts]

    patch.setattr(DiskTier, "_chunks", chunks)


# -- runs that are no prefix ------------------------------------------------------------------------------


def moved_keys_are_found_by_exact_requests(patch: Patch) -> None:
    for module in (admission_module, run_reuse_module):
        patch.setattr(module, "blended_namespace", lambda namespace: namespace)


def runs_are_copied_one_token_off(patch: Patch) -> None:
    plain = Run.slots
    patch.setattr(Run, "slots", lambda run: np.roll(plain(run), 1))


def a_request_with_moved_keys_counts_as_exact(patch: Patch) -> None:
    patch.setattr(Request, "exact", property(lambda request: True))


FAULTS = [
    moved_keys_are_found_by_exact_requests,
    runs_are_copied_one_token_off,
    a_request_with_moved_keys_counts_as_exact,
    a_read_counts_before_it_has_finished,
    what_is_read_is_one_token_off,
    a_chunk_does_not_depend_on_those_before_it,
    a_fetch_is_used_before_it_has_arrived,
    a_save_counts_before_it_has_finished,
    fetched_slots_go_to_other_tokens,
    what_is_saved_is_one_token_off,
    a_fetch_that_nobody_waits_for_stays_locked,
    a_lock_is_skipped,
    a_split_drops_a_reference,
    a_split_is_off_by_one_slot,
    a_slot_is_freed_twice,
    a_slot_is_freed_while_its_step_is_in_flight,
    an_evicted_slot_is_not_given_back,
    a_locked_leaf_stays_among_the_evictable,
    a_matched_leaf_keeps_its_place_among_the_evictable,
    a_branch_leaves_the_reserve_standing,
    more_is_committed_than_was_scheduled,
    a_failed_step_is_not_rolled_back,
    namespaces_share_a_root,
    a_stale_plan_is_carried_on,
    a_new_extent_is_missed,
    a_read_row_writes,
    a_cancelled_request_takes_a_shared_chunk_along,
    a_cancelled_request_goes_on,
    a_deadline_is_never_looked_at,
    a_fork_shares_the_list_of_tokens,
    a_preempted_sequence_forgets_a_token,
    randomness_follows_the_place_in_the_batch,
    rows_computed_ahead_are_taken_by_their_place,
    a_step_is_begun_without_slots_for_it,
    a_prompt_is_scored_one_token_late,
    seats_are_not_counted,
    anyone_may_be_overtaken_for_ever,
    a_last_output_is_told_twice,
    a_last_output_is_lost,
    inexact_output_is_not_marked,
    all_policies_have_one_mark,
    a_block_is_read_for_too_long,
    slots_are_freed_while_they_are_read,
    a_pressed_prompt_is_found_by_others,
    a_prompt_is_never_pressed,
    other_keys_stay_than_those_with_the_highest_scores,
    freed_slots_leave_positions_unchanged,
]


LONGER = settings(PROFILE, max_examples=4 * PROFILE.max_examples)
"""A rare fault takes a while to show."""


@pytest.mark.slow
def test_without_a_fault_nothing_is_seen() -> None:
    """`test_churn.py` runs more of the same histories."""
    run_state_machine_as_test(EngineMachine, settings=settings(PROFILE, max_examples=size(40, PROFILE.max_examples)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, KeyError, ValueError, EngineDead, ExceptionGroup, Flaky)):
        run_state_machine_as_test(EngineMachine, settings=LONGER)
