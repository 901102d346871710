"""Tree attention by the Triton kernels: one launch for all units of the plan, one more where rows have partials."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radixgen.core import Plan
from radixgen.kernels import torch_backend, triton_kernels
from radixgen.kernels.geometry import LEAST_RUN, Geometry
from radixgen.kernels.work import TABLES, Launch, Work, lay_out


@dataclass(frozen=True, slots=True)
class Chip:
    """What a launch is shaped for."""

    capability: int
    """80 for sm_80, 90 for sm_90"""
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> "Chip":
        """The device's chip; in the interpreter a small one that is like sm_90."""
        if device.type != "cuda":
            return cls(90, 3)
        found = torch.cuda.get_device_properties(device)
        return cls(10 * found.major + found.minor, found.multi_processor_count)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a multiprocessor that blocks of keys in flight may take."""
        return (208 if self.capability >= 90 else 144) * 1024


def choose_launch(geometry: Geometry, tile_rows: int, chip: Chip) -> Launch:
    """The launch for a plan whose tiles hold at most `tile_rows` query heads' rows: of 16, 16 and 64, or 128.

    64 rows by 4 warps, two programs a multiprocessor, do as well as 128 by 8 warps (`bench/NOTES.md`) and share a
    launch with narrow tiles without spilling; 128 are for groups of more than 64 heads.
    """
    narrow = max(tile_rows, geometry.group) <= 16
    large = max(geometry.padded) > 128
    if geometry.dtype == torch.float32:
        tiles, warps, programs = (max(16, triton.next_power_of_2(geometry.group)), 0, 0), 4, 1
    elif narrow:
        tiles, warps, programs = (16, 0, 0), 4 if large else 2, 2 if large else 4
    elif geometry.group <= 64:
        tiles, warps, programs = (16, 64, 0), 8 if large or chip.capability < 90 else 4, 1 if large else 2
    else:
        tiles, warps, programs = (0, 0, 128), 8, 1
    block_keys = 32 if narrow or large else 64
    room = chip.shared_bytes // programs
    block_bytes = sum(geometry.padded) * geometry.dtype.itemsize
    return Launch(
        tiles=tiles,
        block_keys=block_keys,
        gather_keys=32,
        num_warps=warps,
        num_stages=max(1, min(3, room // (block_keys * block_bytes))),
        gather_stages=max(1, min(5, 1 + room // (32 * block_bytes))),
        programs=programs * chip.multiprocessors,
        least_run=LEAST_RUN if geometry.bulk and chip.capability >= 90 else 0,
    )


def constants(geometry: Geometry, launch: Launch, *, window: bool, softcap: bool, sinks: bool) -> dict[str, Any]:
    """What the attention kernel is compiled for."""
    padded_dim, padded_v_dim = geometry.padded
    return {
        "KV_HEADS": geometry.kv_heads, "GROUP": geometry.group, "HEAD_DIM": geometry.head_dim,
        "V_HEAD_DIM": geometry.v_head_dim, "PADDED_DIM": padded_dim, "PADDED_V_DIM": padded_v_dim,
        "TILES": launch.tiles, "BLOCK_KEYS": launch.block_keys, "GATHER_KEYS": launch.gather_keys,
        "STAGES": launch.num_stages, "GATHER_STAGES": launch.gather_stages, "BULK": launch.least_run > 0,
        "WINDOW": window, "SOFTCAP": softcap, "SINKS": sinks,
    }  # fmt: skip


def runs_on(device: torch.device) -> bool:
    """A CUDA device, or anywhere in Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported)."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


class Writes:
    """New keys and values into their slots, in one launch."""

    def __init__(self, slots: NDArray[np.int64], device: torch.device) -> None:
        self._slots = torch.from_numpy(slots).to(device)

    def __call__(self, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> None:
        """As `radixgen.kernels.Writes`."""
        key = key if key.stride(2) == 1 else key.contiguous()
        value = value if value.stride(2) == 1 else value.contiguous()
        _, kv_heads, head_dim = k.shape
        triton_kernels.write_kv[(self._slots.numel(),)](
            key, value, self._slots, k, v, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            KV_HEADS=kv_heads, HEAD_DIM=head_dim, V_HEAD_DIM=v.shape[2],
            PADDED_K=triton.next_power_of_2(kv_heads * head_dim),
            PADDED_V=triton.next_power_of_2(kv_heads * v.shape[2]),
        )  # fmt: skip


class _Prepared:
    """A plan on the device, for one shape of layers."""

    def __init__(self, plan: Plan, geometry: Geometry, device: torch.device) -> None:
        self.launch = choose_launch(geometry, plan.tile_rows, Chip.of(device))
        self.work: Work = lay_out(plan, self.launch, group=geometry.group, kv_heads=geometry.kv_heads)
        buffer = torch.from_numpy(self.work.buffer).to(device)
        begins = self.work.begins
        views = [buffer[a:b] for a, b in zip(begins[:-1], begins[1:], strict=True)]
        self.tables = dict(zip(TABLES, views, strict=True))
        self.row_positions = torch.from_numpy(plan.row_positions).to(device)
        self.keys = torch.empty((3, max(self.work.num_keys, 1)), dtype=torch.int32, device=device)
        if self.work.num_pieces:
            grid = (min(self.work.num_pieces, 4096),)
            triton_kernels.expand_keys[grid](self.tables["pieces"], self.tables["counts"], *self.keys, BLOCK=128)


class Attention:
    """A plan made ready for one window and device: built once a step, called once a layer."""

    def __init__(self, plan: Plan, window: int | None, device: torch.device) -> None:
        self._whole, self._window, self._device = plan, window, device
        self._plan = plan.within(window)
        self.kv_tokens_read = self._plan.kv_tokens_read
        self.kv_tokens_unshared = self._plan.kv_tokens_unshared
        self._prepared: dict[Geometry, _Prepared] = {}
        self._torch: torch_backend.Attention | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `radixgen.kernels.Attention`; shapes that the kernels don't answer go to PyTorch."""
        geometry = Geometry.of(q, k, v)
        if not geometry.supported or q.dtype != k.dtype or not k.is_contiguous() or not v.is_contiguous():
            if self._torch is None:
                self._torch = torch_backend.Attention(self._whole, self._window, self._device)
            return self._torch(q, k, v, scale, softcap, sinks)
        if geometry not in self._prepared:
            self._prepared[geometry] = _Prepared(self._plan, geometry, self._device)
        return self._attend(self._prepared[geometry], geometry, q.contiguous(), k, v, scale, softcap, sinks)

    def _attend(
        self,
        prepared: _Prepared,
        geometry: Geometry,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, q_heads, _ = q.shape
        launch, work, tables = prepared.launch, prepared.work, prepared.tables
        out = q.new_empty((rows, q_heads, geometry.v_head_dim))
        lse = q.new_empty((rows, q_heads), dtype=torch.float32)
        partial_out = q.new_empty((work.num_partials, q_heads, geometry.v_head_dim), dtype=torch.float32)
        partial_lse = q.new_empty((work.num_partials, q_heads), dtype=torch.float32)
        sinks = None if sinks is None else sinks.float()
        triton_kernels.attend[(launch.programs,)](
            q, k, v, *_blocks(k, v, launch), out, lse, partial_out, partial_lse,
            lse if sinks is None else sinks, prepared.row_positions,
            tables["queue"], tables["items"], tables["runs"], *prepared.keys,
            scale, 0.0 if softcap is None else softcap, 0 if self._window is None else self._window,
            **constants(
                geometry, launch, window=self._window is not None, softcap=softcap is not None, sinks=sinks is not None
            ),
            num_warps=launch.num_warps,
        )  # fmt: skip
        if work.num_merged:
            partials = min(16, triton.next_power_of_2(work.most_partials))
            heads = min(16 // partials, triton.next_power_of_2(q_heads))
            triton_kernels.merge[(work.num_merged, triton.cdiv(q_heads, heads))](
                partial_out, partial_lse, out, lse, lse if sinks is None else sinks, tables["counts"], tables["rows"],
                tables["offsets"], tables["partials"], Q_HEADS=q_heads, V_HEAD_DIM=geometry.v_head_dim,
                PADDED_V_DIM=geometry.padded[1], BLOCK_HEADS=heads, BLOCK_PARTIALS=partials, SINKS=sinks is not None,
            )  # fmt: skip
        return out, lse


def _blocks(k: Tensor, v: Tensor, launch: Launch) -> tuple[object, object]:
    """Descriptors of blocks `[block_keys, dim]` over the pools as `[slots, kv_heads * dim]`, where there are runs."""
    if not launch.least_run:
        return k, v
    flat = [pool.view(pool.shape[0], -1) for pool in (k, v)]
    key, value = (
        TensorDescriptor.from_tensor(pool, [launch.block_keys, whole.shape[2]])
        for pool, whole in zip(flat, (k, v), strict=True)
    )
    return key, value
