"""Plans cover each row's path exactly once, in depth-first rows, and are carried over where only lengths grow."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import size
from test_attention import first_key

from bench import trees
from radixgen.cache import ExtentPool, Lock, RadixTree
from radixgen.calibration import cost_models
from radixgen.core import Chunk, Plan, Window
from radixgen.kernels.geometry import Geometry
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.forest import Forest, walk_paths
from radixgen.scheduler.partition import partition
from radixgen.scheduler.planner import PLAN_MODES, Planner, plan
from radixgen.scheduler.revise import StepRows

COSTS = [
    CostModel(),
    CostModel(tiles=(TileCost(3, 1.0, 1.0),), partial=0.1),
    CostModel(tiles=(TileCost(1, 9.0, 1.0),)),
    CostModel(tiles=(TileCost(2, 3.0, 1.0), TileCost(5, 4.0, 1.5)), partial=0.5, mix=True),
    CostModel(tiles=(TileCost(2, 3.0, 1.0, 1.3), TileCost(8, 4.0, 1.1, 2.0)), partial=0.3, mix=True),
    CostModel(tiles=(TileCost(2, 3.0, 1.0, 1.3), TileCost(8, 4.0, 1.1, 2.0)), partial=0.3, least_run=6, mix=True),
    CostModel(tiles=(TileCost(16, 3.0, 1.0), TileCost(64, 4.0, 1.3)), partial=0.2, group=3, kv_heads=2, mix=True),
    CostModel(tiles=(TileCost(4, 0.5, 1.0), TileCost(9, 0.7, 1.1)), partial=0.1, programs=7, mix=True),
]

WINDOWS = st.integers(1, 12) | st.integers(1, 12).map(Chunk)


@st.composite
def forests(draw: st.DrawFn) -> tuple[Forest, np.ndarray, np.ndarray]:
    """Up to 20 nodes of 0 to 9 keys in up to 3 extents, and up to 30 rows anywhere in them."""
    size = draw(st.integers(1, 20))
    parents = [-1] + [draw(st.integers(-1, i - 1)) for i in range(1, size)]
    extents = [draw(st.lists(st.integers(0, 3), max_size=3)) for _ in range(size)]
    lengths = [sum(parts) for parts in extents]
    starts = [0] * size
    for node, parent in enumerate(parents):
        if parent >= 0:
            starts[node] = starts[parent] + lengths[parent]
    flat = [part for parts in extents for part in parts]
    forest = Forest(
        parents=np.array(parents, np.int32),
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        extent_offsets=np.cumsum([0] + [len(parts) for parts in extents]),
        extent_starts=np.arange(len(flat), dtype=np.int64) * 10,
        extent_lengths=np.array(flat, np.int32),
    )
    nodes = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30))
    positions = [starts[n] + draw(st.integers(0, lengths[n] - 1)) if lengths[n] else starts[n] - 1 for n in nodes]
    return forest, np.array(nodes, np.int32), np.array(positions, np.int32)


def path_slots(forest: Forest, node: int) -> list[int]:
    """The slot of every position on the path to `node`'s end."""
    slots: list[int] = []
    while node >= 0:
        own = range(forest.extent_offsets[node], forest.extent_offsets[node + 1])
        slots = [forest.extent_starts[e] + i for e in own for i in range(forest.extent_lengths[e])] + slots
        node = int(forest.parents[node])
    return slots


def keys_read(found: Plan, window: Window | None = None) -> list[list[tuple[int, int]]]:
    """For each row of the plan the (position, slot) of every key that it sees, sorted, repeats kept."""
    seen: list[list[tuple[int, int]]] = [[] for _ in range(found.num_rows)]
    last, readers = found.row_positions.tolist(), found.segment_rows.tolist()
    positions, lengths, slots = (
        array.tolist() for array in (found.segment_positions, found.segment_lengths, found.segment_starts)
    )
    for begin, stop in found.unit_segments.tolist():
        for segment in range(begin, stop):
            first, to_slot = positions[segment], slots[segment] - positions[segment]
            for row in range(*readers[segment]):
                oldest = max(first, first_key(window, last[row]))
                keys = range(oldest, min(first + lengths[segment], last[row] + 1))
                seen[row] += [(key, key + to_slot) for key in keys]
    return [sorted(keys) for keys in seen]


@given(forests(), st.sampled_from(PLAN_MODES), st.sampled_from(COSTS), WINDOWS)
@settings(max_examples=300, deadline=None)
def test_each_key_of_a_path_is_read_once(case, mode, cost, window) -> None:
    forest, nodes, positions = case
    found = plan(forest, nodes, positions, mode=mode, cost=cost)
    assert sorted(found.row_order.tolist()) == list(range(nodes.size))
    assert np.array_equal(found.row_positions, positions[found.row_order])
    for trimmed, width in ((found, None), (found.within(window), window)):
        for row, keys in enumerate(keys_read(trimmed, width)):
            node, last = int(nodes[found.row_order[row]]), int(found.row_positions[row])
            path = path_slots(forest, node)
            first = max(0, first_key(width, last))  # a row without keys stands at -1
            assert keys == [(p, path[p]) for p in range(first, last + 1)]
    if mode == "unshared":
        assert found.kv_tokens_read == found.kv_tokens_unshared


@given(forests(), st.sampled_from(COSTS))
@settings(max_examples=100, deadline=None)
def test_rows_below_a_node_are_one_range(case, cost) -> None:
    forest, nodes, positions = case
    order = plan(forest, nodes, positions, cost=cost).row_order
    for node in np.flatnonzero(forest.lengths).tolist():
        below = []
        for place, row in enumerate(order.tolist()):
            above = int(nodes[row])
            while above >= 0 and above != node:
                above = int(forest.parents[above])
            if above == node:
                below.append(place)
        assert below == list(range(below[0], below[0] + len(below))) if below else True


@given(forests(), st.sampled_from(PLAN_MODES), st.sampled_from(COSTS), WINDOWS)
@settings(max_examples=150, deadline=None)
def test_a_window_drops_the_keys_before_the_first_that_a_unit_sees(case, mode, cost, window) -> None:
    forest, nodes, positions = case
    found = plan(forest, nodes, positions, mode=mode, cost=cost)
    trimmed = found.within(window)
    assert trimmed is found.within(window) and found.within(None) is found
    for unit in range(found.num_units):
        rows = found.row_positions[slice(*found.unit_rows[unit])].tolist()
        first_seen = first_key(window, min(rows))
        for segment in range(*found.unit_segments[unit]):
            first = int(found.segment_positions[segment])
            kept = [p for p in range(first, first + found.segment_lengths[segment]) if p >= first_seen]
            assert trimmed.segment_lengths[segment] == len(kept)
            shift = trimmed.segment_starts[segment] - found.segment_starts[segment]
            assert trimmed.segment_positions[segment] - first == shift
            if kept:
                assert kept[0] == trimmed.segment_positions[segment] and kept[-1] <= max(rows)


@given(forests(), st.data(), st.sampled_from(PLAN_MODES), st.sampled_from(COSTS))
@settings(max_examples=150, deadline=None)
def test_advance_is_the_plan_of_one_token_later(case, data, mode, cost) -> None:
    forest, _, _ = case
    inner = set(forest.parents.tolist())
    leaves = [i for i, length in enumerate(forest.lengths) if length and i not in inner]
    if not leaves:
        return
    rows = np.array(data.draw(st.permutations(leaves)), np.int32)
    positions = (forest.starts + forest.lengths)[rows] - 1
    lengths, extent_lengths = forest.lengths.copy(), forest.extent_lengths.copy()
    lengths[leaves] += 1
    for leaf in leaves:
        own = range(forest.extent_offsets[leaf], forest.extent_offsets[leaf + 1])
        extent_lengths[max(e for e in own if extent_lengths[e])] += 1
    later = replace(forest, lengths=lengths, extent_lengths=extent_lengths)
    carried = plan(forest, rows, positions, mode=mode, cost=cost).advance()
    fresh = plan(later, rows, positions + 1, mode=mode, cost=cost)
    assert fresh.rebuilt and not carried.rebuilt
    assert keys_read(carried) == keys_read(fresh)
    if (
        np.array_equal(carried.unit_rows, fresh.unit_rows)
        and carried.segment_rows.tolist() == fresh.segment_rows.tolist()
    ):
        for one in fields(Plan):
            if one.name not in (
                "nodes",
                "unit_cost",
                "tile_rows",
                "predicted",
                "window",
                "age",
                "_origin",
                "_windowed",
            ):
                found, expected = getattr(carried, one.name), getattr(fresh, one.name)
                assert found.dtype == expected.dtype and np.array_equal(found, expected), one.name


def modelled_cost(found: Plan, cost: CostModel) -> float:
    """What the cost model says of all units and partials, for one KV head."""
    counts = np.diff(found.unit_segments, axis=1)[:, 0]
    owners = np.repeat(np.arange(found.num_units), counts)
    keys = np.bincount(owners, weights=found.segment_lengths, minlength=found.num_units)
    partials = (found.row_extra + 1)[found.row_extra > 0].sum()
    rows = np.diff(found.unit_rows, axis=1)[:, 0]
    seen_by_all = np.diff(found.segment_rows, axis=1)[:, 0] == np.repeat(rows, counts)
    mixed_keys = np.where(seen_by_all & (found.segment_lengths >= cost.least_run), 0, found.segment_lengths)
    mixed = np.bincount(owners, weights=mixed_keys, minlength=found.num_units)
    units = cost.unit_costs(rows, keys, mixed)
    return float(units.sum() + cost.partial * cost.group * partials)


def least_cost(parents: list[int], lengths: list[int], own: list[int], cost: CostModel) -> float:
    """The least over every plan: each node cut or folded, each row of siblings parted into runs in every way."""
    children = [[c for c, p in enumerate(parents) if p == node and below(c, parents, own)] for node in range(len(own))]
    price = cost.partial * cost.group

    def end_of_chain(node: int) -> int:
        """Siblings come in the order of these: nodes without rows of their own and with one child count as one."""
        heirs = children[node]
        return end_of_chain(heirs[0]) if not own[node] and len(heirs) == 1 else node

    for heirs in children:
        heirs.sort(key=end_of_chain)

    def one(tile: TileCost, keys: list[int], inner: int = 0) -> float:
        """A tile over pending nodes of so many keys each, and `inner` that only some rows see."""
        mixed = tile.key if tile.mixed is None else tile.mixed
        return tile.unit + inner * mixed + sum(n * (mixed if n < cost.least_run else tile.key) for n in keys)

    def unit(rows: int, keys: list[int]) -> float:
        best = np.inf
        for tile in cost.tiles:
            cap = tile.rows // cost.group
            if cap:
                last = min([one(t, keys) for t in cost.tiles if t.rows // cost.group >= (rows % cap)])
                best = min(best, rows // cap * one(tile, keys) + (last if rows % cap else 0))
        return best

    def row_of(items: list[tuple[int, int, int]], pending: list[int], virgin: bool) -> float:
        """Items are (node or -1 for own rows, rows, keys)."""
        if not items:
            return 0.0
        extra = 0.0 if virgin else price
        node, rows, _ = items[0]
        first = unit(rows, pending) + extra * rows if node < 0 else subtree(node, pending, virgin)
        best = first + row_of(items[1:], pending, virgin)
        for end in range(1, len(items) + 1 if cost.mix else 1):
            rows = sum(item[1] for item in items[:end])
            if rows * cost.group <= max(tile.rows for tile in cost.tiles):
                mixed = [t for t in cost.tiles if t.rows // cost.group >= rows]
                inner = sum(item[2] for item in items[:end])
                run = min(one(t, pending, inner) for t in mixed)
                best = min(best, run + extra * rows + row_of(items[end:], pending, virgin))
        return best

    def subtree(node: int, pending: list[int], virgin: bool) -> float:
        rows = below(node, parents, own)
        items = [(c, below(c, parents, own), inside(c, parents, lengths, own)) for c in children[node]]
        mine = [(-1, own[node], 0)] if own[node] else []
        best = row_of(mine + items, [*pending, lengths[node]], virgin)
        if sum(pending) + lengths[node]:
            cut = unit(rows, [*pending, lengths[node]]) + price * (rows - own[node] if virgin else rows)
            best = min(best, cut + row_of(items, [], False))
        return best

    roots = sorted((c for c, p in enumerate(parents) if p < 0 and below(c, parents, own)), key=end_of_chain)
    return row_of([(c, below(c, parents, own), inside(c, parents, lengths, own)) for c in roots], [], True)


def below(node: int, parents: list[int], own: list[int]) -> int:
    return own[node] + sum(below(c, parents, own) for c, p in enumerate(parents) if p == node)


def inside(node: int, parents: list[int], lengths: list[int], own: list[int]) -> int:
    """Keys at or below `node` that some row sees."""
    if not below(node, parents, own):
        return 0
    return lengths[node] + sum(inside(c, parents, lengths, own) for c, p in enumerate(parents) if p == node)


@st.composite
def small_trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    size = draw(st.integers(1, 12))
    parents = [draw(st.integers(max(-1, i - 4), i - 1)) for i in range(size)]
    lengths = [draw(st.sampled_from([1, 1, 2, 5, 9, 40, 150, 2000])) for _ in range(size)]
    rows = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=24))
    return parents, lengths, rows


def _cheapest_cost(tree: tuple[list[int], list[int], list[int]], cost: CostModel) -> float:
    forest, nodes, positions = trees.lay_out(tree)
    paths = walk_paths(forest, nodes, positions, cost.least_run)
    price, depth = cost.partial * cost.group, len(paths.walk)
    return float(partition(paths.walk, paths.keys, cost.mix, *cost.columns(), price, depth)[0][0, 0])


SHIPPED = [
    replace(cost, programs=1, tiles=tuple(replace(tile, programs=0) for tile in cost.tiles))
    for kv_heads, group in ((32, 1), (8, 4), (1, 16))
    for cost in cost_models(torch.device("cpu"), Geometry(kv_heads, group, 128, 128, torch.bfloat16))
]
"""Of the H100; with one program, a plan's cost is the sum of its units'."""


@pytest.mark.parametrize(("rows", "widest"), [(1, 16), (60, 64), (100, 128)])
def test_there_is_no_launch_for_tiles_wider_than_any_unit(rows: int, widest: int) -> None:
    tiles = TileCost(16, 1.0, 1.0), TileCost(64, 1.5, 1.0), TileCost(128, 2.0, 1.0)
    cost = CostModel(tiles=tiles, launch=3.0, partial=9.0, mix=True)
    assert plan(*trees.lay_out(trees.shared_prefix(rows, 64, 1)), cost=cost).tile_rows == widest


def test_large_heads_run_in_half_as_many_programs_of_twice_the_speed() -> None:
    usual, large = (cost_models(torch.device("cpu"), Geometry(4, 2, dim, dim, torch.bfloat16)) for dim in (128, 256))
    for one, other in zip(usual, large, strict=True):
        assert other.programs == one.programs // 2
        for tile, twice in zip(one.tiles, other.tiles, strict=True):
            assert twice.programs == tile.programs // 2 and twice.key == pytest.approx(tile.key)
        assert other.reads(1000, 1000) == pytest.approx(2 * one.reads(1000, 1000))


@given(small_trees(), st.sampled_from([cost for cost in COSTS if cost.programs == 1] + SHIPPED))
@settings(max_examples=600, deadline=None)
def test_the_partition_costs_the_least_of_all(tree, cost) -> None:
    own = [tree[2].count(node) for node in range(len(tree[0]))]
    found = plan(*trees.lay_out(tree), cost=cost)
    least = least_cost(tree[0], tree[1], own, cost)
    if any(tile.mixed for tile in cost.tiles):
        # A run's keys are charged as mixed, though all of its rows may see some of them.
        assert modelled_cost(found, cost) <= least + 1e-6
    else:
        assert modelled_cost(found, cost) == pytest.approx(least)
    chosen = _cheapest_cost(tree, cost)
    assert chosen == pytest.approx(least)


@given(forests(), st.sampled_from(COSTS))
@settings(max_examples=150, deadline=None)
def test_no_other_way_is_cheaper(case, cost) -> None:
    forest, nodes, _ = case
    nodes = nodes[forest.lengths[nodes] > 0]
    if not nodes.size:
        return
    ends = (forest.starts + forest.lengths - 1)[nodes]
    cost = replace(cost, programs=1)
    auto, *others = [modelled_cost(plan(forest, nodes, ends, mode=mode, cost=cost), cost) for mode in PLAN_MODES]
    assert auto <= min(others) + 1e-6


@pytest.mark.parametrize("mode", ["auto", "unshared", "naive"])
def test_rows_all_along_a_long_chain(mode) -> None:
    size, step = 5_000, 250
    ones, ids = np.ones(size, np.int32), np.arange(size, dtype=np.int32)
    forest = Forest(ids - 1, ids, ones, np.arange(size + 1), 2 * ids.astype(np.int64), ones)
    rows = ids[step - 1 :: step][::-1].copy()
    found = plan(forest, rows, rows, mode=mode)
    assert found.row_positions.tolist() == sorted(rows.tolist())
    expected = [[(p, 2 * p) for p in range(last + 1)] for last in found.row_positions.tolist()]
    assert keys_read(found) == expected


def grown_tree() -> tuple[RadixTree, list[Lock]]:
    tree = RadixTree(ExtentPool(256))
    locks = [tree.insert([*range(20), 30 + i]) for i in range(4)]
    for lock in locks:
        for node in lock.held.path():
            if node.scheduled < node.known:
                tree.schedule(node, node.known - node.scheduled, reserve=6)
                tree.commit(node)
    return tree, locks


def decode_rows(locks: list[Lock]) -> StepRows:
    """The last token of each node."""
    nodes = [lock.held for lock in locks]
    return StepRows(
        np.array([n.id for n in nodes], np.int32),
        np.array([n.end - 1 for n in nodes], np.int32),
        np.concatenate([n.slots(n.known - 1, n.known) for n in nodes]),
        np.zeros(len(nodes), np.int32),
    )


def decode(tree: RadixTree, locks: list[Lock], token: int, reserve: int = 6) -> None:
    for lock in locks:
        node = tree.advance([lock], token)
        tree.schedule(node, 1, reserve)
        tree.commit(node)


def assert_same_reads(carried: Plan, fresh: Plan) -> None:
    assert keys_read(carried) == keys_read(fresh)
    assert np.array_equal(carried.row_order, fresh.row_order)


def test_a_plan_is_carried_over_while_only_lengths_grow() -> None:
    tree, locks = grown_tree()
    planner = Planner(tree)
    assert planner.plan(*decode_rows(locks)).rebuilt
    for step in range(5):
        decode(tree, locks, step)
        carried = planner.plan(*decode_rows(locks))
        assert not carried.rebuilt
        assert_same_reads(carried, Planner(tree).plan(*decode_rows(locks)))


@pytest.mark.parametrize("change", ["split", "branch", "new extent", "few rows left", "stand still"])
def test_a_plan_is_rebuilt_when_anything_else_changes(change: str) -> None:
    tree, locks = grown_tree()
    planner = Planner(tree)
    planner.plan(*decode_rows(locks))
    if change == "split":
        tree.insert(list(range(7)))
    if change == "branch":
        locks[0] = tree.lock(locks[0].held)
    if change == "new extent":
        tree.reclaim_reserves(tree.reserved_tokens)
        tree.pool.allocate(tree.pool.free // 2)
    if change == "few rows left":
        del locks[2:]
    if change != "stand still":
        decode(tree, locks, 5, reserve=0)
    rebuilt = planner.plan(*decode_rows(locks))
    assert rebuilt.rebuilt
    assert_same_reads(rebuilt, Planner(tree).plan(*decode_rows(locks)))


def test_explain_says_what_became_of_each_level() -> None:
    parents = np.array([-1, 0, 1, 1, 1], np.int32)
    lengths = np.array([400, 3, 20, 20, 20], np.int32)
    starts = np.array([0, 400, 403, 403, 403], np.int32)
    forest = Forest(parents, starts, lengths, np.arange(6), np.arange(5, dtype=np.int64) * 400, lengths)
    rows = np.array([2, 3, 4], np.int32)
    text = plan(forest, rows, starts[rows] + 19).explain(bytes_per_token=10)
    assert "3 rows" in text and "KV read 4,630 bytes; unshared 12,690 bytes; ratio 2.74" in text
    assert "level 0: 1 nodes, 403 tokens, 1 cut; rows below 3, read by 1 units" in text
    assert "level 1: 3 nodes, 60 tokens, 3 folded; rows below 1" in text


def test_long_chains_do_not_recurse() -> None:
    length = size(5_000, 100_000)
    tree = RadixTree(ExtentPool(length))
    lock = tree.insert([1])
    for _ in range(length - 1):
        other = tree.lock(lock.held)
        node = lock.held
        tree.advance([lock], 1)
        assert lock.held is not node
        tree.unlock(other)
    assert tree.num_nodes == length + 1
    for node in lock.held.path()[1:]:
        tree.schedule(node, 1)
        tree.commit(node)
    found = Planner(tree).plan(*decode_rows([lock]))
    assert found.num_units == 1 and found.kv_tokens_read == length
    tree.unlock(lock)
    assert tree.evict(length) == length and tree.num_nodes == 0


@settings(max_examples=100, deadline=None)
@given(forests(), st.sampled_from(COSTS), st.sampled_from(PLAN_MODES))
def test_rows_know_how_many_units_cover_them(
    drawn: tuple[Forest, np.ndarray, np.ndarray], cost: CostModel, mode: str
) -> None:
    forest, nodes, positions = drawn
    made = plan(forest, nodes, positions, mode=mode, cost=cost)
    covering = np.zeros(made.num_rows, int)
    for first, stop in made.unit_rows.tolist():
        covering[first:stop] += 1
    assert (made.row_extra == covering - 1).all()
    assert made.single == bool((covering == 1).all())


def test_a_chain_of_tiny_nodes_is_cut_now_and_then() -> None:
    """Each node is too small to pay for a unit; together they are not."""
    size, cost = 400, CostModel()
    lengths = np.full(size, 3, np.int32)
    forest = Forest(
        parents=np.arange(-1, size - 1, dtype=np.int32),
        starts=(np.arange(size) * 3).astype(np.int32),
        lengths=lengths,
        extent_offsets=np.arange(size + 1, dtype=np.int64),
        extent_starts=np.arange(size, dtype=np.int64) * 3,
        extent_lengths=lengths,
    )
    nodes = np.arange(size, dtype=np.int32)

    def price(mode: str) -> float:
        return modelled_cost(plan(forest, nodes, nodes * 3 + 2, mode=mode), cost)

    assert price("auto") < 0.5 * min(price("unshared"), price("naive"))
