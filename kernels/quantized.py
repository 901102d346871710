"""Keys and values in 8 bits, with one float32 scale per token and KV head.

The scale is the largest absolute value over the largest 8-bit number, so that nothing is clipped (KIVI, arXiv
2402.02750, quantizes values per token in the same way). Scores are products with 8-bit keys times the keys' scales, and
weights are multiplied by the values' scales, so that no kernel needs keys or values in full precision.
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

    @property
    def device(self) -> torch.device:
        return self.data.device

    def is_contiguous(self) -> bool:
        return self.data.is_contiguous() and self.scales.is_contiguous()

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Quantize `rows` `[n, kv_heads, dim]` into `slots` `[n]`, which are distinct."""
        data, scales = quantize(rows, self.dtype)
        as_bytes(self.data).index_copy_(0, slots, as_bytes(data))
        self.scales.index_copy_(1, slots, scales.T)

    def read(self, slots: "slice | Tensor", dtype: torch.dtype) -> Tensor:
        """Return `[n, kv_heads, dim]` of a run of slots or of slots `[n]`, in full precision."""
        return as_bytes(self.data)[slots].view(self.dtype).to(dtype) * self.scales[:, slots].T[..., None]

    def zero(self, slots: int) -> None:
        """Set the first slots to 0."""
        as_bytes(self.data)[:slots].zero_()
        self.scales[:, :slots].zero_()


KV: TypeAlias = "Tensor | QuantizedKV"
"""K or V of a pool, `[slots, kv_heads, dim]`."""


def read(pool: KV, slots: "slice | Tensor", dtype: torch.dtype) -> Tensor:
    """Return `[n, kv_heads, dim]` of a run of slots or of slots `[n]`, in `dtype`."""
    if isinstance(pool, QuantizedKV):
        return pool.read(slots, dtype)
    return pool[slots].to(dtype)


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
