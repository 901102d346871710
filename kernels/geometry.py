"""Shape of one layer's attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from radixgen.kernels.quantized import KV, QuantizedKV

MAX_HEAD_DIM = 256
MAX_GROUP = 128
LEAST_RUN = 128
"""Minimum consecutive keys, seen by all rows of a tile, that are copied in bulk."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Heads, head sizes, and the dtypes of queries, keys and values."""

    kv_heads: int
    group: int
    """Query heads per KV head."""
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    """Of queries; of keys and values unless they are quantized."""
    kv_dtype: torch.dtype | None = None
    """8-bit dtype of quantized keys and values."""

    @classmethod
    def of(cls, q: Tensor, k: KV, v: KV) -> "Geometry":
        """Return the geometry of q `[rows, q_heads, head_dim]`, k `[slots, kv_heads, head_dim]`, v
        `[slots, kv_heads, v_head_dim]`.
        """
        kv_heads, quantized = k.shape[1], isinstance(k, QuantizedKV)
        dtype, kv_dtype = (q.dtype, k.dtype) if quantized else (k.dtype, None)
        return cls(kv_heads, q.shape[1] // kv_heads, k.shape[2], v.shape[2], dtype, kv_dtype)

    @property
    def quantized(self) -> bool:
        """Whether keys and values have 8 bits."""
        return self.kv_dtype is not None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Data type of keys and values in the pool."""
        return self.kv_dtype or self.dtype

    @property
    def key_bytes(self) -> int:
        """Bytes of K and V of one token and head, and of their scales."""
        return (self.head_dim + self.v_head_dim) * self.stored_dtype.itemsize + 8 * self.quantized

    @property
    def padded(self) -> tuple[int, int]:
        """Head sizes padded for the Triton kernels: powers of two, at least 16."""
        return tuple(max(16, 1 << (dim - 1).bit_length()) for dim in (self.head_dim, self.v_head_dim))  # type: ignore[return-value]

    @property
    def supported(self) -> bool:
        """Whether the Triton kernels support it; otherwise PyTorch is used."""
        widest = max(self.padded)
        fits = widest <= MAX_HEAD_DIM and self.group <= (MAX_GROUP if widest <= 128 else 64)
        even = self.head_dim % 2 == 0 and self.v_head_dim % 2 == 0
        return fits and self.dtype in _DTYPES and (even or not self.quantized)

    @property
    def bulk(self) -> bool:
        """Whether whole blocks can be copied by descriptor, because head sizes need no padding."""
        return self.padded == (self.head_dim, self.v_head_dim)
