"""Units that choose blocks, for rows that read under `TopBlocks`.

The blocks among which rows choose are withheld from the forest, so that the planner deals with all other keys as ever.
Then each run of nodes with the same rows below gets one more unit, whose rows choose together among these blocks. Rows
under different policies do not choose together: each policy has nodes of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from radixgen.core import Plan
from radixgen.core.compiled import compiled
from radixgen.core.plan import BLOCK, Int32Array, Int64Array, consecutive_ranges
from radixgen.core.reading import ReadingPolicy, TopBlocks
from radixgen.kernels.block_work import MOST_CANDIDATES
from radixgen.scheduler.forest import Forest

Number = TypeVar("Number", bound=np.generic)

LEAST_CANDIDATES = 16
"""Rows read fewer blocks exactly, which takes less time than choosing among them."""


@dataclass(frozen=True, slots=True)
class WithheldBlocks:
    """Blocks among which rows choose. The rows at or below node `tops[i]` choose among the blocks `[offsets[i],
    offsets[i + 1])`.
    """

    forest: Forest
    """Without these blocks."""
    row_nodes: Int32Array
    """`[rows]`: each row's node in it."""
    tops: Int64Array
    offsets: Int64Array
    blocks: Int64Array
    positions: Int64Array
    """`[blocks]`: position of a block's first key, ascending among those of a top."""
    chosen: Int64Array
    """`[tops]`: blocks that a KV head reads on average."""


def withhold_blocks(
    forest: Forest,
    row_nodes: Int32Array,
    row_positions: Int32Array,
    row_policies: Int32Array,
    policies: Sequence[ReadingPolicy],
    row_slots: Int64Array,
) -> WithheldBlocks | None:
    """Withhold the blocks among which rows choose from `forest`; None if there are none.

    `row_nodes`, `row_positions`, `row_policies`, `row_slots` `[rows]`: each row's node, its position, the policy, of
    `policies`, that it reads under, and the slot that it writes, -1 if none.

    A block is withheld if it lies in one extent, none of its keys is written in this step, and all rows at or below its
    node read under the same `TopBlocks`, which neither counts it as a sink nor as recent for any of them.
    """
    kinds = np.array([isinstance(policy, TopBlocks) for policy in policies])
    groups = np.where(kinds[row_policies], row_policies, -1).astype(np.int64)
    if groups.max(initial=-1) < 0:
        return None
    forest, row_nodes, node_groups = _separate(forest, row_nodes, groups)
    chosen = [policy if isinstance(policy, TopBlocks) else TopBlocks() for policy in policies]
    written = np.unique(row_slots[row_slots >= 0] // BLOCK)
    tops, found = _candidates(
        forest.parents, node_groups, row_nodes, row_positions, np.array([(p.sinks, p.recent) for p in chosen]),
        forest.extent_offsets.astype(np.int64), forest.extent_starts.astype(np.int64), forest.extent_lengths,
        forest.positions.astype(np.int64), written,
    )  # fmt: skip
    counts = np.bincount(tops[found[:, 0]], minlength=tops.size)
    wanted = np.ceil(np.array([policy.budget for policy in chosen])[node_groups] * counts).astype(np.int64)
    pays = (counts >= LEAST_CANDIDATES) & (wanted < counts)
    found = found[pays[tops[found[:, 0]]]]
    if not len(found):
        return None
    edited = _take_out(forest, found)
    found = found[np.argsort(tops[found[:, 0]], kind="stable")]
    chosen_tops, begins = np.unique(tops[found[:, 0]], return_index=True)
    offsets = np.append(begins, len(found))
    return WithheldBlocks(edited, row_nodes, chosen_tops, offsets, found[:, 1], found[:, 2], wanted[chosen_tops])


def _take_out(forest: Forest, blocks: Int64Array) -> Forest:
    """Return `forest` without `blocks` `[blocks, 3]`: node, block and position, ordered by node and position."""
    slots, keys, positions, offsets = _without(
        forest.extent_offsets.astype(np.int64), forest.extent_starts.astype(np.int64), forest.extent_lengths,
        forest.positions.astype(np.int64), blocks,
    )  # fmt: skip
    return replace(
        forest,
        lengths=np.diff(np.append(0, np.cumsum(keys))[offsets]).astype(np.int32),
        extent_offsets=offsets,
        extent_starts=slots,
        extent_lengths=keys.astype(np.int32),
        extent_positions=positions.astype(np.int32),
    )


def add_choosing_units(plan: Plan, withheld: WithheldBlocks) -> Plan:
    """Return `plan`, made for the forest without these blocks, with units that choose among them."""
    units, segments = _choosing_units(plan, withheld)
    over = np.zeros(plan.num_rows + 1, np.int32)
    np.add.at(over, units[:, 0], 1)
    np.add.at(over, units[:, 1], -1)
    last = int(plan.unit_rank.max(initial=0))
    return replace(
        plan,
        row_extra=plan.row_extra + np.cumsum(over[:-1], dtype=np.int32),
        unit_rows=_append(plan.unit_rows, units[:, :2]),
        unit_segments=_append(plan.unit_segments, units[:, 2:4]),
        unit_rank=_append(plan.unit_rank, np.arange(last + 1, last + 1 + len(units))),
        unit_cost=_append(plan.unit_cost, np.zeros(len(units))),
        unit_blocks=_append(plan.unit_blocks, units[:, 4]),
        segment_starts=_append(plan.segment_starts, segments[:, 0]),
        segment_lengths=_append(plan.segment_lengths, segments[:, 1]),
        segment_positions=_append(plan.segment_positions, segments[:, 2]),
        segment_rows=_append(plan.segment_rows, segments[:, 3:]),
        segment_room=_append(plan.segment_room, np.zeros(len(segments))),
        _windowed={},
    )


def _choosing_units(plan: Plan, withheld: WithheldBlocks) -> tuple[Int64Array, Int64Array]:
    """Return the units that are added to `plan`: rows, segments and blocks to choose, `[units, 5]`; and their segments:
    first slot, keys, first position and rows, `[segments, 5]`.
    """
    first, count = _row_ranges(withheld.forest.parents, withheld.row_nodes, plan.row_order)
    units: list[tuple[int, ...]] = []
    segments: list[Int64Array] = []
    num_segments = len(plan.segment_starts)
    for top, begin, end, share in _unit_blocks(withheld):
        mine = _segments(withheld.blocks[begin:end], withheld.positions[begin:end])
        rows = int(first[top]), int(first[top] + count[top])
        units.append((*rows, num_segments, num_segments + len(mine), share))
        segments.append(np.concatenate([mine, np.repeat([rows], len(mine), axis=0)], axis=1))
        num_segments += len(mine)
    return np.array(units, np.int64), np.concatenate(segments)


def _unit_blocks(withheld: WithheldBlocks) -> Iterator[tuple[int, int, int, int]]:
    """Yield a unit's top, the range of its blocks, of `MOST_CANDIDATES` at most, and how many of them it chooses."""
    columns = withheld.tops, withheld.offsets[:-1], withheld.offsets[1:], withheld.chosen
    for top, begin, end, chosen in np.stack(columns, axis=1).tolist():
        parts = -(-(end - begin) // MOST_CANDIDATES)
        bounds = np.linspace(begin, end, parts + 1).astype(np.int64)
        for low, high in pairwise(bounds.tolist()):
            yield top, low, high, -(-chosen * (high - low) // (end - begin))


def _append(array: NDArray[Number], more: NDArray[Any]) -> NDArray[Number]:
    return np.concatenate([array, more.astype(array.dtype)])


def _segments(blocks: Int64Array, positions: Int64Array) -> Int64Array:
    """Join blocks that follow each other: first slot, keys and first position, `[segments, 3]`."""
    ranges = consecutive_ranges(blocks * BLOCK, positions, step=BLOCK)
    first = ranges[:, 0]
    return np.stack([blocks[first] * BLOCK, np.diff(ranges)[:, 0] * BLOCK, positions[first]], axis=1)


def _separate(forest: Forest, row_nodes: Int32Array, groups: Int64Array) -> tuple[Forest, Int32Array, Int64Array]:
    """Return a forest in which rows of different `groups` `[rows]` have no node in common; each row's node in it; and
    each node's group.
    """
    kinds = np.unique(groups)
    if kinds.size == 1:
        return forest, row_nodes, np.full(forest.parents.size, kinds[0])
    used = np.stack([_used(forest.parents, row_nodes[groups == kind]) for kind in kinds.tolist()])
    shared = used.sum(0) > 1
    places = np.cumsum(used).reshape(used.shape) - 1
    owner = np.nonzero(used)[1]
    of_rows = places[np.searchsorted(kinds, groups), row_nodes].astype(np.int32)
    above = [np.where(forest.parents[nodes] >= 0, place[forest.parents[nodes]], -1)
             for place, nodes in zip(places, map(np.flatnonzero, used), strict=True)]  # fmt: skip
    counts = np.diff(forest.extent_offsets)[owner]
    offsets = np.append(0, np.cumsum(counts))
    extent = np.arange(int(offsets[-1])) + np.repeat(forest.extent_offsets[:-1][owner] - offsets[:-1], counts)
    rooms = None if forest.rooms is None else np.where(shared, -1, forest.rooms)[owner].astype(np.int32)
    apart = Forest(
        parents=np.concatenate(above).astype(np.int32),
        starts=forest.starts[owner],
        lengths=forest.lengths[owner],
        extent_offsets=offsets,
        extent_starts=forest.extent_starts[extent],
        extent_lengths=forest.extent_lengths[extent],
        rooms=rooms,
        extent_positions=forest.positions[extent],
    )
    return apart, of_rows, np.repeat(kinds, used.sum(1))


@compiled
def _used(parents: Int32Array, row_nodes: Int32Array) -> NDArray[np.bool_]:
    """Return which nodes have one of these rows at or below them."""
    used = np.zeros(parents.size, np.bool_)
    for row in range(row_nodes.size):
        node = row_nodes[row]
        while node >= 0 and not used[node]:
            used[node] = True
            node = parents[node]
    return used


@compiled
def _candidates(
    parents: Int32Array, groups: Int64Array, row_nodes: Int32Array, row_positions: Int32Array, policies: Int64Array,
    offsets: Int64Array, slots: Int64Array, keys: Int32Array, positions: Int64Array, written: Int64Array,
) -> tuple[Int64Array, Int64Array]:  # fmt: skip
    """Return the highest node at or above each node that has the same rows at or below it, `[nodes]`; and the blocks
    that may be withheld: node, block and position of its first key, `[blocks, 3]`.

    `policies` `[policies, 2]`: sinks and recent tokens. `written`: blocks written in this step, ascending.
    """
    count = parents.size
    below, lowest = np.zeros(count, np.int64), np.full(count, np.iinfo(np.int64).max)
    for row in range(row_nodes.size):
        below[row_nodes[row]] += 1
        lowest[row_nodes[row]] = min(lowest[row_nodes[row]], row_positions[row])
    for node in range(count - 1, -1, -1):
        if parents[node] >= 0:
            below[parents[node]] += below[node]
            lowest[parents[node]] = min(lowest[parents[node]], lowest[node])
    tops = np.arange(count)
    most = 0
    for node in range(count):
        if parents[node] >= 0 and below[node] == below[parents[node]]:
            tops[node] = tops[parents[node]]
        for extent in range(offsets[node], offsets[node + 1]):
            most += keys[extent] // BLOCK + 1
    found, made = np.empty((most, 3), np.int64), 0
    for node in range(count):
        if groups[node] < 0 or below[node] == 0:
            continue
        first, stop = policies[groups[node], 0], lowest[node] + 1 - policies[groups[node], 1]
        for extent in range(offsets[node], offsets[node + 1]):
            ahead = slots[extent] - positions[extent]
            low, high = max(first, positions[extent]) + ahead, min(stop, positions[extent] + keys[extent]) + ahead
            for block in range((low + BLOCK - 1) // BLOCK, high // BLOCK):
                at = np.searchsorted(written, block)
                if at == written.size or written[at] != block:
                    found[made, 0], found[made, 1], found[made, 2] = node, block, block * BLOCK - ahead
                    made += 1
    return tops, found[:made]


@compiled
def _without(
    offsets: Int64Array, slots: Int64Array, keys: Int32Array, positions: Int64Array, found: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Return the extents of each node without the blocks `found` `[blocks, 3]`, which are ordered by node and position:
    first slots, keys, positions `[extents]`, and offsets `[nodes + 1]`.
    """
    table, made, at = np.empty((slots.size + len(found), 3), np.int64), 0, 0
    new_offsets = np.zeros(offsets.size, np.int64)
    for node in range(offsets.size - 1):
        for extent in range(offsets[node], offsets[node + 1]):
            slot, position, end = slots[extent], positions[extent], positions[extent] + keys[extent]
            while at < len(found) and found[at, 0] == node and position <= found[at, 2] < end:
                if found[at, 2] > position:
                    table[made, 0], table[made, 1], table[made, 2] = slot, found[at, 2] - position, position
                    made += 1
                slot, position = slot + found[at, 2] - position + BLOCK, found[at, 2] + BLOCK
                at += 1
            if position < end:
                table[made, 0], table[made, 1], table[made, 2] = slot, end - position, position
                made += 1
        new_offsets[node + 1] = made
    return table[:made, 0].copy(), table[:made, 1].copy(), table[:made, 2].copy(), new_offsets


@compiled
def _row_ranges(parents: Int32Array, row_nodes: Int32Array, row_order: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the first row at or below each node, in the plan's order, and their number, `[nodes]`."""
    first, count = np.full(parents.size, row_nodes.size, np.int64), np.zeros(parents.size, np.int64)
    for place in range(row_order.size):
        node = row_nodes[row_order[place]]
        first[node] = min(first[node], place)
        count[node] += 1
    for node in range(parents.size - 1, -1, -1):
        if parents[node] >= 0:
            first[parents[node]] = min(first[parents[node]], first[node])
            count[parents[node]] += count[node]
    return first, count
