"""K and V tensors of every layer, indexed by slot."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from radixgen.core import Plan
from radixgen.kernels.block_bounds import BlockBounds
from radixgen.kernels.quantized import LARGEST, allocate, zero

_CPU_SHARE, _CUDA_SHARE = 0.25, 0.85
"""Default share of free memory that a pool takes."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The KV of one token in one layer."""

    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    """8-bit dtypes have a scale per token and head, for K and for V."""

    @property
    def bytes_per_token(self) -> int:
        scales = 2 * torch.float32.itemsize if self.dtype in LARGEST else 0
        return self.kv_heads * ((self.head_dim + self.v_head_dim) * self.dtype.itemsize + scales)


class KVStorage:
    """K `[slots, kv_heads, head_dim]` and V `[slots, kv_heads, v_head_dim]` of each layer, uninitialized."""

    def __init__(self, layers: Sequence[LayerShape], slots: int, device: torch.device) -> None:
        self.keys = [allocate(slots, s.kv_heads, s.head_dim, s.dtype, device) for s in layers]
        self.values = [allocate(slots, s.kv_heads, s.v_head_dim, s.dtype, device) for s in layers]
        self.bounds = BlockBounds(self.keys)

    def prepare(self, plan: Plan, slots: NDArray[np.int64]) -> None:
        """Compute the bounds that a step needs, which runs `plan` and writes `slots` `[rows]`, -1 for none."""
        self.bounds.forget(slots)
        self.bounds.prepare(plan)

    def zero(self, slots: int) -> None:
        """Set the KV of the first slots to 0."""
        for pool in (*self.keys, *self.values):
            zero(pool, slots)

    def release(self) -> None:
        """Free the memory."""
        for pools in (self.keys, self.values, self.bounds.layers):
            pools.clear()


def kv_room(device: torch.device) -> int:
    """Return the default pool size in bytes: a share of the free memory of a GPU, or of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _CUDA_SHARE)
    return int(free_host_bytes() * _CPU_SHARE)


def free_host_bytes() -> int:
    """Return the host's free memory."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
