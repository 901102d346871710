"""The choice of blocks, and attention to them, for few rows on a CPU: loops in place of many small operators.

Equal to `radixgen.kernels.torch_blocks`, up to the order of sums.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core.compiled import HAS_NUMBA, compiled, compiled_fast
from radixgen.core.plan import BLOCK, Int64Array
from radixgen.kernels.block_levels import LEVEL_SHIFT, LEVELS, LOWEST
from radixgen.kernels.quantized import KV

Float32Array = NDArray[np.float32]

MOST_ROWS = 16
"""Maximum query-head rows of a unit per KV head; matrix products are faster for more."""


def supports(q: Tensor, *pools: KV) -> bool:
    """Return whether `attend` takes q `[kv_heads, rows, head_dim]` and these K, V and bounds."""
    if not HAS_NUMBA or q.shape[1] > MOST_ROWS or q.device.type != "cpu":
        return False
    return all(pool.dtype == torch.float32 and pool.is_contiguous() for pool in (q.contiguous(), *pools))


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, candidates: Int64Array, total: int, room: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """Choose blocks for one unit and attend to them: `out [rows, kv_heads, group, v_head_dim]`, `lse [rows, kv_heads,
    group]`, float32.

    q `[kv_heads, rows * group, head_dim]`, scaled; bounds `[blocks, kv_heads, 2, head_dim]`; `candidates` and what is
    chosen of them as in `radixgen.kernels.torch_blocks`.
    """
    queries, keys, values, least_greatest = (tensor.numpy() for tensor in (q.contiguous(), k, v, bounds))
    weights = _weigh(queries, least_greatest, candidates)
    chosen = _choose(weights, total, room)
    _attend(queries, keys, values, candidates, chosen, out.numpy(), lse.numpy())


@compiled_fast
def _weigh(q: Float32Array, bounds: Float32Array, blocks: Int64Array) -> Float32Array:
    """As `block_weights` of `block_scores`, `[kv_heads, blocks]`."""
    heads, rows, dim = q.shape
    weights = np.zeros((heads, blocks.size), np.float32)
    scores = np.empty((rows, blocks.size), np.float32)
    for head in range(heads):
        for place in range(blocks.size):
            bound = bounds[blocks[place], head]
            for row in range(rows):
                score = np.float32(0.0)
                for i in range(dim):
                    number = q[head, row, i]
                    score += max(number * bound[0, i], number * bound[1, i])
                scores[row, place] = score
        for row in range(rows):
            top, total = scores[row].max(), np.float32(0.0)
            for place in range(blocks.size):
                scores[row, place] = np.exp(scores[row, place] - top)
                total += scores[row, place]
            for place in range(blocks.size):
                weights[head, place] += scores[row, place] / total
    return weights


@compiled
def _choose(weights: Float32Array, total: int, room: int) -> NDArray[np.bool_]:
    """As `radixgen.kernels.torch_blocks.choose_blocks`."""
    heads, count = weights.shape
    levels = np.minimum(np.maximum((weights.view(np.int32) >> LEVEL_SHIFT) - LOWEST, 0), LEVELS - 1)
    for head in range(heads):
        levels[head, np.argmax(levels[head])] = LEVELS
    chosen = np.zeros((heads, count), np.bool_)
    _take(levels.reshape(-1), total, chosen.reshape(-1))
    for head in range(heads):
        if np.count_nonzero(chosen[head]) > room:
            chosen[head] = False
            _take(levels[head], room, chosen[head])
    return chosen


@compiled
def _take(levels: NDArray[np.int32], total: int, chosen: NDArray[np.bool_]) -> None:
    """Mark the `total` greatest levels, of equal ones the first."""
    sizes = np.zeros(LEVELS + 1, np.int64)
    for level in levels:
        sizes[level] += 1
    bar, reach = LEVELS, sizes[LEVELS]
    while bar > 0 and reach + sizes[bar - 1] <= total:
        bar -= 1
        reach += sizes[bar]
    for place in range(levels.size):
        if levels[place] >= bar:
            chosen[place] = True
        elif levels[place] == bar - 1 and reach < total:
            chosen[place] = True
            reach += 1


@compiled_fast
def _score(q: Float32Array, k: Float32Array, head: int, first: int, scores: Float32Array) -> None:
    """Write products of a head's queries `[rows, head_dim]` and the keys from slot `first` on to `scores` `[rows,
    keys]`.
    """
    for key in range(scores.shape[1]):
        for row in range(len(scores)):
            score = np.float32(0.0)
            for i in range(q.shape[2]):
                score += q[head, row, i] * k[first + key, head, i]
            scores[row, key] = score


@compiled_fast
def _add(weights: Float32Array, v: Float32Array, head: int, first: int, sums: Float32Array) -> None:
    """Add products of `weights` `[rows, keys]` and the values from slot `first` on to `sums` `[rows, v_head_dim]`."""
    for key in range(weights.shape[1]):
        for row in range(len(weights)):
            weight = weights[row, key]
            for i in range(sums.shape[1]):
                sums[row, i] += weight * v[first + key, head, i]


@compiled_fast
def _attend(
    q: Float32Array, k: Float32Array, v: Float32Array, blocks: Int64Array, chosen: NDArray[np.bool_],
    out: Float32Array, lse: Float32Array,
) -> None:  # fmt: skip
    """Attend with each KV head to its blocks: one running softmax (FlashAttention, arXiv 2205.14135)."""
    heads, rows = q.shape[:2]
    group, v_dim = out.shape[2], v.shape[2]
    scores = np.empty((rows, BLOCK), np.float32)
    for head in range(heads):
        top, total = np.full(rows, np.float32(-1e30)), np.zeros(rows, np.float32)
        sums = np.zeros((rows, v_dim), np.float32)
        for place in range(blocks.size):
            if not chosen[head, place]:
                continue
            begin = blocks[place] * BLOCK
            _score(q, k, head, begin, scores)
            for row in range(rows):
                higher = max(top[row], scores[row].max())
                shrink = np.exp(top[row] - higher)
                top[row], total[row] = higher, total[row] * shrink
                for i in range(v_dim):
                    sums[row, i] *= shrink
                for key in range(BLOCK):
                    scores[row, key] = np.exp(scores[row, key] - higher)
                    total[row] += scores[row, key]
            _add(scores, v, head, begin, sums)
        for row in range(rows):
            lse[row // group, head, row % group] = top[row] + np.log(total[row])
            for i in range(v_dim):
                out[row // group, head, row % group, i] = sums[row, i] / total[row]
