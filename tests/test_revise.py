"""Plans revised for leaves that end or go on to a new extent read what plans made anew would read."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import COSTS, keys_read
from test_planner import decode_rows as rows

from radixgen.cache import ExtentPool, Lock, RadixTree
from radixgen.core import Plan
from radixgen.scheduler import planner as planner_module
from radixgen.scheduler.cost import CostModel
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, Planner
from radixgen.scheduler.revise import StepRows, revise, row_updates

TRUNK = 40


def grown(leaves: int, branches: int) -> tuple[RadixTree, list[Lock]]:
    """Leaves of 1 to 3 tokens below `branches` branches of one trunk."""
    tree = RadixTree(ExtentPool(20_000))
    cursors = [
        tree.insert([*range(TRUNK), 100 + leaf % branches, *range(leaf % branches), 200 + leaf, *range(leaf % 3)])
        for leaf in range(leaves)
    ]
    for cursor in cursors:
        for node in cursor.held.path():
            if node.scheduled < node.known:
                tree.schedule(node, node.known - node.scheduled, 2 if node is cursor.held else 0)
                tree.commit(node)
    return tree, cursors


def step(tree: RadixTree, cursors: list[Lock], reserve: int) -> None:
    for cursor in cursors:
        node = tree.advance([cursor], 1)
        tree.schedule(node, 1, reserve)
        tree.commit(node)


def reads_of_callers_rows(found: Plan) -> list[list[tuple[int, int]]]:
    reads = keys_read(found)
    return [reads[place] for place in np.argsort(found.row_order)]


def assert_sound(found: Plan) -> None:
    """Whole ranges of segments and rows, in order; as many units over each row as it says; last segments grow."""
    assert np.array_equal(found.unit_segments[1:, 0], found.unit_segments[:-1, 1])
    assert found.unit_segments[0, 0] == 0 and found.unit_segments[-1, 1] == len(found.segment_starts)
    over = np.zeros(found.num_rows, int)
    for (low, high), (first, stop) in zip(found.unit_rows, found.unit_segments, strict=True):
        over[low:high] += 1
        inside = found.segment_rows[first:stop]
        assert (inside[:, 0] >= low).all() and (inside[:, 1] <= high).all()
    assert np.array_equal(over - 1, found.row_extra)
    ends = found.segment_positions + found.segment_lengths
    assert np.array_equal(np.sort(found.segment_rows[found.growing, 0]), np.arange(found.num_rows))
    assert np.array_equal(ends[found.growing] - 1, found.row_positions[found.segment_rows[found.growing, 0]])
    assert not np.delete(found.segment_room, found.growing).any()
    assert len(found.unit_rank) == len(found.unit_cost) == found.num_units


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 24), st.integers(1, 5), st.sampled_from(PLAN_MODES), st.sampled_from(COSTS))
def test_a_revised_plan_reads_what_a_new_one_does(
    data: Any, leaves: int, branches: int, mode: PlanMode, cost: CostModel
) -> None:
    tree, cursors = grown(leaves, branches)
    planner = Planner(tree, mode=mode, cost=cost)
    planner.plan(*rows(cursors))
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            tree.reclaim_reserves(data.draw(st.integers(0, 10)))
            for cursor in cursors[:: data.draw(st.integers(1, 3))]:
                tree.pool.grow(cursor.held.extents[-1].end, 1)  # so that no extent grows there
        for _ in range(data.draw(st.integers(0, 2))):
            if len(cursors) > 1:
                tree.unlock(cursors.pop(data.draw(st.integers(0, len(cursors) - 1))))
        if data.draw(st.integers(0, 4)) == 0:
            tree.evict(data.draw(st.integers(1, 9)))
        step(tree, cursors, data.draw(st.integers(0, 3)))
        found = planner.plan(*rows(cursors))
        assert_sound(found)
        fresh = Planner(tree, mode=mode, cost=cost).plan(*rows(cursors))
        assert reads_of_callers_rows(found) == reads_of_callers_rows(fresh)
        assert found.kv_tokens_unshared == fresh.kv_tokens_unshared


def revisions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the rows of each plan that is revised."""
    noted: list[int] = []

    def noting(*arguments: Any) -> Plan:
        found = revise(*arguments)
        noted.append(found.num_rows)
        return found

    monkeypatch.setattr(planner_module, "revise", noting)
    return noted


def test_leaves_that_end_or_move_on_are_revised_until_much_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, cursors = grown(32, 4)
    planner = Planner(tree)
    noted = revisions(monkeypatch)
    planner.plan(*rows(cursors))
    for left in (31, 30, 29, 28):
        tree.unlock(cursors.pop(left // 2))
        step(tree, cursors, 4)
        planner.plan(*rows(cursors))
    assert noted == [31, 30, 29, 28]
    tree.unlock(cursors.pop())
    step(tree, cursors, 4)
    assert planner.plan(*rows(cursors)).num_rows == 27  # under 7/8 of 32: made anew
    assert len(noted) == 4
    tree.reclaim_reserves(tree.reserved_tokens)
    for cursor in cursors:
        tree.pool.grow(cursor.held.extents[-1].end, 1)  # somebody else takes the slot behind
    step(tree, cursors, 9)
    found = planner.plan(*rows(cursors))
    assert len(noted) == 5 and found.slack == 9
    assert all(len(cursor.held.extents) > 1 for cursor in cursors)


def test_a_new_room_is_seen_where_an_extent_grows_in_place() -> None:
    tree, cursors = grown(1, 1)
    planner = Planner(tree)
    planner.plan(*rows(cursors))
    for _ in range(2):
        step(tree, cursors, 7)
        assert planner.plan(*rows(cursors)).age
    step(tree, cursors, 7)  # the reserve has run out, and the extent behind it was free
    assert len(cursors[0].held.extents) == 1
    found = planner.plan(*rows(cursors))
    assert found.slack == 7 and found.age == 0


def test_an_id_that_another_node_took_over_is_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, cursors = grown(8, 1)
    planner = Planner(tree)
    noted = revisions(monkeypatch)
    before = rows(cursors)
    planner.plan(*before)
    last = cursors[-1].held
    prompt, size = last.path_tokens().copy(), last.end
    tree.unlock(cursors.pop())
    tree.reset()
    prompt[TRUNK + 2 :] += 7
    cursors.append(tree.insert([*prompt.tolist(), 3]))
    for node in cursors[-1].held.path():
        if node.scheduled < node.known:
            tree.schedule(node, node.known - node.scheduled)
            tree.commit(node)
    step(tree, cursors[:-1], 4)
    again = rows(cursors)
    assert np.array_equal(again.nodes, before.nodes) and cursors[-1].held.end == size + 1
    found = planner.plan(*again)
    assert not noted
    assert reads_of_callers_rows(found) == reads_of_callers_rows(Planner(tree).plan(*again))


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.integers(0, 5))
def test_rows_are_followed_by_leaf_and_position(drawn: list[bool], other: int) -> None:
    tree, cursors = grown(6, 2)
    old, stay = rows(cursors), np.flatnonzero(drawn)
    before = tree.columns, tree.version, old.nodes.astype(np.int64), old
    step(tree, [cursors[i] for i in stay], 3)
    after = rows(cursors)
    found = StepRows(*(column[stay] for column in after))
    updates = row_updates(*before, found)
    assert updates is not None and updates.kept.tolist() == drawn
    if stay.size > 1:
        assert row_updates(*before, StepRows(*(column[::-1].copy() for column in found))) is None
    if other not in stay:
        more = StepRows(*(np.append(column, own[other]) for column, own in zip(found, after, strict=True)))
        assert row_updates(*before, more) is None
    elif stay.size:
        found.positions[np.flatnonzero(stay == other)] -= 1
        assert row_updates(*before, found) is None
