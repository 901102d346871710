"""Launch of `radixgen.kernels.hopper_attention_kernels`: the wide tiles of a plan on Hopper."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from radixgen.kernels.quantized import KV, QuantizedKV
from radixgen.kernels.work import TileClass, pdl

if TYPE_CHECKING:
    from radixgen.kernels.triton_backend import LaunchTables

_STAGES = 3
_REGISTERS = {False: (224, 56), True: (192, 64)}
"""Of a thread that attends and of one that copies; the latter also converts quantized keys."""


def attend(
    tables: "LaunchTables", shape: TileClass, positions: Tensor, out: Tensor, lse: Tensor, q: Tensor,
    k: KV, v: KV, scale: float, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Compute the items of the widest class. Rows of a single item go into `out` and `lse`, others into partial
    results.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from radixgen.kernels.hopper_attention_kernels import attend_wide

    launch, geometry, views = tables.launch, tables.geometry, tables.views
    if isinstance(k, QuantizedKV) and isinstance(v, QuantizedKV):
        scales = [k.scales, v.scales]
        fours = torch.int32 if k.dtype == torch.int8 else torch.uint32
        pools = blocks = [k.data.view(fours), v.data.view(fours)]
    else:
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        pools, scales = [k, v], [lse, lse]  # which are not read
        dtype = gl.bfloat16 if k.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for([shape.block_keys, geometry.head_dim], dtype)
        blocks = [
            TensorDescriptor.from_tensor(pool.view(pool.shape[0], -1), [shape.block_keys, pool.shape[2]], layout)
            for pool in pools
        ]
    key_slots, _, key_rows = tables.keys
    consumer, producer = _REGISTERS[geometry.quantized]
    attend_wide[(shape.programs,)](
        q, *pools, *scales, k.shape[0], *blocks, out, lse, tables.partial_out, tables.partial_lse,
        lse if sinks is None else sinks, positions, views["laid_out_positions"], views["queue"], views["items"],
        views["runs"], key_slots, key_rows, scale, KV_HEADS=geometry.kv_heads, GROUP=geometry.group,
        DIM=geometry.head_dim, BLOCK=shape.block_keys, STAGES=_STAGES, SINKS=sinks is not None,
        QUANTIZED=geometry.quantized, PDL=launch.overlap, CONSUMER_REGS=consumer, PRODUCER_REGS=producer, num_warps=4,
        **pdl(launch.overlap),
    )  # fmt: skip
