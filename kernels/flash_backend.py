"""Tree attention through the flash-attn package, if installed (arXiv 2205.14135, 2407.08608).

The package computes the segments of a unit that all rows of the unit see completely, and a span's causal diagonal; the
rest is computed by our own kernels (by PyTorch without a GPU). A segment with its rows is one sequence of a
variable-length call. Units that read the same keys share one sequence, and sequences whose keys do not overlap share
one call over the pool in place: the slots between them are sequences without rows. So a tree that stores everything
once needs one call for all of its levels, and one for the diagonals. The results are merged by their LSE.

The package returns partial results in the 16-bit dtype of its inputs, while our own kernels keep float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan, Window
from radixgen.core.plan import Int64Array
from radixgen.kernels.backend import Attention, AttentionBackend, KVWriter, backend
from radixgen.kernels.chip import Chip
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.merge import apply_sinks, merge_partials
from radixgen.kernels.quantized import KV, QuantizedKV
from radixgen.kernels.varlen_runs import VarlenRuns, split

TILE_ROWS = 128
"""Query-head rows per tile of the package's kernels, for which `FlashCost.key` is measured."""

_LEAST_VERSION = (2, 7)
"""The first version that returns the LSE as `[q_heads, rows]`."""


class VarlenAttention(Protocol):
    """Attention over concatenated sequences."""

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
        """Compute attention of each sequence.

        q `[rows, q_heads, head_dim]`, k `[keys, kv_heads, head_dim]`, v `[keys, kv_heads, v_head_dim]`. Sequence `i`
        has rows `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]` and keys likewise, int32 `[sequences + 1]`. Either may be
        empty, but a sequence with rows has keys. `max_seqlen_q`, `max_seqlen_k`: maxima over sequences with rows.
        `causal`: the last row of a sequence sees its last key, and each row before it one key less.

        Returns `out [rows, q_heads, v_head_dim]` in q's dtype and the LSE `[q_heads, rows]` in float32 (natural log).
        """
        ...


@dataclass(frozen=True, slots=True)
class FlashPackage:
    """A variable-length attention function and its restrictions."""

    name: str
    attend: VarlenAttention
    reads_beyond: int = 0
    """Keys read past the end of a sequence and multiplied by 0: they must not be NaN."""
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    head_multiple: int = 8
    """Required divisor of head sizes: others would be padded by copying the whole pool."""

    def answers(self, q: Tensor, k: KV, v: KV) -> bool:
        """Return whether the package supports these tensors; shapes as in `radixgen.kernels.backend.Attention`."""
        dim = q.shape[2]
        if isinstance(k, QuantizedKV) or isinstance(v, QuantizedKV):
            return False
        return (
            q.dtype == k.dtype == v.dtype
            and dim == v.shape[2]
            and q.dtype in self.dtypes
            and dim % self.head_multiple == 0
            and dim <= 256
            and k.stride(2) == v.stride(2) == 1
        )


def installed() -> str:
    """Describe the installed flash-attn packages without importing them."""
    versions = []
    for name in ("flash-attn", "flash-attn-3"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(versions) or "not installed (optional)"


def load(device: torch.device) -> FlashPackage:
    """Return the package for a device: the one for Hopper on Hopper, if installed. Raises ImportError."""
    hopper = device.type == "cuda" and Chip.of(device).is_hopper
    return _load(hopper)


@lru_cache
def _load(hopper: bool) -> FlashPackage:
    if hopper and find_spec("flash_attn_interface"):
        function = _imported("flash_attn_interface").flash_attn_varlen_func
        # Its bulk copies read whole blocks of up to 256 keys (Dao-AILab/flash-attention issue 1745).
        return FlashPackage("flash-attn-3", _through(function), reads_beyond=256)
    if not find_spec("flash_attn"):
        raise ImportError("the flash-attn package is not installed")
    package = _imported("flash_attn")
    if not hasattr(package, "flash_attn_varlen_func"):
        raise ImportError("the flash-attn package has no flash_attn_varlen_func")
    if tuple(int(part) for part in package.__version__.split(".")[:2]) < _LEAST_VERSION:
        raise ImportError(f"flash-attn {package.__version__} is older than {'.'.join(map(str, _LEAST_VERSION))}")
    return FlashPackage("flash-attn", _through(package.flash_attn_varlen_func))


def _imported(name: str) -> Any:
    """Import a module whose binaries may not match the installed PyTorch. Raises ImportError."""
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(f"{name} is installed, but broken: {error}") from error


def _through(function: Callable[..., Any]) -> VarlenAttention:
    """Adapt `flash_attn_varlen_func` of either package to `VarlenAttention`."""
    # The first releases for Hopper always return the LSE.
    options = {"return_attn_probs": True} if "return_attn_probs" in signature(function).parameters else {}

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
            softmax_scale=scale, causal=causal, softcap=softcap or 0.0, **options,
        )  # fmt: skip
        return out, lse

    return attend


def attend_reference(
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
    """Reference for the package's call: one sequence after the other, in float32 or better."""
    dtype = _accumulated(q.dtype)
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros((*q.shape[:2], v.shape[2]))
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype, device=q.device)
    edges = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for (row, key), (row_end, key_end) in pairwise(edges):
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


def runs_on(device: torch.device) -> bool:
    """Return whether this is a CUDA device of sm_80 or later. Raises ImportError if the package is missing."""
    load(device)
    return device.type == "cuda" and Chip.of(device).capability >= 80


@dataclass(frozen=True, slots=True)
class _VarlenCall:
    """One call of the package, on the device."""

    rows: Tensor
    """`[partials]` int64: the plan's rows, by sequence."""
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    first: int
    stop: int
    """Slots of the pool `[first, stop)` covered by the runs, including the gaps between their keys."""
    packing: tuple[Tensor, Tensor] | None
    """If set: slots to copy, and their places in a buffer of `stop` keys that is otherwise 0."""

    def keys(self, pool: Tensor) -> Tensor:
        """Return the keys or values covered by the runs, `[stop - first, kv_heads, dim]`."""
        if self.packing is None:
            return pool[self.first : self.stop]
        slots, places = self.packing
        return pool.new_zeros((self.stop, *pool.shape[1:])).index_copy_(0, places, pool.index_select(0, slots))


def _call(runs: VarlenRuns, index: int, reads_beyond: int, device: torch.device) -> _VarlenCall:
    """Make one call. Every second sequence has no rows and covers the gap up to the next run, or the zeros after a
    packed one.
    """
    members = np.flatnonzero(runs.calls == index)
    starts, lengths, sizes = runs.starts[members], runs.lengths[members], runs.sizes[members]
    packing, begins, first = None, starts, int(starts[0])
    if reads_beyond:
        first = 0
        begins = np.cumsum(lengths + reads_beyond) - lengths - reads_beyond
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        packing = (
            _to_device(np.repeat(starts, lengths) + within, device),
            _to_device(np.repeat(begins, lengths) + within, device),
        )
    bounds = np.stack([begins, begins + lengths], axis=1).reshape(-1)
    counts = np.stack([sizes, np.zeros_like(sizes)], axis=1).reshape(-1)[:-1]
    return _VarlenCall(
        rows=_to_device(runs.rows[runs.offsets[members[0]] : runs.offsets[members[-1] + 1]], device),
        cu_seqlens_q=_to_device(np.cumsum([0, *counts]).astype(np.int32), device),
        cu_seqlens_k=_to_device((bounds - first).astype(np.int32), device),
        max_seqlen_q=int(sizes.max()),
        max_seqlen_k=int(lengths.max()),
        causal=bool(runs.causal[members[0]]),
        first=first,
        stop=int(bounds[-1]) + reads_beyond,
        packing=packing,
    )


@dataclass(frozen=True, slots=True)
class MergeTables:
    """The partial results of each row, from the root down, in the form that `merge_by_kernel` reads; int32."""

    counts: Tensor
    """`[3]`: the second is the number of merged rows, the third the number of rows."""
    rows: Tensor
    """`[rows]`"""
    offsets: Tensor
    """`[rows + 1]`: start of each row's list in `partials`."""
    partials: Tensor
    """`[partials]`"""
    most: int
    """Maximum partial results of a row."""

    @classmethod
    def of(cls, rows: Int64Array, turns: Int64Array, num_rows: int, device: torch.device) -> "MergeTables":
        """Make tables of partial results `[partials]`, each with its row and its turn within the row."""
        order = np.lexsort((turns, rows))
        offsets = np.searchsorted(rows[order], np.arange(num_rows + 1))
        tables = (np.array([0, num_rows, num_rows]), np.arange(num_rows), offsets, order)
        counts, listed, begins, partials = (_to_device(table.astype(np.int32), device) for table in tables)
        return cls(counts, listed, begins, partials, int(np.diff(offsets).max(initial=0)))


def merge_reference(out: Tensor, lse: Tensor, tables: MergeTables, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Merge partial results `out [partials, q_heads, v_head_dim]` and `lse [partials, q_heads]` into `[rows, …]`.

    Rows without partial results give 0 and -inf.
    """
    offsets = tables.offsets.long()
    lengths = offsets.diff()
    order = []
    for turn in range(tables.most):
        rows = (lengths > turn).nonzero()[:, 0]
        order.append((rows, tables.partials.long()[offsets[rows] + turn]))
    merged, merged_lse = merge_partials(out.to(lse.dtype), lse, order, tables.rows.numel())
    if sinks is not None:
        merged = apply_sinks(merged, merged_lse, sinks)
    return merged.to(out.dtype), merged_lse


def merge_by_kernel(out: Tensor, lse: Tensor, tables: MergeTables, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `merge_reference`, in one launch."""
    import triton

    from radixgen.kernels import triton_kernels

    _, q_heads, v_head_dim = out.shape
    merged = out.new_empty((tables.rows.numel(), q_heads, v_head_dim))
    merged_lse = lse.new_empty((tables.rows.numel(), q_heads))
    partials = min(16, triton.next_power_of_2(max(tables.most, 1)))
    heads = min(16 // partials, triton.next_power_of_2(q_heads))
    triton_kernels.merge[(tables.rows.numel(), triton.cdiv(q_heads, heads))](
        out, lse, merged, merged_lse, lse if sinks is None else sinks.float(), tables.counts, tables.rows,
        tables.offsets, tables.partials, Q_HEADS=q_heads, V_HEAD_DIM=v_head_dim,
        PADDED_V_DIM=max(16, triton.next_power_of_2(v_head_dim)), BLOCK_HEADS=heads, BLOCK_PARTIALS=partials,
        SINKS=sinks is not None, PDL=False,
    )  # fmt: skip
    return merged, merged_lse


class FlashKVWriter:
    """Writes KV as our own backend does."""

    def __init__(self, slots: NDArray[np.int64], device: torch.device) -> None:
        self._writer: KVWriter = backend("auto", device).kv_writer(slots, device)

    def __call__(self, key: Tensor, value: Tensor, k: KV, v: KV) -> None:
        """As `radixgen.kernels.backend.KVWriter`."""
        self._writer(key, value, k, v)


class FlashAttention:
    """Attention over a plan by the flash-attn package, merged with our own kernels' results for the rest."""

    def __init__(self, plan: Plan, window: Window | None, device: torch.device) -> None:
        self._whole, self._window, self._device = plan, window, device
        trimmed = plan.within(window)
        self._package = load(device)
        self._own = backend("auto", device)
        self._fallback: Attention | None = None
        runs, rest = split(trimmed)
        self._calls = [_call(runs, i, self._package.reads_beyond, device) for i in range(runs.num_calls)]
        self._num_partials = runs.rows.size
        self._rest: Attention | None = None
        rows, turns = runs.rows, np.repeat(runs.positions, runs.sizes)
        if rest is not None and self._calls:
            self._rest = self._own.attention(rest.plan, window, device)
            self._rest_rows = _to_device(rest.rows, device)
            rows = np.concatenate([rows, rest.rows])
            turns = np.concatenate([turns, np.full(rest.rows.size, np.iinfo(np.int64).max)])
        self._tables = MergeTables.of(rows, turns, plan.num_rows, device)
        self._merge = merge_by_kernel if self._own.name == "triton" else merge_reference

    def __call__(
        self, q: Tensor, k: KV, v: KV, scale: float, softcap: float | None = None, sinks: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `radixgen.kernels.backend.Attention`. Tensors that the package does not support go to our own kernels."""
        if not self._calls or not self._package.answers(q, k, v):
            if self._fallback is None:
                self._fallback = self._own.attention(self._whole, self._window, self._device)
            return self._fallback(q, k, v, scale, softcap, sinks, bounds)
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        out = q.new_empty((self._tables.partials.numel(), q.shape[1], v.shape[2]))
        lse = torch.empty(out.shape[:2], dtype=_accumulated(q.dtype), device=q.device)
        done = 0
        for call in self._calls:
            stop = done + call.rows.numel()
            part, part_lse = self._package.attend(
                q.index_select(0, call.rows), call.keys(k), call.keys(v), call.cu_seqlens_q, call.cu_seqlens_k,
                call.max_seqlen_q, call.max_seqlen_k, causal=call.causal, scale=scale, softcap=softcap,
            )  # fmt: skip
            out[done:stop], lse[done:stop] = part, part_lse.T
            done = stop
        if self._rest is not None:
            queries = q.index_select(0, self._rest_rows)
            out[done:], lse[done:] = self._rest(queries, k, v, scale, softcap, bounds=bounds)
        return self._merge(out, lse, self._tables, sinks)


@dataclass(frozen=True, slots=True)
class FlashCost:
    """Cost of the flash-attn package in microseconds of the whole device, for heads of 128 dimensions in 16 bits."""

    call: float
    """Per launch. Merging counts as one launch."""
    key: float
    """Per key of one KV head, against at most `TILE_ROWS` query-head rows."""
    group: int = 1
    kv_heads: int = 1

    def scaled(self, geometry: Geometry) -> "FlashCost":
        """Return the cost for layers of this shape."""
        return FlashCost(self.call, self.key * geometry.head_dim / 128, geometry.group, geometry.kv_heads)

    def predict(self, runs: VarlenRuns) -> float:
        """Predict the attention time of one layer. A diagonal counts as if all its rows saw all its keys."""
        tiles = -(-runs.sizes * self.group // TILE_ROWS)
        work = float((tiles * runs.lengths).sum()) * self.kv_heads * self.key
        return work + self.call * (runs.num_calls + 1)


@dataclass(frozen=True, slots=True)
class CheapestAttention:
    """Attention of a plan by the package, if it can compute all of it and the cost model predicts that it is faster, or
    by `other`.
    """

    cost: FlashCost
    other: Callable[[Plan, Window | None, torch.device], Attention]

    def __call__(self, plan: Plan, window: Window | None, device: torch.device) -> Attention:
        """Construct the attention of a plan."""
        runs, rest = split(plan.within(window))
        if rest is None and self.cost.predict(runs) < plan.predicted:
            return FlashAttention(plan, window, device)
        return self.other(plan, window, device)


def backend_with_flash(name: str, device: torch.device, cost: FlashCost | None) -> AttentionBackend:
    """As `radixgen.kernels.backend.backend`, but `"auto"` uses the flash-attn package for plans that it computes
    faster, if it is installed and its `cost` is known.
    """
    own = backend(name, device)
    if name != "auto" or cost is None:
        return own
    try:
        usable = runs_on(device)
    except ImportError:
        usable = False
    return own._replace(attention=CheapestAttention(cost, own.attention)) if usable else own


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
