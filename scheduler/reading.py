"""Reading policies of position: edits the forest of a step so that each row's path has the keys that the row reads.

Keys that all rows at or below a node read stay in the highest such node. Where rows below a node read differently,
those that read alike get a node of their own below it, which has the keys of the nodes above that only they read. So
the planner shares reads as ever, and kernels know nothing of policies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core.compiled import compiled, inlined
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.core.reading import PositionPolicy, ReadingPolicy
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.revise import RowUpdates, StepRows

_END = 2**31 - 1
_NOBODY, _DIFFERS = -1, -2


class Views(NamedTuple):
    """The key positions that rows read. Rows with one view read the same, each up to its own position."""

    of_rows: Int32Array
    """`[rows]`: view of each row."""
    ranges: Int64Array
    """`[ranges, 2]`: half-open ranges of positions, ascending and disjoint within a view."""
    offsets: Int64Array
    """`[views + 1]`: view `i` is the ranges `[offsets[i], offsets[i + 1])`."""
    left: Int64Array
    """`[rows]`: positions after the row's own that have the same view."""


def row_views(policies: Sequence[ReadingPolicy], row_policies: Int32Array, row_positions: Int32Array) -> Views | None:
    """Return the views of rows at `row_positions` `[rows]` under the policies with these indices `[rows]`, or None if
    every row reads all keys.
    """
    sizes = _block_sizes(policies, row_policies)
    if not sizes.any():
        return None
    block = row_positions // np.maximum(sizes, 1)
    kinds, of_rows = np.unique(np.where(sizes > 0, [row_policies, block], -1), axis=1, return_inverse=True)
    ranges = [_visible(policies, *kind) for kind in kinds.T.tolist()]
    return Views(
        of_rows.reshape(-1).astype(np.int32),
        np.concatenate(ranges),
        np.cumsum([0, *(len(part) for part in ranges)]),
        _positions_left(sizes, row_positions),
    )


def keep_views(
    policies: Sequence[ReadingPolicy], old: StepRows, rows: StepRows, updates: RowUpdates
) -> RowUpdates | None:
    """Return `updates`, from the rows `old` to `rows`, with no room beyond where rows read the same keys; None if some
    of `rows` read other keys already.
    """
    left = _positions_left(_block_sizes(policies, old.policies), old.positions)
    if not np.array_equal(old.policies[updates.kept], rows.policies) or not left[updates.kept].all():
        return None
    return updates._replace(rooms=np.minimum(updates.rooms, left - 1).astype(np.int32))


def _block_sizes(policies: Sequence[ReadingPolicy], row_policies: Int32Array) -> Int64Array:
    """Return the block size of each row's policy, 0 of one that reads all keys."""
    used, of_rows = np.unique(row_policies, return_inverse=True)
    chosen = [policies[index] for index in used.tolist()]
    return np.array([p.block if isinstance(p, PositionPolicy) else 0 for p in chosen], np.int64)[of_rows]


def _positions_left(sizes: Int64Array, positions: Int32Array) -> Int64Array:
    """Return how many positions follow each of `positions` in its block of this size."""
    return np.where(sizes > 0, sizes - 1 - positions % np.maximum(sizes, 1), _END)


def _visible(policies: Sequence[ReadingPolicy], policy: int, block: int) -> Int64Array:
    chosen = policies[policy]
    if policy < 0 or not isinstance(chosen, PositionPolicy):
        return np.array([(0, _END)], np.int64)
    return chosen.visible(block)


class _EditedNodes(NamedTuple):
    """The nodes of an edited forest, parents first: each node of the old one, then those that were added below it."""

    place: Int64Array
    """`[old nodes]`: its number now."""
    added: Int64Array
    """`[added]`, ascending: `node * views + view` of a node that was added below the old `node`, for rows with a
    `view`.
    """
    added_place: Int64Array
    """`[added]`: its number."""
    anchors: Int64Array
    """`[nodes]`: the old node that it is, or below which it was added."""
    is_added: NDArray[np.bool_]
    """`[nodes]`"""
    parents: Int64Array
    """`[nodes]`"""


def restrict(forest: Forest, row_nodes: Int32Array, views: Views) -> tuple[Forest, Int32Array]:
    """Return a forest in which the path of each row has exactly the keys that the row reads, and those after the row;
    and each row's node in it.

    `row_nodes` `[rows]`: nodes in `forest`.
    """
    count, parents = views.offsets.size - 1, forest.parents.astype(np.int64)
    pairs = row_nodes.astype(np.int64) * count + views.of_rows
    used = np.unique(pairs)
    sole, bounds, ranges = _common(parents, used // count, used % count, views.offsets, views.ranges.astype(np.int64))
    nodes = _add_nodes(parents, used, sole, count)
    own = nodes.added % count
    reads = np.empty((nodes.parents.size, 2), np.int64)
    reads[nodes.place] = bounds
    reads[nodes.added_place] = np.stack([views.offsets[own], views.offsets[own + 1]], axis=1)
    apart = sole[row_nodes] == _DIFFERS
    new_rows = nodes.place[row_nodes]
    new_rows[apart] = nodes.added_place[np.searchsorted(nodes.added, pairs[apart])]
    rooms = np.full(nodes.parents.size, -1, np.int32)
    rooms[nodes.place] = 0 if forest.rooms is None else forest.rooms
    np.minimum.at(rooms, new_rows, views.left)
    return _edited_forest(forest, nodes, reads, ranges, rooms), new_rows.astype(np.int32)


def _add_nodes(parents: Int64Array, used: Int64Array, sole: Int64Array, count: int) -> _EditedNodes:
    """Add a node below each one that several of `count` views read, for the rows with one view: its own rows, and those
    below children that only this view reads.

    `used`: `node * count + view` of the rows; `sole`: as `_common` returns it.
    """
    apart = sole[used // count] == _DIFFERS
    below = np.flatnonzero((parents >= 0) & (sole >= 0))
    below = below[sole[parents[below]] == _DIFFERS]
    wanted = parents[below] * count + sole[below]
    added = np.unique(np.concatenate([used[apart], wanted]))
    owner = added // count
    place = np.arange(parents.size) + np.searchsorted(owner, np.arange(parents.size))
    added_place = owner + np.arange(owner.size) + 1
    size = parents.size + owner.size
    anchors, is_added, new_parents = np.empty(size, np.int64), np.zeros(size, np.bool_), np.empty(size, np.int64)
    anchors[place], anchors[added_place] = np.arange(parents.size), owner
    is_added[added_place] = True
    above = np.where(parents >= 0, place[parents], -1)
    above[below] = added_place[np.searchsorted(added, wanted)]
    new_parents[place], new_parents[added_place] = above, place[owner]
    return _EditedNodes(place, added, added_place, anchors, is_added, new_parents)


def _edited_forest(
    forest: Forest, nodes: _EditedNodes, reads: Int64Array, ranges: Int64Array, rooms: Int32Array
) -> Forest:
    """Return the forest of these nodes, each with the keys in `ranges[reads[i, 0] : reads[i, 1]]` that its parent does
    not have. `reads` `[nodes, 2]`; `rooms` `[nodes]`.
    """
    starts, ends = forest.starts.astype(np.int64), _ends(forest)
    slots, keys, positions, offsets = _keys(
        nodes.anchors, nodes.is_added, nodes.parents, reads, ranges, forest.parents.astype(np.int64), starts, ends,
        forest.extent_offsets.astype(np.int64), forest.extent_starts.astype(np.int64),
        forest.extent_lengths.astype(np.int64), forest.positions.astype(np.int64),
    )  # fmt: skip
    return Forest(
        parents=nodes.parents.astype(np.int32),
        starts=np.where(nodes.is_added, ends[nodes.anchors], starts[nodes.anchors]).astype(np.int32),
        lengths=np.diff(np.append(0, np.cumsum(keys))[offsets]).astype(np.int32),
        extent_offsets=offsets,
        extent_starts=slots,
        extent_lengths=keys.astype(np.int32),
        rooms=rooms,
        extent_positions=positions.astype(np.int32),
    )


def _ends(forest: Forest) -> Int64Array:
    """Return the position after the last key of each node, `[nodes]`; its first position if it has none."""
    ends, keyed = forest.starts.astype(np.int64), np.diff(forest.extent_offsets) > 0
    last = forest.extent_offsets[1:][keyed] - 1
    ends[keyed] = forest.positions[last].astype(np.int64) + forest.extent_lengths[last]
    return ends


@compiled
def _common(
    parents: Int64Array, pair_nodes: Int64Array, pair_views: Int64Array, offsets: Int64Array, ranges: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return for each node, given which views its own rows have: the view of all rows at or below it, `_NOBODY`
    without rows, `_DIFFERS` if there are several `[nodes]`; the bounds `[nodes, 2]`, in the ranges, of the positions
    that all these rows read; and `ranges`, extended by those that more than one view gives.
    """
    count = parents.size
    sole, bounds = np.full(count, _NOBODY, np.int64), np.zeros((count, 2), np.int64)
    made = len(ranges)
    for pair in range(pair_nodes.size):
        node, view = pair_nodes[pair], pair_views[pair]
        ranges, made = _meet(sole, bounds, ranges, made, node, view, offsets[view], offsets[view + 1])
    for node in range(count - 1, -1, -1):
        if parents[node] >= 0 and sole[node] != _NOBODY:
            first, stop = bounds[node]
            ranges, made = _meet(sole, bounds, ranges, made, parents[node], sole[node], first, stop)
    return sole, bounds, ranges[:made]


@inlined
def _meet(
    sole: Int64Array, bounds: Int64Array, ranges: Int64Array, made: int, node: int, view: int, first: int, stop: int
) -> tuple[Int64Array, int]:
    """Let rows at or below `node` with this view read only the ranges `[first, stop)`. Returns the ranges, and how many
    there are.
    """
    if sole[node] == _NOBODY:
        sole[node], bounds[node, 0], bounds[node, 1] = view, first, stop
    elif view == _DIFFERS or sole[node] != view:
        a, a_stop, b, begin = bounds[node, 0], bounds[node, 1], first, made
        while made + a_stop - a + stop - b > len(ranges):
            ranges = np.concatenate((ranges, np.empty_like(ranges)))
        while a < a_stop and b < stop:
            low, high = max(ranges[a, 0], ranges[b, 0]), min(ranges[a, 1], ranges[b, 1])
            if low < high:
                ranges[made, 0], ranges[made, 1] = low, high
                made += 1
            if ranges[a, 1] < ranges[b, 1]:
                a += 1
            else:
                b += 1
        sole[node], bounds[node, 0], bounds[node, 1] = _DIFFERS, begin, made
    return ranges, made


@compiled
def _keys(
    anchors: Int64Array, is_added: NDArray[np.bool_], new_parents: Int64Array, reads: Int64Array, ranges: Int64Array,
    parents: Int64Array, starts: Int64Array, ends: Int64Array, offsets: Int64Array, slots: Int64Array,
    keys: Int64Array, positions: Int64Array,
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:  # fmt: skip
    """Return the extents of each new node: first slots, keys, positions, `[extents]`, and offsets `[nodes + 1]`.

    `anchors`: the node of which the new node is, or below which it was added (`is_added`). `reads` `[nodes, 2]`:
    bounds, in `ranges`, of what all rows at or below read. A node has what its parent's rows do not all read.
    """
    new_offsets = np.zeros(anchors.size + 1, np.int64)
    table, made = np.empty((slots.size + 64, 3), np.int64), 0
    for node in range(anchors.size):
        anchor, parent = anchors[node], new_parents[node]
        mine = ranges[reads[node, 0] : reads[node, 1]]
        if parent >= 0 and (reads[node, 0] != reads[parent, 0] or reads[node, 1] != reads[parent, 1]):
            more = _difference(mine, ranges[reads[parent, 0] : reads[parent, 1]])
            at = anchor if is_added[node] else parents[anchor]
            while at >= 0 and len(more):
                if starts[at] < more[-1, 1] and more[0, 0] < ends[at]:
                    table, made = _cut(more, offsets[at], offsets[at + 1], slots, keys, positions, table, made)
                at = parents[at]
        if not is_added[node]:
            table, made = _cut(mine, offsets[anchor], offsets[anchor + 1], slots, keys, positions, table, made)
        new_offsets[node + 1] = made
    return table[:made, 0].copy(), table[:made, 1].copy(), table[:made, 2].copy(), new_offsets


@compiled
def _difference(ranges: Int64Array, without: Int64Array) -> Int64Array:
    """Return the positions in `ranges` that are not in `without`, as ranges; both ascending and disjoint."""
    left, made, at = np.empty((len(ranges) + len(without), 2), np.int64), 0, 0
    for index in range(len(ranges)):
        low, high = ranges[index, 0], ranges[index, 1]
        while at < len(without) and without[at, 1] <= low:
            at += 1
        cut = at
        while cut < len(without) and without[cut, 0] < high:
            if low < without[cut, 0]:
                left[made, 0], left[made, 1] = low, without[cut, 0]
                made += 1
            low = without[cut, 1]
            cut += 1
        if low < high:
            left[made, 0], left[made, 1] = low, high
            made += 1
    return left[:made]


@compiled
def _cut(
    ranges: Int64Array, first: int, stop: int, slots: Int64Array, keys: Int64Array, positions: Int64Array,
    table: Int64Array, made: int,
) -> tuple[Int64Array, int]:  # fmt: skip
    """Append the keys at positions in `ranges` of the extents `[first, stop)`, ascending, to the table: first slot,
    keys, position. Returns the table, and how many rows it has.
    """
    at = 0
    for extent in range(first, stop):
        begin, end = positions[extent], positions[extent] + keys[extent]
        while at < len(ranges) and ranges[at, 1] <= begin:
            at += 1
        index = at
        while index < len(ranges) and ranges[index, 0] < end:
            low, high = max(begin, ranges[index, 0]), min(end, ranges[index, 1])
            if made == len(table):
                table = np.concatenate((table, np.empty_like(table)))
            table[made, 0], table[made, 1], table[made, 2] = slots[extent] + low - begin, high - low, low
            made += 1
            index += 1
    return table, made
