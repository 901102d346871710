"""A plan as a few groups of padded units: tensors that a graph compiled once can take as its inputs.

A group holds units of similar size, padded to the same number of rows and keys. Units may be cut along their keys, into
pieces with partial results of their own, so that a step gathers at most `MOST_PADDING` times the keys of its plan. A
row's partial results are merged with the softmax of their log-sum-exps as weights.

`attend` has only operators that any tensor compiler knows: gather, matrix product, softmax. `radixgen.kernels.
torch_backend` computes the same faster, from tables of any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding

from radixgen.core import Plan, first_seen
from radixgen.core.plan import Int64Array
from radixgen.kernels.merge import apply_sinks

MOST_PADDING = 1.1
"""Maximum of gathered keys, padding included, per key of the plan."""
HIDDEN = -1e30
"""Added to the score of a hidden key. Finite, so that rows without visible keys give no NaN."""

_PIECES = (1 << 31, 256, 64, 16, 4, 1)
"""Keys of a piece at most, in the order in which they are tried. The last one pads nothing."""
_GATHER_COST = 8
"""Cost of gathering a key, in rows that attend to it."""


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Pieces of units, padded to the same number of rows and keys."""

    rows: Int64Array
    """`[pieces, rows]`: rows of the plan, padded with the piece's first row."""
    slots: Int64Array
    """`[pieces, keys]`: padded with the piece's first slot."""
    bias: NDArray[np.float32]
    """`[pieces, rows, keys]`: 0, or `HIDDEN` where the row does not see the key."""


@dataclass(frozen=True, slots=True)
class UnitTables:
    """The attention of one step."""

    groups: tuple[UnitGroup, ...]
    """Some may hold no piece."""
    partials: Int64Array
    """`[rows, most]`: the partial results of each row among those of all groups, each group's as `[pieces, rows]`,
    counted from 1. Rows with fewer are padded with 0.
    """

    @property
    def kv_tokens_read(self) -> int:
        """Keys gathered, padding included."""
        return sum(group.slots.size for group in self.groups)


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of all units, one after the other. Arrays are `[keys]`."""

    slots: Int64Array
    positions: Int64Array
    seen_from: Int64Array
    seen_to: Int64Array
    """Rows `[seen_from, seen_to)` see the key, if it is not after them."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Arrays are `[pieces]`."""

    first_row: Int64Array
    num_rows: Int64Array
    first_key: Int64Array
    num_keys: Int64Array

    def pick(self, index: Int64Array) -> "_Pieces":
        return _Pieces(self.first_row[index], self.num_rows[index], self.first_key[index], self.num_keys[index])


def lay_out_groups(plan: Plan, num_groups: int) -> UnitTables:
    """Lay out `plan`, already trimmed to the layer's window, in `num_groups` groups. No unit may choose blocks."""
    assert not plan.selects
    keys = _flatten(plan)
    for most in _PIECES:
        pieces = _cut(plan, most)
        members = _group(pieces, num_groups)
        gathered = sum(index.size * int(pieces.num_keys[index].max(initial=0)) for index in members)
        if gathered <= MOST_PADDING * keys.slots.size:
            break
    groups = [pieces.pick(index) for index in members]
    tables = tuple(_pad(plan, keys, group) for group in groups)
    return UnitTables(tables, _partials(plan.num_rows, groups))


def _flatten(plan: Plan) -> _Keys:
    lengths = plan.segment_lengths
    segment = np.repeat(np.arange(lengths.size), lengths)
    within = np.arange(segment.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = plan.segment_rows[segment].astype(np.int64)
    return _Keys(
        plan.segment_starts[segment] + within, plan.segment_positions[segment] + within, rows[:, 0], rows[:, 1]
    )


def _cut(plan: Plan, most: int) -> _Pieces:
    """Cut units into pieces of at most `most` keys."""
    ends = np.concatenate([[0], np.cumsum(plan.segment_lengths, dtype=np.int64)])
    begins, stops = ends[plan.unit_segments[:, 0]], ends[plan.unit_segments[:, 1]]
    counts = -(-(stops - begins) // most)
    unit = np.repeat(np.arange(plan.num_units), counts)
    turn = np.arange(unit.size) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = plan.unit_rows[unit].astype(np.int64)
    first = begins[unit] + turn * most
    return _Pieces(rows[:, 0], rows[:, 1] - rows[:, 0], first, np.minimum(most, stops[unit] - first))


def _group(pieces: _Pieces, num_groups: int) -> list[Int64Array]:
    """Divide pieces into groups, each an array of indices: equal sizes first, then the two neighbours whose padding
    costs least are joined until there are few enough.
    """
    row_class = np.ceil(np.log2(np.maximum(pieces.num_rows, 1))).astype(np.int64)
    fine = np.maximum(pieces.num_keys // 32, 1)
    key_class = -(-pieces.num_keys // fine) * fine
    order = np.lexsort((key_class, row_class))
    new = np.flatnonzero(np.diff(row_class[order], prepend=-1) | np.diff(key_class[order], prepend=-1))
    count = np.diff(np.append(new, order.size))
    if not new.size:
        return [order] * num_groups
    rows = np.maximum.reduceat(pieces.num_rows[order], new)
    keys = np.maximum.reduceat(pieces.num_keys[order], new)
    while count.size > num_groups:
        joined = (count[1:] + count[:-1], np.maximum(rows[1:], rows[:-1]), np.maximum(keys[1:], keys[:-1]))
        cost = count * keys * (_GATHER_COST + rows)
        added = joined[0] * joined[2] * (_GATHER_COST + joined[1]) - cost[1:] - cost[:-1]
        best = int(np.argmin(added))
        for array, value in zip((count, rows, keys), joined, strict=True):
            array[best] = value[best]
        count, rows, keys = (np.delete(array, best + 1) for array in (count, rows, keys))
    members = np.split(order, np.cumsum(count)[:-1])
    return members + [order[:0]] * (num_groups - len(members))


def _pad(plan: Plan, keys: _Keys, pieces: _Pieces) -> UnitGroup:
    ranks, columns = (np.arange(sizes.max(initial=1)) for sizes in (pieces.num_rows, pieces.num_keys))
    first = pieces.first_row[:, None]
    rows = np.where(ranks < pieces.num_rows[:, None], first + ranks, first)
    real = columns < pieces.num_keys[:, None]
    key = np.where(real, pieces.first_key[:, None] + columns, pieces.first_key[:, None])
    row, position = rows[:, :, None], plan.row_positions[rows][:, :, None]
    key_position = keys.positions[key][:, None]
    seen = real[:, None] & (key_position <= position)
    seen &= (keys.seen_from[key][:, None] <= row) & (row < keys.seen_to[key][:, None])
    if plan.window is not None:
        seen &= key_position >= first_seen(plan.window, position)
    return UnitGroup(rows, keys.slots[key], np.where(seen, np.float32(0), np.float32(HIDDEN)))


def _partials(num_rows: int, groups: Sequence[_Pieces]) -> Int64Array:
    places, owners, begin = [], [], 1
    for group in groups:
        width = int(group.num_rows.max(initial=1))
        real = np.arange(width) < group.num_rows[:, None]
        places.append(begin + np.flatnonzero(real))
        owners.append((group.first_row[:, None] + np.arange(width))[real])
        begin += real.size
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    owner, place = owner[order], np.concatenate(places)[order]
    turn = np.arange(owner.size) - np.searchsorted(owner, owner)
    partials = np.zeros((num_rows, int(turn.max(initial=0)) + 1), np.int64)
    partials[owner, turn] = place
    return partials


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Sequence[Tensor],
    slots: Sequence[Tensor],
    bias: Sequence[Tensor],
    partials: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all rows, in the plan's order.

    q `[rows, q_heads, head_dim]`; k `[kv_heads, slots, head_dim]` and v `[kv_heads, slots, v_head_dim]`, in q's dtype;
    `rows`, `slots`, `bias` and `partials` are those of `UnitTables`. Scores are multiplied by `scale`, then capped:
    `softcap * tanh(score / softcap)`. `sinks [q_heads]`: one logit per head that takes weight and has no value.

    Returns `out [rows, q_heads, v_head_dim]` and `lse [rows, q_heads]` (natural log, without sinks), in q's dtype. For
    a row that sees no key, `out` is undefined, and `lse` near `HIDDEN`.
    """
    (num_rows, q_heads, head_dim), (kv_heads, num_slots, v_head_dim) = q.shape, v.shape
    group = q_heads // kv_heads
    queries = (q * scale).view(num_rows, kv_heads, group * head_dim).transpose(0, 1).reshape(-1, head_dim)
    keys, values = k.reshape(-1, head_dim), v.reshape(-1, v_head_dim)
    outs = [q.new_zeros(kv_heads, 1, group * v_head_dim)]
    tops = [q.new_full((kv_heads, 1, group), HIDDEN)]
    totals = [q.new_ones(kv_heads, 1, group)]
    for unit_rows, unit_slots, hidden in zip(rows, slots, bias, strict=True):
        pieces, height, width = hidden.shape
        row = (unit_rows.unsqueeze(2) * group + torch.arange(group, device=q.device)).view(pieces, height * group)
        row, slot = _of_each_head(row, kv_heads, num_rows * group), _of_each_head(unit_slots, kv_heads, num_slots)
        scores = embedding(row, queries) @ embedding(slot, keys).transpose(2, 3)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        each = hidden.unsqueeze(2).expand(pieces, height, group, width)
        scores = scores + each.reshape(pieces, height * group, width)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top)
        outs.append((weights @ embedding(slot, values)).view(kv_heads, pieces * height, group * v_head_dim))
        tops.append(top.view(kv_heads, pieces * height, group))
        totals.append(weights.sum(-1).view(kv_heads, pieces * height, group))
    out, lse = _merge(torch.cat(outs, 1), torch.cat(tops, 1), torch.cat(totals, 1), partials)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return out, lse


def _of_each_head(index: Tensor, heads: int, stride: int) -> Tensor:
    """Return `index` `[...]` for heads that are `stride` apart, `[heads, ...]`."""
    first = torch.arange(heads, device=index.device) * stride
    return index.unsqueeze(0) + first.view(heads, *[1] * index.ndim)


def _merge(outs: Tensor, tops: Tensor, totals: Tensor, partials: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results: outs `[kv_heads, n, group * v_head_dim]`, not yet divided by totals `[kv_heads, n,
    group]`, the sums of exponentials of scores less tops `[kv_heads, n, group]`.
    """
    kv_heads, count, group = tops.shape
    num_rows, most = partials.shape
    index = _of_each_head(partials, kv_heads, count)
    top = embedding(index, tops.reshape(kv_heads * count, group))
    highest = top.amax(2)
    shares = torch.exp(top - highest.unsqueeze(2))
    total = (shares * embedding(index, totals.reshape(kv_heads * count, group))).sum(2)
    out = embedding(index, outs.reshape(kv_heads * count, -1)).view(kv_heads, num_rows, most, group, -1)
    out = (shares.unsqueeze(4) * out).sum(2) / total.unsqueeze(3)
    lse = highest + torch.log(total)
    rows = out.transpose(0, 1).reshape(num_rows, kv_heads * group, -1)
    return rows, lse.transpose(0, 1).reshape(num_rows, kv_heads * group)
