"""Keys and values in 8 bits, with one float32 scale per token and KV head.

The scale is the largest absolute value over the largest 8-bit number, so that nothing is clipped (KIVI, arXiv
2402.02750, quantizes values per token in the same way). Scores are products with 8-bit keys times the keys' scales, and
weights are multiplied by the values' scales, so that kernels need not rescale K and V; PyTorch's fused and padded paths
and Hopper's kernel for wide tiles convert them first.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""8-bit dtypes of keys and values, by name."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest number of each dtype."""


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """K or V of a pool in 8 bits: numbers `[slots, kv_heads, dim]`, of which each token and head has a scale."""

    data: Tensor
    """`[slots, kv_heads, dim]` in a dtype of `KV_DTYPES`."""
    scales: Tensor
    """`[kv_heads, slots]` float32."""

    @classmethod
    def empty(cls, slots: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> "QuantizedKV":
        """Return a pool of undefined memory."""
        data = torch.empty((slots, kv_heads, dim), dtype=dtype, device=device)
        return cls(data, torch.empty((kv_heads, slots), dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def is_contiguous(self) -> bool:
        return self.data.is_contiguous() and self.scales.is_contiguous()


KV: TypeAlias = "Tensor | QuantizedKV"
"""K or V of a pool, `[slots, kv_heads, dim]`."""


def allocate(slots: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> KV:
    """Return a pool of undefined memory, quantized if `dtype` has 8 bits."""
    data = torch.empty((slots, kv_heads, dim), dtype=dtype, device=device)
    if dtype not in LARGEST:
        return data
    return QuantizedKV(data, torch.empty((kv_heads, slots), dtype=torch.float32, device=device))


def write(pool: KV, slots: Tensor, rows: Tensor) -> None:
    """Store `rows` `[n, kv_heads, dim]` in `slots` `[n]`, which are distinct."""
    if isinstance(pool, QuantizedKV):
        data, scales = quantize(rows, pool.dtype)
        as_bytes(pool.data).index_copy_(0, slots, as_bytes(data))
        pool.scales.index_copy_(1, slots, scales.T)
    else:
        pool.index_copy_(0, slots, rows)


def read(pool: KV, slots: "slice | Tensor", dtype: torch.dtype) -> Tensor:
    """Return `[n, kv_heads, dim]` of a run of slots or of slots `[n]`, in `dtype`."""
    if isinstance(pool, QuantizedKV):
        numbers = _rows(as_bytes(pool.data), slots).view(pool.dtype)
        return numbers.to(dtype) * pool.scales[:, slots].T[..., None]
    return _rows(pool, slots).to(dtype)


def _rows(data: Tensor, slots: "slice | Tensor") -> Tensor:
    """Return rows of a tensor. `index_select` is faster than indexing."""
    return data[slots] if isinstance(slots, slice) else data.index_select(0, slots)


def read_blocks(pool: KV, blocks: Tensor, size: int, head: int, dtype: torch.dtype) -> Tensor:
    """Return `[n * size, dim]`: one KV head of `blocks` `[n]` of `size` slots each, in `dtype`."""
    data = pool.data if isinstance(pool, QuantizedKV) else pool
    numbers = _blocks(as_bytes(data)[:, head], blocks, size).view(data.dtype).to(dtype)
    if isinstance(pool, QuantizedKV):
        numbers *= _blocks(pool.scales[head], blocks, size)[:, None].to(dtype)
    return numbers


def _blocks(rows: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Gather blocks of `rows` `[slots, ...]`."""
    whole = len(rows) // size
    shape, strides = rows.shape[1:], rows.stride()
    grouped = rows.as_strided((whole, size, *shape), (size * strides[0], *strides), rows.storage_offset())
    return grouped.index_select(0, blocks).flatten(0, 1)


def zero(pool: KV, slots: int) -> None:
    """Set the first slots to 0."""
    if isinstance(pool, QuantizedKV):
        as_bytes(pool.data)[:slots].zero_()
        pool.scales[:, :slots].zero_()
    else:
        pool[:slots].zero_()


def quantize(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize `[n, kv_heads, dim]` to numbers of the same shape in `dtype`, and scales `[n, kv_heads]` float32.

    Rounds to nearest, half to even.
    """
    rows = rows.float()
    scales = rows.abs().amax(-1) * (1.0 / LARGEST[dtype])
    numbers = rows / torch.where(scales == 0.0, 1.0, scales)[..., None]
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scales


def as_bytes(data: Tensor) -> Tensor:
    """Return 8-bit numbers as a dtype that every operation of PyTorch supports, and other tensors as they are."""
    return data.view(torch.int8) if data.dtype == torch.float8_e4m3fn else data
