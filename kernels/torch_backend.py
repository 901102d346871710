"""Tree attention in plain PyTorch, on any device: the reference for all other backends.

A unit that reads long runs is computed by itself, directly from its extents. Units that read little are padded to a
common shape, gathered, and computed together. Those that choose blocks are in `radixgen.kernels.torch_blocks`. Scores
and sums are float32 (float64 for float64 inputs).

On a CPU both kinds use PyTorch's fused kernel if it applies: no soft cap, K as wide as V, and no row without keys.
Units with few rows that read little, as in decode steps, are computed by `radixgen.kernels.compiled_attention`, and
partial results are merged there. `FUSED = False` disables both.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import Plan, Window, first_seen
from radixgen.kernels import compiled_attention
from radixgen.kernels.compiled_attention import CompiledUnits
from radixgen.kernels.merge import apply_sinks, merge_partials
from radixgen.kernels.quantized import KV, QuantizedKV, read, write
from radixgen.kernels.torch_blocks import BlockAttention

_NEVER = np.iinfo(np.int32).max

FUSED = True

LONG_RUN = {"cpu": 256, "cuda": 4096}
"""Average keys per segment from which a unit is read in place instead of gathered."""

_CHUNK = 2048
"""Quantized keys that are converted at a time, so that they stay in the processor's cache."""
_FEW_ROWS = 64
"""With at most this many query-head rows, converting a whole run for the fused kernel costs more than it saves."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Keys `[start, start + length)` in the pool, and which of them are hidden from which rows (None: none)."""

    start: int
    length: int
    hidden: Tensor | None
    """`[rows, length]` bool."""
    blind: bool = False
    """Whether some row sees none of the keys."""


@dataclass(frozen=True, slots=True)
class _LongUnit:
    first: int
    stop: int
    runs: list[_Run]
    partial: int
    """Index of the unit's first row among the partial results."""


@dataclass(frozen=True, slots=True)
class _PaddedUnits:
    """Units of similar size, padded to the same number of rows and keys."""

    rows: Tensor
    """`[units, rows]` int64, padded with the unit's first row."""
    slots: Tensor
    """`[units, keys]` int64, padded with slot 0."""
    hidden: Tensor | None
    """`[units, 1, rows, 1, keys]` bool."""
    unseen: Tensor | None
    """`[units, keys, 1, 1]` bool: keys that no row of the unit sees."""
    fusible: bool
    """Whether every row, including padding, sees a key."""
    source: Tensor
    """`[n]`: indices of real rows in the flattened `[units, rows]` results."""
    partial: Tensor
    """`[n]`: their indices among the partial results."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Inputs of one layer: k `[slots, kv_heads, head_dim]`, v `[slots, kv_heads, v_head_dim]`."""

    k: KV
    v: KV
    softcap: float | None
    fuse: bool
    """Whether PyTorch's fused kernel supports the layer."""


def runs_on(device: torch.device) -> bool:
    """Return True: PyTorch supports every device."""
    return True


class TorchKVWriter:
    """Writes KV by PyTorch's indexing."""

    def __init__(self, slots: NDArray[np.int64] | Tensor, device: torch.device) -> None:
        slots = np.asarray(slots)
        rows = np.flatnonzero(slots >= 0)
        self._rows = torch.from_numpy(rows).to(device) if rows.size < slots.size else None
        self._slots = torch.from_numpy(slots[rows]).to(device)

    def __call__(self, key: Tensor, value: Tensor, k: KV, v: KV) -> None:
        """As `radixgen.kernels.backend.KVWriter`."""
        if self._rows is not None:
            key, value = key[self._rows], value[self._rows]
        write(k, self._slots, key)
        write(v, self._slots, value)


class TorchAttention:
    """Attention over a plan in plain PyTorch."""

    def __init__(self, plan: Plan, window: Window | None, device: torch.device) -> None:
        plan = plan.within(window)
        self._device = device
        self._plan = plan
        sizes = np.diff(plan.unit_rows, axis=1)[:, 0].astype(np.int64)
        self._offsets = np.cumsum(sizes) - sizes
        self._num_partials = int(sizes.sum())
        counts = np.diff(plan.unit_segments, axis=1)[:, 0]
        owners = np.repeat(np.arange(plan.num_units), counts)
        keys = np.bincount(owners, weights=plan.segment_lengths, minlength=plan.num_units)
        self._keys = keys.astype(np.int64)
        self._owners = owners
        long = self._keys >= LONG_RUN.get(device.type, 4096) * np.maximum(counts, 1)
        long &= self._dense(plan)
        chooses = plan.unit_blocks > 0
        self._long = [self._long_unit(unit) for unit in np.flatnonzero(long & ~chooses).tolist()]
        self._short = np.flatnonzero(~long & ~chooses)
        self._compiled = CompiledUnits(plan, self._short, self._keys, self._offsets)
        self._choosing = BlockAttention(plan, self._offsets, device) if plan.selects else None
        self._in_order = plan.single and bool((np.diff(plan.unit_rows[:, 0]) > 0).all())

    def __call__(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `radixgen.kernels.backend.Attention`."""
        rows, q_heads, head_dim = q.shape
        kv_heads, group = k.shape[1], q_heads // k.shape[1]
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries = (q.to(dtype) * scale).view(rows, kv_heads, group, head_dim)
        shape = (self._num_partials, kv_heads, group)
        out = queries.new_zeros((*shape, v.shape[2]))
        lse = queries.new_full(shape, float("-inf"))
        fuse = FUSED and q.device.type == "cpu" and softcap is None and head_dim == v.shape[2]
        layer = _Layer(k, v, softcap, fuse)
        packed = queries.transpose(0, 1).reshape(kv_heads, rows * group, head_dim)
        for unit in self._long:
            stop = unit.partial + unit.stop - unit.first
            _attend_long(unit, packed, layer, out[unit.partial : stop], lse[unit.partial : stop])
        if FUSED and self._compiled.supports(queries, k, v):
            self._compiled.attend(queries, k, v, softcap, out, lse)
        else:
            for padded in self._padded:
                _attend_padded(padded, queries, layer, out, lse)
        if self._choosing is not None:
            assert bounds is not None
            self._choosing(packed, k, v, bounds, softcap, out, lse)
        if not self._in_order:
            out, lse = self._merge(out, lse)
        out, lse = out.view(rows, q_heads, -1), lse.view(rows, q_heads)
        if sinks is not None:
            out = apply_sinks(out, lse, sinks)
        return out.to(q.dtype), lse

    @cached_property
    def _padded(self) -> list[_PaddedUnits]:
        sizes = np.diff(self._plan.unit_rows, axis=1)[:, 0]
        return [self._pad(units) for units in self._classes(self._short, sizes)]

    def _merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the partial results of each row, as `merge_partials`."""
        if FUSED and compiled_attention.merges(out):
            return compiled_attention.merge(out, lse, *self._partials_by_row)
        return merge_partials(out, lse, self._merge_order, self._plan.num_rows)

    @staticmethod
    def _dense(plan: Plan) -> NDArray[np.bool_]:
        """Return which units have no key hidden from all rows by a window: their rows' positions have no gaps larger
        than it.
        """
        if plan.window is None:
            return np.ones(plan.num_units, np.bool_)
        ordered = [np.unique(plan.row_positions[a:b]) for a, b in plan.unit_rows.tolist()]
        return np.array([(first_seen(plan.window, p[1:]) <= p[:-1] + 1).all() for p in ordered], np.bool_)

    def _long_unit(self, unit: int) -> _LongUnit:
        plan = self._plan
        first, stop = plan.unit_rows[unit].tolist()
        positions = plan.row_positions[first:stop]
        runs = []
        for segment in range(*plan.unit_segments[unit].tolist()):
            start, length = int(plan.segment_starts[segment]), int(plan.segment_lengths[segment])
            begin = int(plan.segment_positions[segment])
            seen_by = plan.segment_rows[segment] - first
            clear = self._clear_length(positions, begin, length, seen_by)
            if clear:
                runs.append(_Run(start, clear, None))
            if clear < length:
                keys = np.arange(begin + clear, begin + length, dtype=np.int32)
                hidden = _hidden(positions, keys, plan.window)
                hidden[: seen_by[0]] = True
                hidden[seen_by[1] :] = True
                blind = bool(hidden.all(axis=1).any())
                runs.append(_Run(start + clear, length - clear, self._to_device(hidden), blind))
        return _LongUnit(first, stop, runs, int(self._offsets[unit]))

    def _clear_length(self, positions: NDArray[np.int32], begin: int, length: int, seen_by: NDArray[np.int32]) -> int:
        """Return the number of leading keys of a segment that every row sees."""
        if self._plan.window is not None and begin < first_seen(self._plan.window, int(positions.max())):
            return 0
        if seen_by[1] - seen_by[0] < positions.size:
            return 0
        return min(max(int(positions.min()) + 1 - begin, 0), length)

    def _classes(self, units: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Group units by the powers of two above their rows and keys."""
        classes: dict[tuple[int, int], list[int]] = defaultdict(list)
        rows = np.ceil(np.log2(np.maximum(sizes[units], 1))).astype(int).tolist()
        keys = np.ceil(np.log2(np.maximum(self._keys[units], 16))).astype(int).tolist()
        for unit, row_class, key_class in zip(units.tolist(), rows, keys, strict=True):
            classes[row_class, key_class].append(unit)
        return [np.array(members, np.int64) for members in classes.values()]

    def _pad(self, units: NDArray[np.int64]) -> _PaddedUnits:
        plan = self._plan
        first, stop = plan.unit_rows[units, 0].astype(np.int64), plan.unit_rows[units, 1]
        sizes = stop - first
        ranks = np.arange(sizes.max())
        real = ranks < sizes[:, None]
        rows = np.where(real, first[:, None] + ranks, first[:, None])
        keys = self._keys[units]
        width = max(int(keys.max()), 1)
        slots = np.zeros((units.size, width), np.int64)
        key_positions = np.full((units.size, width), _NEVER, np.int32)
        seen_from = np.zeros((units.size, width), np.int32)
        seen_to = np.zeros((units.size, width), np.int32)

        place = np.full(plan.num_units, -1, np.int64)
        place[units] = np.arange(units.size)
        segments = np.flatnonzero(place[self._owners] >= 0)
        lengths = plan.segment_lengths[segments]
        total = int(lengths.sum())
        segment_of = np.repeat(segments, lengths)
        within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        unit_of = place[self._owners[segment_of]]
        column = np.arange(total) - np.repeat(np.cumsum(keys) - keys, keys)
        slots[unit_of, column] = plan.segment_starts[segment_of] + within
        key_positions[unit_of, column] = plan.segment_positions[segment_of] + within
        seen_from[unit_of, column] = plan.segment_rows[segment_of, 0]
        seen_to[unit_of, column] = plan.segment_rows[segment_of, 1]

        hidden = _hidden(plan.row_positions[rows], key_positions, plan.window)
        hidden |= rows[:, :, None] < seen_from[:, None]
        hidden |= rows[:, :, None] >= seen_to[:, None]
        unseen: NDArray[np.bool_] = np.logical_and.reduce(hidden, axis=1)
        source = np.flatnonzero(real)
        partial = (self._offsets[units][:, None] + ranks)[real]
        return _PaddedUnits(
            rows=self._to_device(rows),
            slots=self._to_device(slots),
            hidden=self._to_device(hidden[:, None, :, None]) if hidden.any() else None,
            unseen=self._to_device(unseen[:, :, None, None]) if unseen.any() else None,
            fusible=not hidden.all(axis=-1).any(),
            source=self._to_device(source),
            partial=self._to_device(partial),
        )

    @cached_property
    def _partials_by_row(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the partial results of each row begin, `[rows + 1]`, among the indices of all, sorted by row and from
        the root down.
        """
        plan = self._plan
        sizes = np.diff(plan.unit_rows, axis=1)[:, 0]
        rows = np.arange(self._num_partials) + np.repeat(plan.unit_rows[:, 0] - self._offsets, sizes)
        partials = np.lexsort((np.repeat(plan.unit_rank, sizes), rows))
        return np.searchsorted(rows[partials], np.arange(plan.num_rows + 1)), partials

    @cached_property
    def _merge_order(self) -> list[tuple[Tensor, Tensor]]:
        """Return, for the first, second, … partial result of each row from the root down, the rows that have it, and
        its index.
        """
        firsts, partials = self._partials_by_row
        counts = np.diff(firsts)
        taken = [np.flatnonzero(counts > k) for k in range(int(counts.max()))]
        return [(self._to_device(rows), self._to_device(partials[firsts[rows] + k])) for k, rows in enumerate(taken)]

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _hidden(
    row_positions: NDArray[np.int32], key_positions: NDArray[np.int32], window: Window | None
) -> NDArray[np.bool_]:
    """Apply the causal mask by position: `[..., rows]` and `[..., keys]` give `[..., rows, keys]`."""
    rows, keys = row_positions[..., :, None], key_positions[..., None, :]
    hidden: NDArray[np.bool_] = keys > rows
    if window is not None:
        hidden |= keys < first_seen(window, rows)
    return hidden


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unnormalized probabilities (in place of `scores`), their sum, and the LSE; 0 and -inf without keys."""
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top.isneginf(), 0.0, top)
    probabilities = scores.sub_(top).exp_()
    total = probabilities.sum(-1, keepdim=True)
    return probabilities, total.clamp_min(torch.finfo(total.dtype).tiny), top + total.log()


def _attend_long(unit: _LongUnit, packed: Tensor, layer: _Layer, out: Tensor, lse: Tensor) -> None:
    """Compute one unit: packed `[kv_heads, rows * group, head_dim]` against its runs, in place in the pool."""
    rows, kv_heads, group, _ = out.shape
    q = packed[:, unit.first * group : unit.stop * group]
    few = isinstance(layer.k, QuantizedKV) and q.shape[1] <= _FEW_ROWS
    if layer.fuse and len(unit.runs) == 1 and not unit.runs[0].blind and not few:
        _attend_run(unit.runs[0], q, layer, out, lse)
        return
    keys = sum(run.length for run in unit.runs)
    scores = q.new_empty((kv_heads, rows * group, keys))
    column = 0
    for run in unit.runs:
        part = scores[:, :, column : column + run.length]
        _score_run(run, q, layer.k, part)
        if layer.softcap is not None:
            part.div_(layer.softcap).tanh_().mul_(layer.softcap)
        if run.hidden is not None:
            part.view(kv_heads, rows, group, run.length).masked_fill_(run.hidden[:, None], float("-inf"))
        column += run.length
    probabilities, total, unit_lse = _softmax(scores)
    values: Tensor | None = None
    column = 0
    for run in unit.runs:
        product = _weigh_run(run, probabilities[:, :, column : column + run.length], layer.v)
        values = product if values is None else values.add_(product)
        column += run.length
    assert values is not None
    values.div_(total)
    out.copy_(values.view(kv_heads, rows, group, -1).transpose(0, 1))
    lse.copy_(unit_lse.view(kv_heads, rows, group).transpose(0, 1))


def _score_run(run: _Run, q: Tensor, k: KV, scores: Tensor) -> None:
    """Write scores `[kv_heads, rows, keys]` of q `[kv_heads, rows, head_dim]` and the keys of a run."""
    if not isinstance(k, QuantizedKV):
        torch.matmul(q, k[run.start : run.start + run.length].permute(1, 2, 0).to(q.dtype), out=scores)
        return
    for slots, columns in _chunks(run):
        torch.matmul(q, k.data[slots].permute(1, 2, 0).to(q.dtype), out=scores[:, :, columns])
        scores[:, :, columns].mul_(k.scales[:, None, slots])


def _weigh_run(run: _Run, weights: Tensor, v: KV) -> Tensor:
    """Return the sum `[kv_heads, rows, v_head_dim]` of a run's values by weights `[kv_heads, rows, keys]`, which may be
    changed.
    """
    if not isinstance(v, QuantizedKV):
        return torch.matmul(weights, v[run.start : run.start + run.length].transpose(0, 1).to(weights.dtype))
    total = weights.new_zeros((*weights.shape[:2], v.shape[2]))
    for slots, columns in _chunks(run):
        scaled = weights[:, :, columns].mul_(v.scales[:, None, slots])
        total.baddbmm_(scaled, v.data[slots].transpose(0, 1).to(weights.dtype))
    return total


def _chunks(run: _Run) -> Iterator[tuple[slice, slice]]:
    """Yield the slots of a run in chunks, and their places in the run."""
    for first in range(0, run.length, _CHUNK):
        stop = min(first + _CHUNK, run.length)
        yield slice(run.start + first, run.start + stop), slice(first, stop)


def _attend_run(run: _Run, q: Tensor, layer: _Layer, out: Tensor, lse: Tensor) -> None:
    """Compute one unit with one run by the fused kernel: q `[kv_heads, rows * group, head_dim]`."""
    rows, kv_heads, group, _ = out.shape
    slots = slice(run.start, run.start + run.length)
    key, value = (read(pool, slots, q.dtype).transpose(0, 1) for pool in (layer.k, layer.v))
    hidden = None if run.hidden is None else run.hidden[None, None, :, None]
    values, run_lse = _fused(q[None], key[None], value[None], _bias(hidden, group, q))
    out.copy_(values.view(kv_heads, rows, group, -1).transpose(0, 1))
    lse.copy_(run_lse.view(kv_heads, rows, group).transpose(0, 1))


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run PyTorch's fused CPU attention and return its LSE; q `[batch, heads, rows, head_dim]`, already scaled.

    The public `scaled_dot_product_attention` runs this kernel and discards the LSE.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=1.0)
    return out.contiguous(), lse


def _bias(hidden: Tensor | None, group: int, like: Tensor) -> Tensor | None:
    """Convert a mask `[units, 1, rows, 1, keys]` to an additive mask `[units, 1, rows * group, keys]`."""
    if hidden is None:
        return None
    units, _, rows, _, keys = hidden.shape
    bias = like.new_zeros(()).masked_fill(hidden, float("-inf"))
    return bias.expand(units, 1, rows, group, keys).reshape(units, 1, rows * group, keys)


def _attend_padded(padded: _PaddedUnits, queries: Tensor, layer: _Layer, out: Tensor, lse: Tensor) -> None:
    """Compute padded units together: queries `[rows, kv_heads, group, head_dim]` against gathered keys."""
    units, rows = padded.rows.shape
    keys = padded.slots.shape[1]
    _, kv_heads, group, head_dim = queries.shape
    q = queries[padded.rows].transpose(1, 2).reshape(units, kv_heads, rows * group, head_dim)
    flat = padded.slots.view(-1)
    key = read(layer.k, flat, q.dtype).view(units, keys, kv_heads, head_dim)
    value = read(layer.v, flat, q.dtype).view(units, keys, kv_heads, -1)
    if padded.unseen is not None:
        key.masked_fill_(padded.unseen, 0.0)
        value.masked_fill_(padded.unseen, 0.0)
    if layer.fuse and padded.fusible:
        values, padded_lse = _fused(q, key.transpose(1, 2), value.transpose(1, 2), _bias(padded.hidden, group, q))
    else:
        scores = torch.matmul(q, key.permute(0, 2, 3, 1))
        if layer.softcap is not None:
            scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
        if padded.hidden is not None:
            scores.view(units, kv_heads, rows, group, keys).masked_fill_(padded.hidden, float("-inf"))
        probabilities, total, padded_lse = _softmax(scores)
        values = torch.matmul(probabilities, value.transpose(1, 2)).div_(total)
    values = values.view(units, kv_heads, rows, group, -1).transpose(1, 2)
    padded_lse = padded_lse.view(units, kv_heads, rows, group).transpose(1, 2)
    out[padded.partial] = values.reshape(units * rows, kv_heads, group, -1)[padded.source]
    lse[padded.partial] = padded_lse.reshape(units * rows, kv_heads, group)[padded.source]
