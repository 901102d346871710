"""Launches for the units of a plan that choose blocks: the choice, then attention to what was chosen.

`radixgen.kernels.torch_blocks` says what is chosen, and does the same in plain PyTorch.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from radixgen.core.plan import BLOCK
from radixgen.kernels import block_kernels
from radixgen.kernels.block_work import CHUNK, BlockSizes, score_rows
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.work import Launch, TileClass, pdl

if TYPE_CHECKING:
    from radixgen.kernels.triton_backend import LaunchTables


class BlockChoice:
    """Device memory of the choices of one kind of layer."""

    def __init__(self, sizes: BlockSizes, device: torch.device) -> None:
        self._lses = torch.empty(max(sizes.lses, 1), dtype=torch.float32, device=device)
        self._weights = torch.empty(max(sizes.weights, 1), dtype=torch.float32, device=device)
        self.lists = torch.empty(max(sizes.lists, 1), dtype=torch.int32, device=device)
        self._candidates = max(16, triton.next_power_of_2(sizes.candidates))

    def choose(
        self, tables: "LaunchTables", shape: TileClass, q: Tensor, bounds: Tensor, scale: float, softcap: float | None
    ) -> None:
        """Choose blocks for q `[rows, q_heads, head_dim]` by bounds `[blocks, kv_heads, 2, head_dim]`."""
        geometry, views, overlap = tables.geometry, tables.views, tables.launch.overlap
        tasks = views["chunks"].numel() // 10 * geometry.kv_heads
        programs = max(min(shape.programs // (2 if shape.rows <= 16 else 1), tasks), 1)
        fixed = scoring(geometry, shape, softcap=softcap is not None, overlap=overlap)
        listed = q, bounds, views["blocks"], views["chunks"], views["counts"], self._lses
        factors = scale, 0.0 if softcap is None else softcap
        block_kernels.sum_scores[(programs,)](
            *listed, *factors, **fixed, num_warps=score_warps(geometry), **pdl(overlap)
        )
        chunks = max(self._candidates // CHUNK, 1)
        block_kernels.weigh_blocks[(programs,)](
            *listed,
            self._weights,
            *factors,
            **fixed,
            MOST_CHUNKS=chunks,
            num_warps=score_warps(geometry),
            **pdl(overlap),
        )
        heads_of_units = min(views["choices"].numel() // 8, len(q)) * geometry.kv_heads
        block_kernels.choose_blocks[(max(min(heads_of_units, shape.programs), 1),)](
            self._weights, views["blocks"], views["choices"], views["counts"], self.lists,
            **choosing(geometry, self._candidates, overlap),
            num_warps=choose_warps(geometry.kv_heads, self._candidates), **pdl(overlap),
        )  # fmt: skip

    def attend(
        self, tables: "LaunchTables", shape: TileClass, q: Tensor, keys: tuple[object, ...], scale: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        """Write the partial results of all chosen blocks. `keys`: K, V, their scales, slots, and blocks of both."""
        launch, views = tables.launch, tables.views
        fixed = attending(tables.geometry, launch, shape, softcap=softcap is not None)
        block_kernels.attend_blocks[(shape.programs,)](
            q, *keys, tables.partial_out, tables.partial_lse, views["block_tiles"], views["counts"], self.lists, scale,
            0.0 if softcap is None else softcap, **fixed, num_warps=shape.num_warps, maxnreg=shape.registers,
            **pdl(launch.overlap),
        )  # fmt: skip


def scoring(geometry: Geometry, shape: TileClass, *, softcap: bool, overlap: bool) -> dict[str, Any]:
    """Return the compile-time constants of the kernels that score blocks."""
    rows = score_rows(shape.rows) if geometry.padded[0] <= 128 else 16  # for want of registers
    return {
        "KV_HEADS": geometry.kv_heads, "GROUP": geometry.group, "HEAD_DIM": geometry.head_dim,
        "PADDED_DIM": geometry.padded[0], "BLOCK_ROWS": rows, "CHUNK": CHUNK, "SOFTCAP": softcap,
        "PDL": overlap,
    }  # fmt: skip


def choosing(geometry: Geometry, candidates: int, overlap: bool) -> dict[str, Any]:
    """Return the compile-time constants of the kernel that chooses among `candidates` blocks or fewer."""
    width = triton.next_power_of_2(geometry.kv_heads)
    return {"KV_HEADS": geometry.kv_heads, "HEADS": width, "BLOCKS": candidates, "PDL": overlap}


def attending(geometry: Geometry, launch: Launch, shape: TileClass, *, softcap: bool) -> dict[str, Any]:
    """Return the compile-time constants of the kernel that attends to chosen blocks."""
    return {
        "KV_HEADS": geometry.kv_heads, "GROUP": geometry.group, "HEAD_DIM": geometry.head_dim,
        "V_HEAD_DIM": geometry.v_head_dim, "PADDED_DIM": geometry.padded[0], "PADDED_V_DIM": geometry.padded[1],
        "BLOCK_ROWS": shape.rows, "BLOCK_KEYS": shape.block_keys, "SLOTS": BLOCK, "STAGES": _stages(shape),
        "BULK": launch.least_run > 0, "SOFTCAP": softcap, "QUANTIZED": geometry.quantized, "PDL": launch.overlap,
    }  # fmt: skip


def _stages(shape: TileClass) -> int:
    """Return Triton's stages: an entry of a list, and the keys that it names, are loaded one after the other."""
    return 2 * shape.num_stages - 1 if shape.rows <= 16 else shape.num_stages


def score_warps(geometry: Geometry) -> int:
    """Return the warps of a program that scores blocks: enough for its registers."""
    return 4 if geometry.padded[0] <= 128 else 8


def choose_warps(heads: int, candidates: int) -> int:
    """Return the warps of a program that chooses among so many blocks of so many heads."""
    return max(4, min(16, int(triton.next_power_of_2(heads) * candidates) // 512))
