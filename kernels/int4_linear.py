"""Linear layers with weights of 4 bits on a CPU, by PyTorch's own operator: a scale and an offset per 32 inputs.

The operator multiplies in bfloat16 and adds up in float32. It unpacks the weights again for every few rows, so that it
is fast for few rows only.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

GROUP = 32
"""Inputs with one scale and offset; also the size of GGUF's blocks."""
_LEVELS = 15
_MIDDLE = 8
"""The code that stands for the offset alone."""
_OUTPUTS = 16
"""The operator takes multiples of so many outputs."""


class Int4Weight(NamedTuple):
    """Weights `codes * scales + minima`, of which each group of inputs has its own."""

    codes: Tensor
    """uint8 `[outputs, inputs]`, from 0 to 15."""
    scales: Tensor
    """float32 `[outputs, inputs / 32]`."""
    minima: Tensor
    """As `scales`."""


class PackedInt4(NamedTuple):
    """An `Int4Weight` as the operator reads it."""

    codes: Tensor
    """uint8, two codes a byte, in an order that depends on the processor."""
    scales: Tensor
    """bfloat16 `[inputs / 32, outputs, 2]`: scale, and what code 8 stands for. Outputs are padded to multiples of 16.
    """
    outputs: int


def supported() -> bool:
    """Return whether this build of PyTorch has the operator."""
    return hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def quantize(weight: Tensor) -> Int4Weight:
    """Round `weight [outputs, inputs]` to 4 bits: each group from its least number to its largest in 15 steps."""
    groups = weight.float().view(len(weight), -1, GROUP)
    minima, largest = groups.aminmax(dim=2)
    scales = (largest - minima) / _LEVELS
    codes = (groups - minima[..., None]) / torch.where(scales == 0, 1, scales)[..., None]
    return Int4Weight(codes.round_().clamp_(0, _LEVELS).to(torch.uint8).flatten(1), scales, minima)


def stack(weights: list[Int4Weight]) -> Int4Weight:
    """Return weights of layers with the same input as one, outputs after outputs."""
    return Int4Weight(*(torch.cat(parts) for parts in zip(*weights, strict=True)))


def pack(weight: Int4Weight) -> PackedInt4:
    """Bring a weight into the operator's layout. Requires `supported`."""
    outputs = weight.codes.shape[0]
    codes, scales, minima = (pad(part, (0, 0, 0, -outputs % _OUTPUTS)) for part in weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    pairs = torch.stack((scales, minima + _MIDDLE * scales), 2).transpose(0, 1)
    return PackedInt4(packed, pairs.contiguous().to(torch.bfloat16), outputs)


def dequantize(weight: PackedInt4) -> Tensor:
    """Return the weights in bfloat16 `[outputs, inputs]`: the operator's own, as its products with an identity."""
    inputs = weight.scales.shape[0] * GROUP
    return int4_linear(torch.eye(inputs, dtype=torch.bfloat16), weight).t()


def int4_linear(given: Tensor, weight: PackedInt4) -> Tensor:
    """Multiply `given [..., inputs]` by `weight`, in the dtype of `given`. A row's bits do not depend on other rows."""
    rows = given.reshape(-1, given.shape[-1]).to(torch.bfloat16).contiguous()
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight.codes, GROUP, weight.scales)
    return product[:, : weight.outputs].to(given.dtype).view(*given.shape[:-1], weight.outputs)


def int4_linear_reference(given: Tensor, weight: PackedInt4) -> Tensor:
    """As `int4_linear`, by weights in float32."""
    rounded = given.to(torch.bfloat16).float()
    return linear(rounded, dequantize(weight).float()).to(given.dtype)
