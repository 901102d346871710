"""Matrix products of few rows, for weights that take longer to read than to multiply by.

`parts` is by the kernel of `radixgen.kernels.product_kernels`; `torch.nn.functional.linear` is its plain twin, and what
answers everything that `takes` refuses.
"""

from functools import cache

import torch
from torch import Tensor

from radixgen.kernels import gluon

MOST_ROWS = 64
"""Beyond it cuBLAS is faster."""
_TILE = 128
"""Outputs, and inputs, of one tile"""


def takes(weight: Tensor) -> bool:
    """Whether the kernel multiplies by this weight `[outputs, inputs]`: on Hopper, where this Triton compiles it."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return False
    hopper = torch.cuda.get_device_capability(weight.device) == (9, 0)
    return hopper and gluon.usable() and weight.shape[0] % _TILE == 0 and weight.shape[1] % _TILE == 0


def split_for(outputs: int, inputs: int, programs: int) -> int:
    """Into how many parts of its inputs a product is cut: as many as give each program one segment."""
    tiles, split = outputs // _TILE, 1
    while tiles * split * 2 <= programs and inputs // _TILE % (split * 2) == 0:
        split *= 2
    return split


def linear(given: Tensor, weight: Tensor) -> Tensor:
    """`given [..., inputs]` times `weight [outputs, inputs]`, a weight that the kernel `takes`."""
    rows = given.numel() // given.shape[-1]
    if not 0 < rows <= MOST_ROWS:
        return torch.nn.functional.linear(given, weight)
    found: Tensor = torch.ops.radixgen.parts(given.reshape(rows, given.shape[-1]), weight)
    summed = found[0] if found.shape[0] == 1 else found.sum(0).to(given.dtype)
    return summed.reshape(*given.shape[:-1], weight.shape[0])


def parts(given: Tensor, weight: Tensor) -> Tensor:
    """`given [rows, inputs]` times `weight [outputs, inputs]`, in parts to be added up in their order: `[parts, rows,
    outputs]`, float32 but for a single one. A row's bits depend neither on the others nor on their number.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from radixgen.kernels.product_kernels import product

    rows, (outputs, inputs) = given.shape[0], weight.shape
    programs = _programs(weight.device)
    split = split_for(outputs, inputs, programs)
    block_rows, stages, lag = _blocks(rows)
    segments = outputs // _TILE * split
    given = given.contiguous()
    layouts = gl.NVMMASharedLayout(128, 16, 3), gl.NVMMASharedLayout(128, 16, 2)
    weights = TensorDescriptor(weight, [1, *weight.shape], [weight.numel(), inputs, 1], [1, _TILE, _TILE], layouts[0])
    rows_in = TensorDescriptor(given, list(given.shape), list(given.stride()), [block_rows, _TILE], layouts[1])
    found = _empty_parts(given, weight, split)
    product[(min(segments, programs) if split == 1 else segments,)](
        weights, rows_in, found, rows, 1, inputs // _TILE // split, segments, 1, outputs,
        BLOCK_N=_TILE, BLOCK_M=block_rows, BLOCK_K=_TILE, STAGES=stages, LAG=lag, SPLIT=split,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return found


def _blocks(rows: int) -> tuple[int, int, int]:
    """Rows of a block, stages of a ring of about 200 KiB, and products that are left running."""
    if rows <= 16:
        return (8 if rows <= 8 else 16), 6, 0
    return (32, 5, 0) if rows <= 32 else (64, 4, 1)


def _empty_parts(given: Tensor, weight: Tensor, split: int) -> Tensor:
    dtype = given.dtype if split == 1 else torch.float32
    return given.new_empty((split, given.shape[0], weight.shape[0]), dtype=dtype)


@cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def register() -> None:
    """Make `parts` known to PyTorch as `radixgen::parts`, which a compiled model calls as it is; it adds the parts up
    where it reads them.
    """
    if hasattr(torch.ops.radixgen, "parts"):
        return

    @torch.library.custom_op("radixgen::parts", mutates_args=())
    def operator(given: Tensor, weight: Tensor) -> Tensor:
        return parts(given, weight)

    @operator.register_fake
    def _(given: Tensor, weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape
        split = split_for(outputs, inputs, _programs(weight.device))
        return _empty_parts(given, weight, split)
