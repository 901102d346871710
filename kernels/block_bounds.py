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
from radixgen.kernels.quantized import KV, read
from radixgen.kernels.torch_blocks import candidate_blocks
from radixgen.kernels.upload import upload

_MOST = 256
"""Blocks computed at a time."""


class BlockBounds:
    """Bounds of the keys in a pool, of every layer."""

    def __init__(self, keys: Sequence[KV], dtype: torch.dtype) -> None:
        """`keys`: the pool's K of each layer, `[slots, kv_heads, head_dim]`, which is read when a plan needs it.

        `dtype`: data type of the bounds, that of queries.
        """
        self._keys = keys
        slots = keys[0].shape[0] if keys else 0
        self.layers = [_allocate(pool, slots // BLOCK, dtype) for pool in keys]
        """`[blocks, kv_heads, 2, head_dim]` of each layer, undefined until a plan needs a block."""
        self._known = np.zeros(-(-slots // BLOCK), np.bool_)

    def forget(self, slots: NDArray[np.int64]) -> None:
        """Drop the bounds of the blocks of `slots` `[n]`, which are about to be written. -1 is ignored."""
        self._known[slots[slots >= 0] // BLOCK] = False

    def prepare(self, plan: Plan) -> None:
        """Compute the bounds that a plan needs and that are not known. All keys of its candidates must be written."""
        choosing = np.flatnonzero(plan.unit_blocks).tolist()
        if not choosing:
            return
        blocks = np.unique(np.concatenate([candidate_blocks(plan, unit) for unit in choosing]))
        missing = blocks[~self._known[blocks]]
        for first in range(0, missing.size, _MOST):
            part = upload(missing[first : first + _MOST], self.layers[0].device)
            for pool, bounds in zip(self._keys, self.layers, strict=True):
                bounds[part] = block_bounds(pool, part, bounds.dtype)
        self._known[missing] = True


def _allocate(pool: KV, blocks: int, dtype: torch.dtype) -> Tensor:
    _, kv_heads, head_dim = pool.shape
    device = pool.device if isinstance(pool, Tensor) else pool.data.device
    return torch.empty((blocks, kv_heads, 2, head_dim), dtype=dtype, device=device)


def block_bounds(pool: KV, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bounds of `blocks` `[n]` of K, `[n, kv_heads, 2, head_dim]` in `dtype`."""
    slots = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)
    keys = read(pool, slots.view(-1), dtype).view(len(blocks), BLOCK, *pool.shape[1:])
    return torch.stack(keys.aminmax(dim=1), dim=2)
