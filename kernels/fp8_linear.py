"""Linear layers with weights and inputs in FP8 (e4m3) on NVIDIA GPUs from Ada on (8.9): by `torch._scaled_mm`, and for
few rows on Hopper by `radixgen.kernels.skinny_gemm`.

Weights have one scale, or one per output. Inputs have one fixed scale, or one per row that follows from the row
(FP8 Formats for Deep Learning, arXiv 2209.05433).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from radixgen.kernels import skinny_gemm
from radixgen.kernels.chip import Chip

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_TILE = 16
"""`torch._scaled_mm` takes multiples of so many inputs and outputs."""
_SMALLEST = 1e-12
"""Least scale, for rows of zeros."""


class Fp8Weight(NamedTuple):
    """Weights `codes * scales`."""

    codes: Tensor
    """float8_e4m3fn `[outputs, inputs]`."""
    scales: Tensor
    """float32, `[1]` or `[outputs]`."""
    input_scale: Tensor | None
    """float32 `[1]`: the fixed scale of inputs; None for one per row."""


def supports(weight: Fp8Weight) -> bool:
    """Return whether `fp8_linear` can multiply by this weight: on a GPU of compute capability 8.9 or later, inputs and
    outputs in multiples of 16.
    """
    if not weight.codes.is_cuda or any(size % _TILE for size in weight.codes.shape):
        return False
    return Chip.of(weight.codes.device).has_fp8


def quantize(weight: Tensor) -> Fp8Weight:
    """Round `weight [outputs, inputs]` to FP8, with a scale per output; inputs are scaled by rows."""
    scales = weight.abs().amax(1).float().clamp_min(_SMALLEST) / LARGEST
    codes = (weight.float() / scales[:, None]).to(DTYPE)
    return Fp8Weight(codes, scales, None)


def can_stack(weights: list[Fp8Weight]) -> bool:
    """Return whether the layers scale their inputs in the same way."""
    return len({None if weight.input_scale is None else float(weight.input_scale) for weight in weights}) <= 1


def stack(weights: list[Fp8Weight]) -> Fp8Weight:
    """Return weights of layers with the same input as one, outputs after outputs. Requires `can_stack`."""
    codes = torch.cat([weight.codes for weight in weights])
    scales = torch.cat([weight.scales.expand(weight.codes.shape[0]) for weight in weights])
    return Fp8Weight(codes, scales, weights[0].input_scale)


def round_rows(given: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round rows `[rows, inputs]` to FP8; beyond a fixed scale, numbers are clipped.

    Returns the codes `[rows, inputs]`, and scales in float32: `[1]` if fixed, else `[rows, 1]`.
    """
    if input_scale is None:
        scales = given.abs().amax(1, keepdim=True).float().clamp_min(_SMALLEST) / LARGEST
    else:
        scales = input_scale
    return (given.float() / scales).clamp(-LARGEST, LARGEST).to(DTYPE), scales


def fp8_linear(given: Tensor, weight: Fp8Weight, *, skinny: bool = False) -> Tensor:
    """Multiply `given [..., inputs]` by `weight`, in the dtype of `given`. Requires `supports`.

    `skinny`: whether few rows go through `radixgen.kernels.skinny_gemm`, which must support the codes.
    """
    rows = given.reshape(-1, given.shape[-1])
    codes, scales = round_rows(rows, weight.input_scale)
    if skinny and (parts := skinny_gemm.linear_parts(codes, weight.codes)) is not None:
        scaled = parts.sum(0) * scales * weight.scales
        return scaled.to(given.dtype).view(*given.shape[:-1], weight.codes.shape[0])
    if weight.input_scale is not None and weight.scales.numel() == 1:
        scales, outputs = scales.squeeze(), weight.scales.squeeze()
    else:
        scales = scales.expand(rows.shape[0], 1).contiguous()
        outputs = weight.scales.expand(weight.codes.shape[0]).contiguous()[None]
    product: Tensor = torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scales, scale_b=outputs, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.to(given.dtype).view(*given.shape[:-1], weight.codes.shape[0])


def fp8_linear_reference(given: Tensor, weight: Fp8Weight) -> Tensor:
    """As `fp8_linear`, by inputs and weights in float32, on any device."""
    rows = given.reshape(-1, given.shape[-1])
    codes, scales = round_rows(rows, weight.input_scale)
    product = linear(codes.float() * scales, weight.codes.float() * weight.scales[:, None])
    return product.to(given.dtype).view(*given.shape[:-1], weight.codes.shape[0])
