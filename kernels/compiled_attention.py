"""Attention of units with few rows and few keys on a CPU, and the merge: loops in place of many small operators.

Equal to the padded units of `radixgen.kernels.torch_backend` and to `radixgen.kernels.merge`, up to the order of sums.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan, first_seen
from radixgen.core.compiled import HAS_NUMBA, compiled, compiled_fast
from radixgen.core.plan import Int32Array, Int64Array
from radixgen.kernels.quantized import KV

Float32Array = NDArray[np.float32]
BitsArray = NDArray[np.uint32] | NDArray[np.uint16]

MOST_ROWS = 16
"""Maximum query-head rows of a unit per KV head; matrix products are faster for more."""
MOST_PRODUCTS = 1 << 18
"""Maximum products of a query and a key in one layer, which one thread computes: about 2 ms."""
_BITS = {torch.float32: (torch.int32, np.uint32, 0), torch.bfloat16: (torch.int16, np.uint16, 16)}
"""Of each dtype: integers of the same size, and how far they are shifted to be the bits of a float32."""


class CompiledUnits:
    """The units of a plan that read few keys."""

    def __init__(self, plan: Plan, units: Int64Array, keys: Int64Array, offsets: Int64Array) -> None:
        """Units `[n]`, ascending; keys and offsets `[units of the plan]`: how many each unit reads, and the index of
        its first partial result.
        """
        rows = np.diff(plan.unit_rows, axis=1)[:, 0]
        self._most_rows = int(rows[units].max(initial=0))
        self._pairs = int((rows[units] * keys[units]).sum())
        unseen = np.zeros_like(plan.row_positions)
        seen_from = unseen if plan.window is None else first_seen(plan.window, plan.row_positions)
        self._rows = units, plan.unit_rows, offsets, plan.row_positions, seen_from
        self._segments = (
            plan.unit_segments, plan.segment_starts, plan.segment_lengths, plan.segment_positions, plan.segment_rows,
        )  # fmt: skip
        self._most_keys = int(keys[units].max(initial=1))

    def supports(self, q: Tensor, k: KV, v: KV) -> bool:
        """Return whether the units are few and small enough: q `[rows, kv_heads, group, head_dim]` float32, K and V
        float32 or bfloat16.
        """
        if not HAS_NUMBA or q.device.type != "cpu" or q.dtype != torch.float32:
            return False
        if any(pool.dtype not in _BITS or not pool.is_contiguous() for pool in (k, v)):
            return False
        heads, group = q.shape[1:3]
        return self._most_rows * group <= MOST_ROWS and self._pairs * heads * group <= MOST_PRODUCTS

    def attend(self, q: Tensor, k: KV, v: KV, softcap: float | None, out: Tensor, lse: Tensor) -> None:
        """Write the partial results of the units to `out [partials, kv_heads, group, v_head_dim]` and `lse [partials,
        kv_heads, group]`, float32; inputs as in `supports`, q scaled.
        """
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        (keys, shift), (values, value_shift) = _bits(k), _bits(v)
        _attend(
            q.contiguous().numpy(), keys, values, shift, value_shift, *self._rows, *self._segments, self._most_keys,
            softcap or 0.0, out.numpy(), lse.numpy(),
        )  # fmt: skip


def merges(out: Tensor) -> bool:
    """Return whether `merge` takes these partial results."""
    return HAS_NUMBA and out.device.type == "cpu" and out.dtype == torch.float32


def merge(out: Tensor, lse: Tensor, firsts: Int64Array, partials: Int64Array) -> tuple[Tensor, Tensor]:
    """As `radixgen.kernels.merge.merge_partials`, float32 on a CPU: row `i` has the partial results
    `partials[firsts[i] : firsts[i + 1]]`, from the root down.
    """
    rows = firsts.size - 1
    merged, merged_lse = out.new_zeros((rows, *out.shape[1:])), lse.new_empty((rows, *lse.shape[1:]))
    _merge(out.numpy(), lse.numpy(), firsts, partials, merged.numpy(), merged_lse.numpy())
    return merged, merged_lse


def _bits(pool: Tensor) -> tuple[BitsArray, int]:
    """Return the bits of a float32 or bfloat16 tensor, and how far they are shifted to be those of float32."""
    signed, unsigned, shift = _BITS[pool.dtype]
    bits: BitsArray = pool.view(signed).numpy().view(unsigned)
    return bits, shift


@compiled_fast
def _attend(
    q: Float32Array, k: BitsArray, v: BitsArray, k_shift: int, v_shift: int,
    units: Int64Array, unit_rows: Int32Array, offsets: Int64Array, row_positions: Int32Array, seen_from: Int32Array,
    unit_segments: Int32Array, starts: Int64Array, lengths: Int32Array, positions: Int32Array, seen_by: Int32Array,
    most_keys: int, softcap: float, out: Float32Array, lse: Float32Array,
) -> None:  # fmt: skip
    """Attend with each row and KV head of each unit to the keys of its segments that the row sees."""
    group = q.shape[2]
    scores, slots, cap = np.empty((group, most_keys), np.float32), np.empty(most_keys, np.int64), np.float32(softcap)
    for unit in units:
        for row in range(unit_rows[unit, 0], unit_rows[unit, 1]):
            count = 0
            for segment in range(unit_segments[unit, 0], unit_segments[unit, 1]):
                if seen_by[segment, 0] <= row < seen_by[segment, 1]:
                    begin = max(seen_from[row] - positions[segment], 0)
                    stop = min(lengths[segment], row_positions[row] + 1 - positions[segment])
                    for place in range(begin, stop):
                        slots[count] = starts[segment] + place
                        count += 1
            partial = offsets[unit] + row - unit_rows[unit, 0]
            for head in range(q.shape[1]):
                _score(q[row, head], k, k_shift, head, slots[:count], scores)
                for member in range(group):
                    lse[partial, head, member] = _softmax(scores[member, :count], cap)
                _weigh(scores, v, v_shift, head, slots[:count], out[partial, head])


@compiled_fast
def _score(q: Float32Array, k: BitsArray, shift: int, head: int, slots: Int64Array, scores: Float32Array) -> None:
    """Write products of queries `[group, head_dim]` and the keys in `slots` `[keys]` to `scores` `[group, keys]`."""
    key = np.empty(q.shape[1], np.float32)
    bits = key.view(np.uint32)
    for place in range(slots.size):
        slot = slots[place]
        for i in range(key.size):
            bits[i] = np.uint32(k[slot, head, i]) << np.uint32(shift)
        for member in range(q.shape[0]):
            score = np.float32(0.0)
            for i in range(key.size):
                score += q[member, i] * key[i]
            scores[member, place] = score


@compiled_fast
def _weigh(
    weights: Float32Array, v: BitsArray, shift: int, head: int, slots: Int64Array, sums: Float32Array
) -> None:  # fmt: skip
    """Write the sums `[group, v_head_dim]` of the values in `slots` `[keys]` by weights `[group, keys]`."""
    value = np.empty(sums.shape[1], np.float32)
    bits = value.view(np.uint32)
    sums[:] = np.float32(0.0)
    for place in range(slots.size):
        slot = slots[place]
        for i in range(value.size):
            bits[i] = np.uint32(v[slot, head, i]) << np.uint32(shift)
        for member in range(sums.shape[0]):
            weight = weights[member, place]
            for i in range(value.size):
                sums[member, i] += weight * value[i]


@compiled_fast
def _softmax(scores: Float32Array, cap: np.float32) -> np.float32:
    """Replace scores `[keys]` by their probabilities, after a soft cap unless it is 0, and return their LSE."""
    if scores.size == 0:
        return np.float32(-np.inf)
    if cap > 0.0:
        for place in range(scores.size):
            scores[place] = np.tanh(scores[place] / cap) * cap
    top, total = scores[0], np.float32(0.0)
    for place in range(scores.size):
        top = max(top, scores[place])
    for place in range(scores.size):
        scores[place] = np.exp(scores[place] - top)
        total += scores[place]
    share = np.float32(1.0) / total
    for place in range(scores.size):
        scores[place] *= share
    return np.float32(top + np.log(total))


@compiled
def _merge(
    out: Float32Array, lse: Float32Array, firsts: Int64Array, partials: Int64Array, merged: Float32Array,
    merged_lse: Float32Array,
) -> None:  # fmt: skip
    _, heads, group, dim = out.shape
    for row in range(merged.shape[0]):
        for head in range(heads):
            for member in range(group):
                top = np.float32(-np.inf)
                for place in range(firsts[row], firsts[row + 1]):
                    top = max(top, lse[partials[place], head, member])
                merged_lse[row, head, member] = top
                if top == -np.inf:
                    continue
                total = np.float32(0.0)
                for place in range(firsts[row], firsts[row + 1]):
                    weight = np.exp(lse[partials[place], head, member] - top)
                    total += weight
                    for i in range(dim):
                        merged[row, head, member, i] += weight * out[partials[place], head, member, i]
                for i in range(dim):
                    merged[row, head, member, i] /= total
                merged_lse[row, head, member] = top + np.log(total)
