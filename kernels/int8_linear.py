"""Linear layers with weights of 8 bits on a CPU: one scale per output, products by oneDNN (AMX or VNNI where it is).

Inputs are not rounded to 8 bits, which costs several per cent of perplexity where a few inputs are much larger than the
others (LLM.int8(), arXiv 2208.07339). Each row of inputs becomes two rows of 8-bit digits, about 15 bits, so that only
the weights are rounded. A step of few rows is bound by reading the weights, and the second digit costs little.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from radixgen.kernels import compiled_digits

_LARGEST, _DIGIT, _SMALLEST = map(float, (compiled_digits.LARGEST, compiled_digits.DIGIT, compiled_digits.SMALLEST))


class Int8Weight(NamedTuple):
    """Weights `codes * scales`."""

    codes: Tensor
    """int8 `[outputs, inputs]`."""
    scales: Tensor
    """float32 `[outputs]`."""


class PackedInt8(NamedTuple):
    """An `Int8Weight` as oneDNN reads it."""

    codes: Tensor
    """int8 `[inputs, outputs]` in oneDNN's own layout; `to_dense()` undoes it."""
    scales: Tensor
    """float32 `[outputs]`."""
    zero_points: Tensor
    """Zeros, int64 `[outputs]`."""


def supported() -> bool:
    """Return whether this build of PyTorch has oneDNN's operators for 8 bits."""
    return torch._C._has_mkldnn and hasattr(torch.ops.onednn, "qlinear_pointwise")


def quantize(weight: Tensor) -> Int8Weight:
    """Round `weight [outputs, inputs]` to 8 bits, with the largest number of each output as its scale."""
    weight = weight.float()
    scales = weight.abs().amax(1).clamp_min(_SMALLEST) / _LARGEST
    return Int8Weight((weight / scales[:, None]).round().to(torch.int8), scales)


def stack(weights: list[Int8Weight]) -> Int8Weight:
    """Return weights of layers with the same input as one, outputs after outputs."""
    return Int8Weight(torch.cat([weight.codes for weight in weights]), torch.cat([weight.scales for weight in weights]))


def pack(weight: Int8Weight) -> PackedInt8:
    """Bring a weight into oneDNN's layout. Requires `supported`."""
    codes = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
    return PackedInt8(codes, weight.scales, torch.zeros(weight.scales.numel(), dtype=torch.int64))


def dequantize(weight: PackedInt8) -> Tensor:
    """Return the weights in float32 `[outputs, inputs]`."""
    return weight.codes.to_dense().t() * weight.scales[:, None]


def split_digits(given: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows `[rows, inputs]` to `(high + low / 254) * step`.

    Returns int8 `[2 * rows, inputs]`, all high digits before all low ones, and the steps, float32 `[rows, 1]`.
    """
    given = given.float()
    steps = given.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST).div_(_LARGEST)
    scaled = given / steps
    high = scaled.round()
    low = scaled.sub_(high).mul_(_DIGIT).round_()
    return torch.cat((high, low)).to(torch.int8), steps


def int8_linear(given: Tensor, weight: PackedInt8) -> Tensor:
    """Multiply `given [..., inputs]` by `weight`, in the dtype of `given`. A row's bits do not depend on other rows."""
    rows = given.reshape(-1, given.shape[-1])
    split = compiled_digits.split_digits if compiled_digits.supports(rows) else split_digits
    digits, steps = split(rows)
    products = torch.ops.onednn.qlinear_pointwise(
        digits, 1.0, 0, *weight, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    high, low = products.chunk(2)
    product: Tensor = torch.add(high, low, alpha=1 / _DIGIT).mul_(steps)
    return product.to(given.dtype).view(*given.shape[:-1], weight.scales.numel())


def int8_linear_reference(given: Tensor, weight: PackedInt8) -> Tensor:
    """As `int8_linear`, by weights in float32."""
    return linear(given.float(), dequantize(weight)).to(given.dtype)
