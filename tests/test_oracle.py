"""The oracle passes every right plan, in all three modes, and fails on each wrong one that is planted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import ROOT, StampModel, expected_logits, extend, logits_of, stamp_of

from radixgen.cache import ExtentPool, Lock, Node, RadixTree
from radixgen.core import OutOfSlots, Plan
from radixgen.model.base import Model
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, Planner

COST = CostModel(tiles=(TileCost(3, 2.0, 1.0),), partial=0.1, mix=True)


@dataclass(frozen=True, slots=True)
class Call:
    """One step as the model gets it, and the whole prefix of each row, both in the plan's order."""

    plan: Plan
    token_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    prefixes: list[list[int]]

    def run(self, model: StampModel) -> NDArray[np.float32]:
        """Logits of every row, the last first."""
        return model.run(self.plan, self.token_ids, self.slots, self.logit_rows).numpy()

    @property
    def logit_rows(self) -> NDArray[np.int64]:
        return np.arange(self.slots.size)[::-1]

    def expected(self, vocab: int) -> NDArray[np.float32]:
        return np.stack([expected_logits(self.prefixes[row], vocab) for row in self.logit_rows.tolist()])


class Driver:
    """Cursors that wander over a tree, and the steps that compute what their paths lack.

    A tidy one keeps its rows in order and always reserves room for a leaf to grow.
    """

    def __init__(self, seed: int, mode: PlanMode = "auto", capacity: int = 64, model: StampModel | None = None) -> None:
        self.random = Random(seed)
        self.tree = RadixTree(ExtentPool(capacity))
        self.planner = Planner(self.tree, mode=mode, cost=COST)
        self.model = model or StampModel(max_model_len=200)
        if model is None:
            self.model.allocate(capacity)
        self.locks: list[Lock] = []
        self.tidy = False

    def wander(self) -> None:
        """Insert, fork, drop or move cursors, or evict."""
        random, tree = self.random, self.tree
        action = random.randrange(6) if self.locks else 0
        if action == 0 and len(self.locks) < 8:
            self.insert([random.randrange(3) for _ in range(random.randint(1, 12))])
        elif action == 1:
            self.locks.append(tree.lock(random.choice(self.locks).held))
        elif action == 2 or len(self.locks) > 8:
            tree.unlock(self.locks.pop(random.randrange(len(self.locks))))
        elif action == 3:
            tree.evict(random.randint(1, 8))
        else:
            self.advance()

    def insert(self, tokens: list[int]) -> None:
        self.locks.append(self.tree.insert(tokens))

    def advance(self) -> None:
        """Move every cursor that has its logits by a token, those on one node alike or apart."""
        groups: dict[tuple[Node, int], list[Lock]] = {}
        for lock in self.locks:
            if lock.held.complete and lock.held.end < 150:
                groups.setdefault((lock.held, self.random.randrange(3)), []).append(lock)
        for (_, token), group in groups.items():
            self.tree.advance(group, token)

    def call(self, chunk: int = 100) -> Call | None:
        """Schedule up to `chunk` tokens of each path; a path that lacks none reads its last token."""
        rows: list[tuple[Node, int, int]] = []
        for lock in self.locks:
            rows += self._span(lock.held, chunk)
        read = {node.id: node for node in (lock.held for lock in self.locks) if node.complete and node.known}
        rows += [(node, node.end - 1, -1) for node in read.values()]
        return self._freeze(rows) if rows else None

    def _span(self, leaf: Node, chunk: int) -> list[tuple[Node, int, int]]:
        """The node, position and slot of each token scheduled."""
        rows: list[tuple[Node, int, int]] = []
        for node in leaf.path():
            count = min(chunk - len(rows), node.known - node.scheduled)
            if count == 0:
                continue
            first = node.start + node.scheduled
            try:
                slots = self._schedule(node, count)
            except OutOfSlots:
                break
            rows += [(node, first + i, slot) for i, slot in enumerate(slots.tolist())]
            if node.scheduled < node.known:
                break
        return rows

    def _schedule(self, node: Node, count: int) -> NDArray[np.int64]:
        if self.tree.slots_wanted(node, count) > self.tree.pool.free:
            self.tree.reclaim_reserves(self.tree.reserved_tokens)
            self.tree.evict(max(0, self.tree.slots_wanted(node, count) - self.tree.pool.free))
        return self.tree.schedule(node, count, 8 if self.tidy else self.random.randint(0, 4))

    def _freeze(self, rows: list[tuple[Node, int, int]]) -> Call:
        if not self.tidy:
            self.random.shuffle(rows)
        nodes, positions = np.array([(node.id, position) for node, position, _ in rows], np.int32).T.copy()
        plan = self.planner.plan(nodes, positions, np.array([slot for _, _, slot in rows], np.int64))
        ordered = [rows[row] for row in plan.row_order]
        prefixes = [node.path_tokens()[: position + 1].tolist() for node, position, _ in ordered]
        return Call(
            plan,
            np.array([prefix[-1] for prefix in prefixes], np.int64),
            np.array([slot for _, _, slot in ordered], np.int64),
            prefixes,
        )

    def commit(self) -> None:
        for node in list(self.tree.nodes()):
            self.tree.commit(node)

    def step(self, chunk: int = 100) -> Call | None:
        """Run a step on the model. All slots that are free then are forgotten."""
        call = self.call(chunk)
        if call is not None:
            found = call.run(self.model)
            assert np.array_equal(found, call.expected(self.model.vocab_size))
            self.commit()
        for start, length in self.tree.pool.free_extents():
            self.model.poison(range(start, start + length))
        return call


def branching(mode: PlanMode = "auto", seed: int = 0) -> tuple[Driver, Call]:
    """Four paths over a shared prefix in scattered extents, all computed, and the call that decodes on."""
    driver = Driver(seed, mode, capacity=96)
    driver.tree.pool.allocate(1)
    shared = [0, 1, 2, 0, 1, 2]
    for tail in ([0, 0, 0, 0], [0, 0, 1, 0], [1, 2, 0], [2, 1]):
        driver.insert([*shared, *tail])
    for _ in range(4):
        driver.step(chunk=3)
    for _ in range(3):
        driver.advance()
        driver.step()
    driver.advance()
    call = driver.call()
    assert call is not None and call.slots.min() >= 0 and call.plan.num_rows == 4
    return driver, call


def following(driver: Driver, call: Call) -> Call:
    """Run the call; the one after it, in which every cursor has moved on."""
    call.run(driver.model)
    driver.commit()
    driver.advance()
    later = driver.call()
    assert later is not None
    return later


def caught(model: StampModel, call: Call, message: str = "row .*, position .*, slot .*: expected .*; found") -> None:
    with pytest.raises(AssertionError, match=message):
        call.run(model)


def test_a_stamp_model_is_a_model() -> None:
    model = StampModel()
    assert isinstance(model, Model)
    assert (model.vocab_size, model.max_model_len, model.eos_token_ids) == (3, 64, frozenset())


@pytest.mark.parametrize("mode", PLAN_MODES)
@pytest.mark.parametrize("seed", range(8))
def test_right_plans_pass(mode: PlanMode, seed: int) -> None:
    driver = Driver(seed, mode, capacity=48 + 16 * (seed % 3))
    rows = steps = 0
    for _ in range(120):
        driver.wander()
        call = driver.step(chunk=driver.random.choice([1, 3, 100]))
        rows, steps = rows + (call.slots.size if call else 0), steps + (call is not None)
        driver.tree.check()
    assert (driver.model.rows, driver.model.steps) == (rows, steps)
    assert rows > 200 and driver.tree.evicted_tokens > 0


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_plans_carried_over_pass(mode: PlanMode) -> None:
    driver, call = branching(mode)
    driver.tidy, carried = True, 0
    for _ in range(6):
        call = following(driver, call)
        carried += not call.plan.rebuilt
        assert np.array_equal(call.run(driver.model), call.expected(3))
    assert carried > 2


def test_bytes_read_are_counted() -> None:
    driver, call = branching()
    before = driver.model.kv_bytes_read, driver.model.kv_bytes_unshared
    call.run(driver.model)
    size = driver.model.kv_bytes_per_token
    assert driver.model.kv_bytes_read - before[0] == call.plan.kv_tokens_read * size
    assert driver.model.kv_bytes_unshared - before[1] == call.plan.kv_tokens_unshared * size


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 100])
def test_logits_follow_from_the_prefix_alone(vocab: int) -> None:
    prefix = [0, 2, 1, 1]
    logits = expected_logits(prefix, vocab)
    assert logits.shape == (vocab,) and logits.dtype == np.float32 and np.abs(logits).max() <= 4
    assert np.array_equal(logits, logits_of(extend(stamp_of(prefix[:-1]), 1), vocab))
    assert stamp_of([]) == ROOT and len(stamp_of(prefix)) == len(ROOT) == 16
    assert not np.array_equal(logits, expected_logits([2, 0, 1, 1], vocab))


def test_logits_spread() -> None:
    logits = np.stack([expected_logits([i], 16) for i in range(200)])
    assert logits.min() < -3.9 and logits.max() > 3.9 and abs(logits.mean()) < 0.2
    assert np.unique(logits).size > 3190


# -- wrong plans --------------------------------------------------------------------------------------------

Planted = Callable[[Plan, int], Plan]


def changed(values: NDArray[np.integer], index: int, by: int) -> NDArray[np.integer]:
    values = values.copy()
    values[index] += by
    return values


def kept(plan: Plan, segments: list[int]) -> Plan:
    """The plan with each unit's segments chosen anew: `segments`, some left out or named twice."""
    order = np.array(segments, np.int64)
    bounds = np.searchsorted(order, plan.unit_segments).astype(np.int32)
    return replace(
        plan,
        unit_segments=bounds,
        segment_starts=plan.segment_starts[order],
        segment_lengths=plan.segment_lengths[order],
        segment_positions=plan.segment_positions[order],
        segment_rows=plan.segment_rows[order],
    )


def without(plan: Plan, segment: int) -> Plan:
    return kept(plan, [i for i in range(plan.segment_starts.size) if i != segment])


def doubled(plan: Plan, segment: int) -> Plan:
    return kept(plan, sorted([*range(plan.segment_starts.size), segment]))


def replace_plan(call: Call, plan: Plan) -> Call:
    return replace(call, plan=plan)


def hidden(plan: Plan, segment: int) -> Plan:
    """The plan with the segment kept from the deepest of its rows, and from those behind it."""
    rows = plan.segment_rows.copy()
    first, stop = rows[segment]
    rows[segment, 1] = first + np.argmax(plan.row_positions[first:stop])
    return replace(plan, segment_rows=rows)


WRONG_SEGMENTS: dict[str, Planted] = {
    "one slot up": lambda p, i: replace(p, segment_starts=changed(p.segment_starts, i, 1)),
    "one slot down": lambda p, i: replace(p, segment_starts=changed(p.segment_starts, i, -1)),
    "dropped": without,
    "twice": doubled,
    "one key short": lambda p, i: replace(p, segment_lengths=changed(p.segment_lengths, i, -1)),
    "position one up": lambda p, i: replace(p, segment_positions=changed(p.segment_positions, i, 1)),
    "position one down": lambda p, i: replace(p, segment_positions=changed(p.segment_positions, i, -1)),
    "hidden from a row": hidden,
    "outside the pool": lambda p, i: replace(p, segment_starts=changed(p.segment_starts, i, 1000)),
    "before the pool": lambda p, i: replace(p, segment_starts=changed(p.segment_starts, i, -1000)),
}


@pytest.mark.parametrize("mode", PLAN_MODES)
@pytest.mark.parametrize("wrong", WRONG_SEGMENTS)
def test_every_wrong_segment_is_caught(mode: PlanMode, wrong: str) -> None:
    _, call = branching(mode)
    message = "in a pool of" if "pool" in wrong else "row .*, position .*, slot"
    for segment in range(call.plan.segment_starts.size):
        driver, call = branching(mode)
        caught(driver.model, replace_plan(call, WRONG_SEGMENTS[wrong](call.plan, segment)), message)


@pytest.mark.parametrize("mode", PLAN_MODES)
@pytest.mark.parametrize("wrong", [name for name in WRONG_SEGMENTS if "pool" not in name])
@pytest.mark.parametrize("seed", range(4))
def test_wrong_segments_are_caught_anywhere(mode: PlanMode, wrong: str, seed: int) -> None:
    """A wrong step anywhere in a random history; the right one then writes the same slots anew, and passes."""
    driver, tried = Driver(seed, mode), 0
    for _ in range(60):
        driver.wander()
        call = driver.call(chunk=3)
        if call is None:
            continue
        segment = driver.random.randrange(call.plan.segment_starts.size)
        planted = replace_plan(call, WRONG_SEGMENTS[wrong](call.plan, segment))
        with pytest.raises(AssertionError):
            assert np.array_equal(planted.run(driver.model), planted.expected(3))
        call.run(driver.model)
        driver.commit()
        tried += 1
    assert tried > 20


def test_a_unit_that_leaves_out_a_row_is_caught() -> None:
    driver, call = branching("naive")
    units = call.plan.unit_rows.copy()
    units[0, 1] -= 1
    caught(driver.model, replace_plan(call, replace(call.plan, unit_rows=units)), "0 reads here")


def moved(plan: Plan, slot: int, to: int) -> Plan:
    """The plan with the last key of the segment that ends at `slot` read at `to`, in a segment of its own."""
    cut = int(np.flatnonzero(plan.segment_starts + plan.segment_lengths - 1 == slot)[0])
    plan = doubled(plan, cut)
    plan.segment_lengths[cut] -= 1
    plan.segment_positions[cut + 1] += plan.segment_lengths[cut]
    plan.segment_starts[cut + 1] = to
    plan.segment_lengths[cut + 1] = 1
    return plan


# -- wrong slots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_swapped_slots_are_caught(mode: PlanMode) -> None:
    for first in range(3):
        driver, call = branching(mode)
        call.slots[[first, first + 1]] = call.slots[[first + 1, first]]
        caught(driver.model, call, "a write to slot")


def test_slots_swapped_in_the_plan_too_are_caught_one_step_later() -> None:
    """The step itself is then a right one; it is the tree that finds another's KV in its slot."""
    driver, call = branching("unshared")
    one, other = call.slots[:2].tolist()
    swapped = moved(moved(moved(call.plan, one, -1), other, one), -1, other)
    swap = replace(call, plan=swapped, slots=call.slots[[1, 0, *range(2, call.slots.size)]])
    caught(driver.model, following(driver, swap))


def test_a_slot_that_two_rows_write_is_caught() -> None:
    driver, call = branching("unshared")
    plan = moved(call.plan, int(call.slots[1]), int(call.slots[0]))
    call.slots[1] = call.slots[0]
    caught(driver.model, replace_plan(call, plan), "a slot of its own; found row 0 writes it too")


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_a_write_over_the_slot_of_another_path_is_caught(mode: PlanMode) -> None:
    """The writer itself reads what it wrote; it is the other row that finds a stranger's KV."""
    driver, call = branching(mode)
    victims = [lock.held for lock in driver.locks if lock.held.slots(0, lock.held.known)[-1] != call.slots[0]]
    taken = int(victims[0].slots(0, 1)[0])
    assert taken not in call.slots
    plan = moved(call.plan, int(call.slots[0]), taken)
    call.slots[0] = taken
    caught(driver.model, replace_plan(call, plan), f"row [1-3], .*slot {taken}: ")


@pytest.mark.parametrize("mode", ["unshared", "naive"])
def test_the_whole_prefix_of_a_sibling_is_told_by_the_logits(mode: PlanMode) -> None:
    """A row then reads a prefix like any other; its logits tell, and so do those who read it later."""
    driver = Driver(0, mode)
    driver.insert([0, 1, 2, 0])
    driver.insert([0, 1, 2, 1])
    driver.step()
    own, other = (int(lock.held.slots(0, 1)[0]) for lock in driver.locks)
    driver.insert([0, 1, 2, 0, 2])
    for _ in range(2):
        driver.tree.unlock(driver.locks.pop(0))
    call = driver.call()
    assert call is not None and call.plan.num_rows == 1
    crossed = replace_plan(call, moved(call.plan, own, other))
    assert np.array_equal(crossed.run(driver.model), [expected_logits([0, 1, 2, 1, 2], 3)])
    caught(driver.model, following(driver, crossed))


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_a_stranger_between_steps_is_caught(mode: PlanMode) -> None:
    """Another tree writes, rightly in its own eyes, into the same storage."""
    driver, call = branching(mode)
    stranger = Driver(1, mode, model=driver.model)
    stranger.insert([2, 2])
    strange = stranger.call()
    assert strange is not None
    strange.run(driver.model)
    assert set(strange.slots.tolist()) & set(keys_of(call.plan))
    caught(driver.model, call)


def keys_of(plan: Plan) -> list[int]:
    spans = zip(plan.segment_starts.tolist(), plan.segment_lengths.tolist(), strict=True)
    return [slot for start, length in spans for slot in range(start, start + length)]


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_each_lost_slot_is_caught(mode: PlanMode) -> None:
    _, call = branching(mode)
    for slot in sorted(set(keys_of(call.plan)) - set(call.slots.tolist())):
        driver, call = branching(mode)
        driver.model.poison([slot])
        caught(driver.model, call, f"slot {slot}: .*found poisoned")


def test_a_slot_never_written_is_caught() -> None:
    driver, call = branching()
    driver.model.allocate(96)
    caught(driver.model, call, "row 0, position 0, slot .*found never written")


def test_kv_that_should_exist_is_asked_for() -> None:
    driver, call = branching()
    call.slots[2] = -1
    caught(driver.model, call, "row 2, .*KV of .* before the step; found (never written|poisoned)")


# -- stale plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_the_plan_of_the_step_before_is_caught(mode: PlanMode) -> None:
    driver, call = branching(mode)
    caught(driver.model, replace_plan(following(driver, call), call.plan))


@pytest.mark.parametrize("mode", PLAN_MODES)
def test_a_plan_of_evicted_paths_is_caught(mode: PlanMode) -> None:
    driver, call = branching(mode)
    call.run(driver.model)
    driver.commit()
    stale = replace(call, slots=np.full_like(call.slots, -1))
    assert np.array_equal(stale.run(driver.model), call.expected(3))
    while driver.locks:
        driver.tree.unlock(driver.locks.pop())
    driver.tree.reset()
    assert np.array_equal(stale.run(driver.model), call.expected(3)), "evicted, and not yet overwritten"
    driver.insert([2, 2, 2])
    driver.step()
    caught(driver.model, stale)


# -- faults and refusals ------------------------------------------------------------------------------------


def test_a_failed_step_leaves_garbage_in_its_slots() -> None:
    driver, call = branching()
    rows = driver.model.rows
    driver.model.fail_next = failure = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone") as raised:
        call.run(driver.model)
    assert raised.value is failure and driver.model.rows == rows
    caught(driver.model, replace(call, slots=np.full_like(call.slots, -1)), "found poisoned")
    assert np.array_equal(call.run(driver.model), call.expected(3))


def test_calls_that_make_no_sense_are_refused() -> None:
    driver, call = branching()
    caught(driver.model, replace(call, token_ids=call.token_ids + 3), "in a vocabulary of 3")
    caught(driver.model, replace(call, token_ids=call.token_ids[1:]), "tokens")
    caught(driver.model, replace_plan(call, call.plan.within(4)), "a window of 4")
    driver.model.max_model_len = 8
    caught(driver.model, call, "in a context of 8")
    with pytest.raises(AssertionError, match="logits of rows"):
        StampModel().run(call.plan, call.token_ids, call.slots, np.array([call.plan.num_rows]))


def test_release_drops_the_storage() -> None:
    driver, call = branching()
    driver.model.release()
    caught(driver.model, call, "in a pool of 0")
