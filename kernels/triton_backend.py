"""Tree attention by the Triton kernels: one launch per class of tiles, and one more to merge partial results."""

from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radixgen.core import Chunk, Plan, Window
from radixgen.kernels import gluon_support, hopper_attention, torch_backend, triton_kernels
from radixgen.kernels.chip import WARP, Chip
from radixgen.kernels.geometry import LEAST_RUN, Geometry
from radixgen.kernels.quantized import KV, LARGEST, QuantizedKV
from radixgen.kernels.triton_blocks import BlockChoice
from radixgen.kernels.upload import Staging, upload
from radixgen.kernels.work import TABLES, Launch, TileClass, Work, lay_out, pdl
from radixgen.kernels.workspace import Workspace

_MOST_STEPS = 64
"""Maximum number of future steps whose keys are listed in tables."""


def overlaps(chip: Chip) -> bool:
    """Return whether a launch may begin while the previous one ends (programmatic dependent launch)."""
    return chip.overlaps and not triton.knobs.runtime.interpret


def takes_wide(geometry: Geometry, chip: Chip) -> bool:
    """Return whether tiles of 128 rows have their own kernel on this chip, for layers without window or soft cap."""
    heads = geometry.head_dim == geometry.v_head_dim == 128 and geometry.group <= 64
    compiles = triton.knobs.runtime.interpret or gluon_support.supported()
    return chip.is_hopper and heads and geometry.dtype in (torch.float16, torch.bfloat16) and compiles


def choose_launch(
    geometry: Geometry, tile_rows: int, chip: Chip, *, rows: int = 64, windowed: bool = False, capped: bool = False,
    block_rows: int = 0,
) -> Launch:  # fmt: skip
    """Choose the launch for a plan of about `rows` rows, whose tiles hold at most `tile_rows` query-head rows: classes
    of 16, 64 and 128 rows, as needed. `block_rows`: as in `Plan`.

    Tiles of 128 rows are for Hopper's own kernel and for groups of more than 64 heads; otherwise 64 perform as well
    (`bench/NOTES.md`).
    """
    wide = tile_rows > 64 and not windowed and not capped and takes_wide(geometry, chip)
    if geometry.dtype == torch.float32:
        sizes = [max(16, triton.next_power_of_2(geometry.group))]
    else:
        most = 128 if wide or geometry.group > 64 else 64
        sizes = [size for size in (16, 64, 128) if geometry.group <= size <= most]
        sizes = sizes[: sum(size < tile_rows for size in sizes) + 1]
    blocks = None
    if block_rows:
        blocks = _tile_class(geometry, _block_tile(geometry, block_rows), chip, rows, windowed, hopper=False)
    return Launch(
        classes=tuple(_tile_class(geometry, size, chip, rows, windowed, wide and size == 128) for size in sizes),
        least_run=LEAST_RUN if geometry.bulk and chip.has_descriptors else 0,
        overlap=overlaps(chip),
        blocks=blocks,
    )


def _block_tile(geometry: Geometry, block_rows: int) -> int:
    """Return the query-head rows of tiles of units that choose blocks."""
    least = max(16, int(triton.next_power_of_2(geometry.group)))
    return least if block_rows == 1 or geometry.dtype == torch.float32 else max(64, least)


def _tile_class(geometry: Geometry, size: int, chip: Chip, rows: int, windowed: bool, hopper: bool) -> TileClass:
    """Choose the launch of tiles of `size` rows.

    64 rows on 4 warps, two programs per multiprocessor, perform as well as 128 on 8. 16 rows on Hopper take one warp in
    eight programs, which hide each other's startup; four for one or two rows; two with a window or quantized keys,
    which need more registers. With a window or quantized keys, tiles of 64 or more have no registers for a fifth stage;
    those of 128, or with quantized keys, never have any to gather 32 keys at once. Quantized keys of 16 rows come in
    blocks of 64, because half as many bytes are as much work.
    """
    crowded = windowed or geometry.quantized
    if hopper:
        return TileClass(size, chip.multiprocessors, block_keys=128, hopper=True)
    large, narrow, recent = max(geometry.padded) > 128, size <= 16, chip.capability >= 90
    block_keys = 32 if large or narrow != geometry.quantized else 64
    if geometry.dtype == torch.float32:
        warps, programs = 4, 1
    elif narrow and recent and not large:
        few = rows <= 2 and not geometry.quantized
        warps, programs, block_keys = (4, 4, 32) if few else (2, 4, block_keys) if crowded else (1, 8, 16)
    elif narrow:
        warps, programs = (4, 2) if large else (2, 4)
    else:
        four = size == 64 and recent and not large
        warps, programs = (4, 2) if four else (8, 1)
    gather_keys = 16 if size > 64 or (geometry.quantized and not narrow) else min(block_keys, 32)
    most_stages = 4 if crowded and not narrow else 5
    room = chip.shared_bytes // programs
    block_bytes = sum(geometry.padded) * geometry.stored_dtype.itemsize
    return TileClass(
        rows=size,
        programs=programs * chip.multiprocessors,
        block_keys=block_keys,
        num_warps=warps,
        num_stages=max(1, min(3, room // (block_keys * block_bytes))),
        gather_keys=gather_keys,
        gather_stages=max(1, min(most_stages, 1 + room // (gather_keys * block_bytes))),
        registers=255 if max(geometry.padded) <= 64 or (narrow and not recent) else None,
    )


def constants(
    geometry: Geometry, launch: Launch, kind: int, *, window: bool, softcap: bool, sinks: bool,
    chunked: bool = False, first: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Return the compile-time constants of the attention kernel for one class of the launch's tiles."""
    shape = launch.classes[kind]
    padded_dim, padded_v_dim = geometry.padded
    return {
        "KV_HEADS": geometry.kv_heads, "GROUP": geometry.group, "HEAD_DIM": geometry.head_dim,
        "V_HEAD_DIM": geometry.v_head_dim, "PADDED_DIM": padded_dim, "PADDED_V_DIM": padded_v_dim,
        "BLOCK_ROWS": shape.rows, "BLOCK_KEYS": shape.block_keys, "GATHER_KEYS": shape.gather_keys,
        "STAGES": shape.num_stages, "GATHER_STAGES": shape.gather_stages, "BULK": launch.least_run > 0,
        "WINDOW": window, "CHUNKED": chunked, "SOFTCAP": softcap, "SINKS": sinks,
        "QUANTIZED": geometry.quantized, "KIND": kind,
        "THREADS": WARP * shape.num_warps, "FIRST": first, "PDL": launch.overlap,
    }  # fmt: skip


def runs_on(device: torch.device) -> bool:
    """Return whether this is a CUDA device, or Triton's interpreter is on (TRITON_INTERPRET=1 before Triton is
    imported).
    """
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


class TritonKVWriter:
    """Writes KV in one launch."""

    def __init__(self, slots: NDArray[np.int64] | Tensor, device: torch.device) -> None:
        self._slots = slots if isinstance(slots, Tensor) else upload(slots, device)
        self._overlap = overlaps(Chip.of(device))

    def __call__(self, key: Tensor, value: Tensor, k: KV, v: KV) -> None:
        """As `radixgen.kernels.backend.KVWriter`."""
        key = key if key.stride(2) == 1 else key.contiguous()
        value = value if value.stride(2) == 1 else value.contiguous()
        num_slots, kv_heads, head_dim = k.shape
        triton_kernels.write_kv[(self._slots.numel(),)](
            key, value, self._slots, _data(k), _data(v), _scales(k), _scales(v), num_slots, key.stride(0),
            key.stride(1), value.stride(0), value.stride(1), KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            V_HEAD_DIM=v.shape[2], PADDED_HEADS=triton.next_power_of_2(kv_heads),
            PADDED_DIM=triton.next_power_of_2(head_dim), PADDED_V_DIM=triton.next_power_of_2(v.shape[2]),
            QUANTIZED=isinstance(k, QuantizedKV), LARGEST=LARGEST.get(k.dtype, 0), PDL=self._overlap,
            **pdl(self._overlap),
        )  # fmt: skip


class LaunchTables:
    """A plan's work on the device, for layers of one shape, and memory for its partial results.

    With a `workspace`, addresses are fixed and have spare room: a launch captured with these tables, for `static_rows`
    rows, works for larger plans too.
    """

    def __init__(
        self,
        work: Work,
        geometry: Geometry,
        launch: Launch,
        device: torch.device,
        workspace: Workspace | None = None,
        static_rows: int = 0,
    ) -> None:
        self.launch, self.geometry = launch, geometry
        self._sizes = work.sizes if workspace is None else workspace.sizes(work.sizes)
        buffer = torch.empty(sum(self._sizes.tables), dtype=torch.int32, device=device)
        self._staging = Staging(buffer)
        views = torch.split(buffer, list(self._sizes.tables))
        self.views = dict(zip(TABLES, views, strict=True))
        self.choice = BlockChoice(self._sizes.blocks, device) if launch.blocks else None
        self.tickets = torch.zeros(len(launch.classes), dtype=torch.int32, device=device)
        self.launched = [kind for kind, used in enumerate(work.used) if used or static_rows][::-1]
        self.keys = torch.empty((3, max(self._sizes.keys, 4)), dtype=torch.int32, device=device)
        self.most_merged = self.views["rows"].numel()
        most = work.most_partials
        if static_rows:  # for any plan: the keys of few rows may be split among all programs
            most = max(4, launch.classes[0].programs // (geometry.kv_heads * static_rows))
        self.merge_block = min(64, triton.next_power_of_2(max(most, 1)))
        partials = self._sizes.partials, geometry.kv_heads * geometry.group, geometry.v_head_dim, device
        self.partial_lse, self.partial_out = (workspace or Workspace()).partials(*partials)
        self.load(work)

    def load(self, work: Work) -> bool:
        """Replace the work. Returns False, with nothing changed, if there is no room for it."""
        if not self._sizes.hold(work.sizes):
            return False
        staged, begin = self._staging.open(), 0
        for size, table in zip(self._sizes.tables, work.tables, strict=True):
            staged[begin : begin + table.size] = table
            begin += size
        self._staging.copy()
        if work.num_pieces:
            grid = (min(work.num_pieces, 4096),)
            triton_kernels.expand_keys[grid](
                self.views["pieces"], self.views["counts"], self.views["laid_out_positions"], *self.keys,
                BLOCK=128, ROWS=triton.next_power_of_2(self.launch.most_rows(self.geometry.group)),
            )  # fmt: skip
        return True


class TritonAttention:
    """Attention over a plan by the Triton kernels."""

    def __init__(self, plan: Plan, window: Window | None, device: torch.device) -> None:
        self._whole, self._window, self._device = plan, window, device
        self._plan = plan.within(window)
        self._positions = upload(plan.row_positions, device)
        self._tables: dict[tuple[Geometry, bool], LaunchTables] = {}
        self._torch: torch_backend.TorchAttention | None = None

    def __call__(
        self, q: Tensor, k: KV, v: KV, scale: float, softcap: float | None = None, sinks: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `radixgen.kernels.backend.Attention`. Shapes that the kernels do not support go to PyTorch."""
        geometry = Geometry.of(q, k, v)
        if not answers(geometry, q, k, v):
            if self._torch is None:
                self._torch = torch_backend.TorchAttention(self._whole, self._window, self._device)
            return self._torch(q, k, v, scale, softcap, sinks, bounds)
        capped = softcap is not None
        if (geometry, capped) not in self._tables:
            chip, rows, windowed = Chip.of(self._device), self._plan.num_rows, self._window is not None
            launch = choose_launch(
                geometry, self._plan.tile_rows, chip, rows=rows, windowed=windowed, capped=capped,
                block_rows=self._plan.block_rows,
            )  # fmt: skip
            work = lay_out(self._plan, launch, group=geometry.group, kv_heads=geometry.kv_heads)
            self._tables[geometry, capped] = LaunchTables(work, geometry, launch, self._device)
        out, lse = _empty_results(q, geometry)
        tables = self._tables[geometry, capped]
        _attend(tables, self._positions, out, lse, q, k, v, scale, self._window, softcap, sinks, bounds)
        return out, lse


class TritonStaticAttention:
    """As `radixgen.kernels.backend.StaticAttention`: tables at fixed addresses, with room for larger plans."""

    def __init__(self, plan: Plan, window: Window | None, positions: Tensor, workspace: Workspace) -> None:
        self._window, self._positions, self._workspace = window, positions, workspace
        self._tile_rows = plan.tile_rows
        self._tables: dict[tuple[Geometry, bool], LaunchTables] = {}
        self._origin: Plan | None = None
        self._last_age = 0
        self.load(plan)

    def load(self, plan: Plan) -> bool:
        """As `radixgen.kernels.backend.StaticAttention.load`."""
        assert plan.tile_rows == self._tile_rows
        if plan.origin is self._origin and plan.age <= self._last_age:
            return True
        self._plan, self._origin = plan, None
        if not all(tables.load(self._lay_out(tables.geometry, tables.launch)) for tables in self._tables.values()):
            return False
        self._origin, self._last_age = plan.origin, plan.age + _slack(plan)
        return True

    def _lay_out(self, geometry: Geometry, launch: Launch) -> Work:
        plan = self._plan.within(self._window)
        return lay_out(plan, launch, group=geometry.group, kv_heads=geometry.kv_heads, slack=_slack(self._plan))

    def __call__(
        self, q: Tensor, k: KV, v: KV, scale: float, softcap: float | None = None, sinks: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `radixgen.kernels.backend.StaticAttention`."""
        geometry = Geometry.of(q, k, v)
        if not answers(geometry, q, k, v):
            raise ValueError(f"no kernel for {geometry}")
        kind = geometry, softcap is not None
        if kind not in self._tables:
            chip, windowed = Chip.of(q.device), self._window is not None
            launch = choose_launch(
                geometry, self._tile_rows, chip, rows=len(q), windowed=windowed, capped=softcap is not None,
                block_rows=0 if windowed else self._plan.block_rows,
            )  # fmt: skip
            work = self._lay_out(geometry, launch)
            self._tables[kind] = LaunchTables(work, geometry, launch, q.device, self._workspace, static_rows=q.shape[0])
        out, lse = _empty_results(q, geometry)
        _attend(self._tables[kind], self._positions, out, lse, q, k, v, scale, self._window, softcap, sinks, bounds)
        return out, lse


def _slack(plan: Plan) -> int:
    """Return the number of future steps to lay tables out for. After them, tables are laid out anew, and keys that were
    gathered are then copied in bulk.
    """
    return min(plan.slack, _MOST_STEPS)


def _empty_results(q: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], geometry.v_head_dim)), q.new_empty(q.shape[:2], dtype=torch.float32)


def answers(geometry: Geometry, q: Tensor, k: KV, v: KV) -> bool:
    """Return whether the kernels support these tensors."""
    return geometry.supported and q.dtype == geometry.dtype and k.is_contiguous() and v.is_contiguous()


def _attend(
    tables: LaunchTables,
    positions: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: KV,
    v: KV,
    scale: float,
    window: Window | None,
    softcap: float | None,
    sinks: Tensor | None,
    bounds: Tensor | None,
) -> None:
    """Run all launches. `out` and `lse` are written for the rows of the plan, and for padding rows.

    Blocks are chosen first, so that other keys are read while the last of these launches, which is small, runs.
    """
    launch, geometry, views, choice = tables.launch, tables.geometry, tables.views, tables.choice
    q, sinks = q.contiguous(), None if sinks is None else sinks.float()
    k_data, v_data = _numbers(k), _numbers(v)
    if choice is not None and launch.blocks is not None:
        assert bounds is not None
        choice.choose(tables, launch.blocks, q, bounds, scale, softcap)
    for kind in tables.launched:
        shape = launch.classes[kind]
        if shape.hopper and not triton.knobs.runtime.interpret:  # Gluon has no interpreter
            hopper_attention.attend(tables, shape, positions, out, lse, q, k, v, scale, sinks)
            continue
        options = constants(
            geometry, launch, kind, window=window is not None, chunked=isinstance(window, Chunk),
            softcap=softcap is not None, sinks=sinks is not None,
            first=kind == tables.launched[0] and choice is None,
        )  # fmt: skip
        triton_kernels.attend[(shape.programs,)](
            q, k_data, v_data, _scales(k), _scales(v), k.shape[0], *_blocks(k_data, v_data, launch, shape), out, lse,
            tables.partial_out, tables.partial_lse, lse if sinks is None else sinks, positions,
            views["laid_out_positions"], views["bounds"], tables.tickets, views["items"], views["runs"], *tables.keys,
            scale, 0.0 if softcap is None else softcap, window.size if isinstance(window, Chunk) else window or 0,
            **options, num_warps=shape.num_warps, maxnreg=shape.registers, **pdl(launch.overlap),
        )  # fmt: skip
    if choice is not None and launch.blocks is not None:
        keys = k_data, v_data, _scales(k), _scales(v), k.shape[0], *_blocks(k_data, v_data, launch, launch.blocks)
        choice.attend(tables, launch.blocks, q, keys, scale, softcap)
    if not tables.most_merged:
        return
    q_heads = q.shape[1]
    heads = min(max(16 // tables.merge_block, 1), triton.next_power_of_2(q_heads))
    triton_kernels.merge[(min(tables.most_merged, len(q)), triton.cdiv(q_heads, heads))](
        tables.partial_out, tables.partial_lse, out, lse, lse if sinks is None else sinks, views["counts"],
        views["rows"], views["offsets"], views["partials"], Q_HEADS=q_heads, V_HEAD_DIM=geometry.v_head_dim,
        PADDED_V_DIM=geometry.padded[1], BLOCK_HEADS=heads, BLOCK_PARTIALS=tables.merge_block,
        SINKS=sinks is not None, PDL=launch.overlap, **pdl(launch.overlap),
    )  # fmt: skip


def _data(pool: KV) -> Tensor:
    """Return K or V without scales."""
    return pool.data if isinstance(pool, QuantizedKV) else pool


def _numbers(pool: KV) -> Tensor:
    """Return K or V without scales, 8-bit numbers in pairs `[slots, kv_heads, dim / 2]`: int16 if they are int8, uint16
    if they are fp8.
    """
    if isinstance(pool, QuantizedKV):
        return pool.data.view(torch.int16 if pool.dtype == torch.int8 else torch.uint16)
    return pool


def _scales(pool: KV) -> Tensor:
    """Return the scales of K or V; if there are none, a tensor that is not read."""
    return pool.scales if isinstance(pool, QuantizedKV) else pool


def _blocks(k: Tensor, v: Tensor, launch: Launch, shape: TileClass) -> tuple[object, object]:
    """Return descriptors of blocks `[block_keys, dim]` over the pools as `[slots, kv_heads * dim]`, if runs exist."""
    if not launch.least_run:
        return k, v
    flat = [pool.view(pool.shape[0], -1) for pool in (k, v)]
    key, value = (
        TensorDescriptor.from_tensor(pool, [shape.block_keys, whole.shape[2]])
        for pool, whole in zip(flat, (k, v), strict=True)
    )
    return key, value
