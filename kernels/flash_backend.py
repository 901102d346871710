"""Tree attention through the flash-attn package, where it is installed (arXiv 2205.14135, 2407.08608).

It answers those segments of a unit that all rows of the unit see whole, and a span's own causal diagonal; all else
goes to our own kernels (PyTorch without a GPU). A segment and its rows are one sequence of a call for sequences of any
lengths. Units that read the same keys share one sequence, and sequences whose keys don't overlap share one call over
the pool as it lies: the slots between them are sequences without rows. So there is one call for all levels of a tree
that stores everything once, and one for the diagonals. The results are merged by their LSE.

Partial results come from the package in the dtype of its inputs, 16 bits, where our own kernels keep float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan
from radixgen.core.plan import Int64Array, reduce_ranges
from radixgen.kernels import Attention as AnyAttention
from radixgen.kernels import torch_backend
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.merge import apply_sinks, merge_partials

TILE_ROWS = 128
"""Query heads' rows that the package's kernels hold at once, which is what `FlashCost.key` is measured for."""

_BOTH_HALVES = (torch.float16, torch.bfloat16)
_LEAST_VERSION = (2, 7)
"""From which the LSE comes as `[q_heads, rows]`."""


class AttendVarlen(Protocol):
    """Attention of sequences that lie one behind the other."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """
        Q `[rows, q_heads, head_dim]`, k `[keys, kv_heads, head_dim]`, v `[keys, kv_heads, v_head_dim]`. Sequence `i`
        has rows `cu_seqlens_q[i]` up to `cu_seqlens_q[i + 1]` and likewise keys, int32 `[sequences + 1]`; either may
        be none, but no row stands in a sequence without keys. `max_seqlen_q` and `max_seqlen_k`: the most of those
        that have rows. `causal`: the last row of a sequence sees its last key, each row before it one key less.

        Returns `out [rows, q_heads, v_head_dim]` in q's dtype and the LSE `[q_heads, rows]` in float32 (natural log).
        """
        ...


@dataclass(frozen=True, slots=True)
class Package:
    """What answers the sequences."""

    name: str
    attend: AttendVarlen
    reads_beyond: int = 0
    """Keys past the end of a sequence that are read, and multiplied by 0: they must not be NaN."""
    dtypes: tuple[torch.dtype, ...] = _BOTH_HALVES

    def answers(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether it takes such tensors; shapes as of `radixgen.kernels.Attention`."""
        dim = q.shape[2]
        same = q.dtype == k.dtype == v.dtype and dim == v.shape[2]
        return same and q.dtype in self.dtypes and dim % 8 == 0 and dim <= 256 and k.stride(2) == v.stride(2) == 1


@dataclass(frozen=True, slots=True)
class FlashCost:
    """What a call of the package takes for layers of one shape, in microseconds of the whole device."""

    call: float
    """Of a launch; merging counts as one."""
    key: float
    """Of one key of one KV head, against at most `TILE_ROWS` query heads' rows"""
    group: int
    kv_heads: int

    def predict(self, pieces: "Pieces") -> float:
        """When attention should be done with one layer."""
        tiles = -(-pieces.sizes * self.group // TILE_ROWS)
        work = float((tiles * pieces.lengths).sum()) * self.kv_heads * self.key
        return work + self.call * (1 + len({(kind, turn) for kind, turn in pieces.calls()}))


def installed() -> str:
    """Which flash-attn is installed, without importing it, for people to read."""
    found = []
    for name in ("flash-attn", "flash-attn-3"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) or "flash-attn: not installed (optional)"


def load(device: torch.device) -> Package:
    """The package for a device: the one made for Hopper there, if it is installed. Raises ImportError."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return _load(hopper)


@lru_cache
def _load(hopper: bool) -> Package:
    if hopper and find_spec("flash_attn_interface"):
        function = import_module("flash_attn_interface").flash_attn_varlen_func
        # Its bulk copies bring whole blocks, of 256 keys at most (Dao-AILab/flash-attention issue 1745).
        return Package("flash-attn-3", _through(function), reads_beyond=256)
    if not find_spec("flash_attn"):
        raise ImportError("the flash-attn package is not installed")
    package = import_module("flash_attn")
    if not hasattr(package, "flash_attn_varlen_func"):
        raise ImportError("the flash-attn package has no flash_attn_varlen_func")
    if tuple(int(part) for part in package.__version__.split(".")[:2]) < _LEAST_VERSION:
        raise ImportError(f"flash-attn {package.__version__} is older than {'.'.join(map(str, _LEAST_VERSION))}")
    return Package("flash-attn", _through(package.flash_attn_varlen_func))


def _through(function: Callable[..., Any]) -> AttendVarlen:
    """`flash_attn_varlen_func`, of either package, as `AttendVarlen`."""
    # The first releases for Hopper give the LSE unasked.
    asked = {"return_attn_probs": True} if "return_attn_probs" in signature(function).parameters else {}

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = function(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale=scale, causal=causal, softcap=softcap or 0.0, **asked,
        )  # fmt: skip
        return out, lse

    return attend


def attend_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The plain twin of the package's call: one sequence after the other, in float32 or better."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros((*q.shape[:2], v.shape[2]))
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype, device=q.device)
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), cu_seqlens_k.tolist(), cu_seqlens_k[1:].tolist())  # noqa: B905
    for row, row_end, key, key_end in bounds:
        rows, keys = row_end - row, key_end - key
        if not rows:
            continue
        assert 0 < keys <= max_seqlen_k and rows <= max_seqlen_q
        keys_of = k[key:key_end].to(dtype).repeat_interleave(group, 1)
        values_of = v[key:key_end].to(dtype).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[row:row_end].to(dtype), keys_of) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse[:, row:row_end] = scores.logsumexp(-1)
        out[row:row_end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values_of).to(q.dtype)
    return out, lse
