"""Matrix products of few rows, bound by reading the weights.

The kernel is in `radixgen.kernels.skinny_gemm_kernels`. `torch.nn.functional.linear` is the reference, and is used for
weights that are not `supported` and for more than `MAX_ROWS` rows.
"""

from functools import cache

import torch
from torch import Tensor, library

from radixgen.kernels import gluon_support
from radixgen.kernels.chip import Chip

MAX_ROWS = 64
"""Beyond it, cuBLAS is faster."""
_TILE = 128
"""Outputs and inputs of one tile."""


def supports(weight: Tensor) -> bool:
    """Return whether the kernel supports this weight `[outputs, inputs]`: contiguous bfloat16, inputs in whole tiles,
    on a Hopper GPU, with a Triton version that compiles the kernel.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return False
    hopper = Chip.of(weight.device).is_hopper
    outputs, inputs = weight.shape
    return hopper and gluon_support.supported() and inputs % _TILE == 0 and outputs >= _TILE and outputs % 8 == 0


def split_k(outputs: int, inputs: int, programs: int) -> int:
    """Return the number of parts of the inputs: doubled while every part has a program of its own; else 1."""
    tiles, split = -(-outputs // _TILE), 1
    while tiles * split * 2 <= programs and inputs // _TILE % (split * 2) == 0:
        split *= 2
    return split


def linear(given: Tensor, weight: Tensor) -> Tensor:
    """Multiply `given [..., inputs]` by `weight [outputs, inputs]`, which must be supported. Requires `register`."""
    parts = linear_parts(given, weight)
    if parts is None:
        return torch.nn.functional.linear(given, weight)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(given.dtype)


def linear_parts(given: Tensor, weight: Tensor) -> Tensor | None:
    """As `linear`, in partial sums `[split, ..., outputs]` as returned by `linear_partials`; None for too many rows."""
    rows = given.numel() // given.shape[-1]
    if not 0 < rows <= MAX_ROWS:
        return None
    parts: Tensor = torch.ops.radixgen.linear_partials(given.reshape(rows, given.shape[-1]), weight)
    return parts.reshape(parts.shape[0], *given.shape[:-1], weight.shape[0])


def linear_partials(given: Tensor, weight: Tensor) -> Tensor:
    """Multiply `given [rows, inputs]` by `weight [outputs, inputs]`, in partial sums to add up in order,
    `[split, rows, outputs]`.

    They are float32, or bfloat16 if there is only one. The bits of a row depend neither on the other rows nor on their
    number.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from radixgen.kernels.skinny_gemm_kernels import linear_kernel

    rows, (outputs, inputs) = given.shape[0], weight.shape
    programs = _programs(weight.device)
    split = split_k(outputs, inputs, programs)
    block_rows, stages, lag = _block(rows)
    segments = -(-outputs // _TILE) * split
    given = given.contiguous()
    layouts = gl.NVMMASharedLayout(128, 16, 3), gl.NVMMASharedLayout(128, 16, 2)
    weights = TensorDescriptor(weight, [1, *weight.shape], [weight.numel(), inputs, 1], [1, _TILE, _TILE], layouts[0])
    rows_in = TensorDescriptor(given, list(given.shape), list(given.stride()), [block_rows, _TILE], layouts[1])
    parts = _empty_partials(given, weight, split)
    linear_kernel[(min(segments, programs) if split == 1 else segments,)](
        weights, rows_in, parts, rows, 1, inputs // _TILE // split, segments, 1, outputs,
        BLOCK_N=_TILE, BLOCK_M=block_rows, BLOCK_K=_TILE, STAGES=stages, LAG=lag, SPLIT=split,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return parts


def _block(rows: int) -> tuple[int, int, int]:
    """Return rows per block, stages of a ring of about 200 KiB, and matrix products in flight."""
    if rows <= 16:
        return (8 if rows <= 8 else 16), 6, 0
    return (32, 5, 0) if rows <= 32 else (64, 4, 1)


def _empty_partials(given: Tensor, weight: Tensor, split: int) -> Tensor:
    dtype = given.dtype if split == 1 else torch.float32
    return given.new_empty((split, given.shape[0], weight.shape[0]), dtype=dtype)


@cache
def _programs(device: torch.device) -> int:
    return Chip.of(device).multiprocessors


def register() -> None:
    """Register `linear_partials` with PyTorch as `radixgen::linear_partials`, opaque to the compiler, which fuses the
    addition of the partial sums into their consumer.
    """
    if hasattr(torch.ops.radixgen, "linear_partials"):
        return

    @library.custom_op("radixgen::linear_partials", mutates_args=())
    def operator(given: Tensor, weight: Tensor) -> Tensor:
        return linear_partials(given, weight)

    @operator.register_fake
    def _(given: Tensor, weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape
        split = split_k(outputs, inputs, _programs(weight.device))
        return _empty_partials(given, weight, split)
