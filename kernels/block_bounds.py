"""Bounds of keys: the least and the greatest number of each dimension in each block of slots.

A block's bounds are computed before the first step that needs them, and again if any of its slots was written since.
(Quest, arXiv 2406.10774, section 3.2.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan
from radixgen.core.plan import BLOCK
from radixgen.kernels.block_work import candidate_blocks
from radixgen.kernels.quantized import KV, QuantizedKV, read
from radixgen.kernels.upload import upload

_MOST = 256
"""Blocks computed at a time."""


class BlockBounds:
    """Bounds of the keys in a pool, of every layer.

    They take 1/32 of the memory of K, from the first plan on that needs any.
    """

    def __init__(self, keys: Sequence[KV]) -> None:
        """`keys`: the pool's K of each layer, `[slots, kv_heads, head_dim]`."""
        self._keys = keys
        self.layers: list[Tensor] = []
        """`[blocks, kv_heads, 2, head_dim]` of each layer, undefined until a plan needs a block; empty before that. In
        the data type of the keys, or in bfloat16 if they are quantized.
        """
        self._known = np.zeros(-(-keys[0].shape[0] // BLOCK) if keys else 0, np.bool_)

    def of(self, layer: int) -> Tensor | None:
        """Return a layer's bounds, None before any plan needed them."""
        return self.layers[layer] if self.layers else None

    def forget(self, slots: NDArray[np.int64]) -> None:
        """Drop the bounds of the blocks of `slots` `[n]`, which are about to be written. -1 is ignored."""
        self._known[slots[slots >= 0] // BLOCK] = False

    def prepare(self, plan: Plan) -> None:
        """Compute the bounds that a plan needs and that are not known. All keys of its candidates must be written."""
        choosing = np.flatnonzero(plan.unit_blocks).tolist()
        if not choosing:
            return
        if not self.layers:
            self.layers.extend(map(_allocate, self._keys))
        blocks = np.unique(np.concatenate([candidate_blocks(plan, unit) for unit in choosing]))
        missing = blocks[~self._known[blocks]]
        for first in range(0, missing.size, _MOST):
            part = upload(missing[first : first + _MOST], self.layers[0].device)
            for pool, bounds in zip(self._keys, self.layers, strict=True):
                bounds[part] = block_bounds(pool, part, bounds.dtype)
        self._known[missing] = True


def _allocate(pool: KV) -> Tensor:
    slots, kv_heads, head_dim = pool.shape
    shape = slots // BLOCK, kv_heads, 2, head_dim
    if isinstance(pool, QuantizedKV):
        return torch.empty(shape, dtype=torch.bfloat16, device=pool.data.device)
    return torch.empty(shape, dtype=pool.dtype, device=pool.device)


def block_bounds(pool: KV, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bounds of `blocks` `[n]` of K, `[n, kv_heads, 2, head_dim]` in `dtype`."""
    slots = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
    keys = read(pool, slots.view(-1), dtype).view(len(blocks), BLOCK, *pool.shape[1:])
    return torch.stack(keys.aminmax(dim=1), dim=2).to(dtype)
