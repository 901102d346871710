"""Attention over chosen blocks of keys, in plain PyTorch: the reference for `radixgen.kernels.triton_blocks`.

A unit of a plan with `unit_blocks` reads only some blocks of `BLOCK` slots, other ones in each layer and KV head. A
block's score for a query is an upper bound of the scores of its keys, from their least and greatest numbers in each
dimension (Quest, arXiv 2406.10774, section 3.2). Blocks are chosen once for all rows of the unit and all query heads of
a KV head: by the sum of the softmax of these scores over the candidates. The KV heads of a layer compete for the unit's
blocks, so that a head whose scores are spread widely reads more than one that is focused on few blocks.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from radixgen.core.plan import BLOCK, Int64Array
from radixgen.kernels import compiled_blocks
from radixgen.kernels.block_levels import LEVEL_SHIFT, LEVELS, LOWEST
from radixgen.kernels.block_work import candidate_blocks, list_room
from radixgen.kernels.quantized import KV, read_blocks

if TYPE_CHECKING:
    from radixgen.core import Plan

COMPILED = True
"""Whether compiled loops replace operators for few rows on a CPU."""


def block_scores(q: Tensor, bounds: Tensor) -> Tensor:
    """Return each query's upper bound of the scores in each block, `[kv_heads, rows, blocks]`.

    q `[kv_heads, rows, head_dim]`, already scaled; bounds `[blocks, kv_heads, 2, head_dim]`: least and greatest keys.
    """
    blocks, kv_heads = bounds.shape[:2]
    signed = torch.cat([q.clamp_max(0.0), q.clamp_min(0.0)], dim=-1)
    return torch.matmul(signed, bounds.reshape(blocks, kv_heads, -1).to(q.dtype).permute(1, 2, 0))


def block_weights(scores: Tensor, softcap: float | None = None) -> Tensor:
    """Return each block's share of attention, summed over the rows: scores `[kv_heads, rows, blocks]` give `[kv_heads,
    blocks]`.
    """
    if softcap is not None:
        scores = scores.div(softcap).tanh_().mul_(softcap)
    return scores.softmax(-1).sum(1)


def choose_blocks(weights: Tensor, total: int, room: int) -> Tensor:
    """Return which blocks are chosen, bool `[kv_heads, blocks]`: the `total` of the greatest weights, and of these
    `room` at most for each head.

    weights `[kv_heads, blocks]`, not negative. Each head gets its best block. Weights are compared by their level,
    which has four values per octave; of equal ones, those of the first head, and there the first blocks, are chosen.
    """
    count = weights.numel()
    levels = (weights.float().contiguous().view(torch.int32) >> LEVEL_SHIFT) - LOWEST
    backwards = torch.arange(count - 1, -1, -1, device=weights.device).view_as(levels)
    order = levels.clamp_(0, LEVELS - 1).long() * count + backwards
    best = order.argmax(1, keepdim=True)
    order.scatter_add_(1, best, torch.full_like(best, LEVELS * count))
    chosen = torch.zeros(count, dtype=torch.bool, device=weights.device)
    chosen[order.view(-1).topk(total, sorted=False).indices] = True
    chosen = chosen.view_as(levels)
    if room < order.shape[1]:
        least = order.topk(room, dim=1, sorted=False).values.amin(1, keepdim=True)
        chosen &= order >= least
    return chosen


def unread_share(lse: Tensor, exact_lse: Tensor) -> Tensor:
    """Return the share of attention in keys that were not read, from the log-sum-exp of those that were, and of all."""
    return 1.0 - (lse.float() - exact_lse.float()).exp()


@dataclass(frozen=True, slots=True)
class _Unit:
    first: int
    stop: int
    partial: int
    """Index of its first row among the partial results."""
    blocks: Tensor
    """`[candidates]` int64"""
    consecutive: bool
    chosen: int
    """Blocks to choose per KV head, on average."""


class BlockAttention:
    """Attention of the units of a plan that choose blocks."""

    def __init__(self, plan: "Plan", offsets: Int64Array, device: torch.device) -> None:
        """`offsets` `[units]`: each unit's first partial result."""
        self._units = []
        for unit in np.flatnonzero(plan.unit_blocks).tolist():
            blocks = candidate_blocks(plan, unit)
            first, stop = plan.unit_rows[unit].tolist()
            consecutive = bool((np.diff(blocks) == 1).all())
            there = torch.from_numpy(blocks).to(device)
            chosen = int(plan.unit_blocks[unit])
            self._units.append(_Unit(first, stop, int(offsets[unit]), there, consecutive, chosen))

    def __call__(
        self, packed: Tensor, k: KV, v: KV, bounds: Tensor, softcap: float | None, out: Tensor, lse: Tensor
    ) -> None:
        """Write the units' partial results to `out [partials, kv_heads, group, v_head_dim]` and `lse [partials,
        kv_heads, group]`.

        packed `[kv_heads, rows * group, head_dim]`: scaled queries; bounds `[blocks, kv_heads, 2, head_dim]`.
        """
        group = out.shape[2]
        for unit in self._units:
            q = packed[:, unit.first * group : unit.stop * group]
            rows = slice(unit.partial, unit.partial + unit.stop - unit.first)
            if COMPILED and softcap is None and compiled_blocks.supports(q, k, v, bounds):
                assert isinstance(k, Tensor) and isinstance(v, Tensor)
                total, room = len(q) * unit.chosen, list_room(unit.blocks.numel(), unit.chosen)
                compiled_blocks.attend(q, k, v, bounds, unit.blocks.numpy(), total, room, out[rows], lse[rows])
                continue
            for head, blocks in enumerate(self._choose(unit, q, bounds, softcap)):
                key, value = (read_blocks(pool, blocks, BLOCK, head, q.dtype) for pool in (k, v))
                _attend(q[head], key, value, softcap, out[rows, head], lse[rows, head])

    @staticmethod
    def _choose(unit: _Unit, q: Tensor, bounds: Tensor, softcap: float | None) -> tuple[Tensor, ...]:
        """Return the blocks that each KV head reads."""
        candidates = unit.blocks.numel()
        if unit.consecutive:
            begin = int(unit.blocks[0])
            theirs = bounds[begin : begin + candidates]
        else:
            theirs = bounds[unit.blocks]
        weights = block_weights(block_scores(q, theirs), softcap)
        chosen = choose_blocks(weights, len(q) * unit.chosen, list_room(candidates, unit.chosen))
        blocks = unit.blocks[chosen.nonzero()[:, 1]]
        return torch.split(blocks, chosen.sum(1).tolist())


def _attend(q: Tensor, key: Tensor, value: Tensor, softcap: float | None, out: Tensor, lse: Tensor) -> None:
    """Attend with q `[rows * group, head_dim]` to all of key `[keys, head_dim]`; out `[rows, group, v_head_dim]`."""
    if softcap is None and q.device.type == "cpu" and key.shape[1] == value.shape[1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        values, row_lse = flash(q[None, None], key[None, None], value[None, None], scale=1.0)
    else:
        scores = q @ key.T
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        row_lse = scores.logsumexp(-1)
        values = (scores - row_lse[:, None]).exp_() @ value
    out.copy_(values.reshape(out.shape))
    lse.copy_(row_lse.reshape(lse.shape))
