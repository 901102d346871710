"""Linear layers with quantized weights, in place of `nn.Linear`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from radixgen.kernels import fp8_linear, int4_linear, int8_linear, skinny_gemm
from radixgen.kernels.fp8_linear import Fp8Weight
from radixgen.kernels.int4_linear import Int4Weight
from radixgen.kernels.int8_linear import Int8Weight
from radixgen.model.fused_linear import FusedLinear, FusedLinearSlice, groups_of_linears

QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight


class QuantizedLinear(nn.Module):
    """One linear layer, or several with the same input: `given [..., inputs]` becomes `[..., outputs]` in its dtype."""

    def __init__(self, weight: NamedTuple, multiply: Callable[[Tensor, Any], Tensor], bias: Tensor | None) -> None:
        """`weight`: what `multiply(given, weight)` takes."""
        super().__init__()
        self._weight, self._multiply = weight, multiply
        for name, tensor in (*weight._asdict().items(), ("bias", bias)):
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        product = self._multiply(given, self._weight)
        bias = self._buffers.get("bias")
        return product if bias is None else product + bias

    def parts(self, given: Tensor) -> None:
        """As `radixgen.model.fused_linear.Product.parts`."""


def replace_linears(model: nn.Module, quantize: Callable[[str, nn.Linear], QuantizedWeight | None]) -> int:
    """Replace linear layers by slices of quantized ones, which layers with the same input share.

    `quantize(name, layer)` returns the weight, or None for a layer that stays. Returns how many layers were replaced.
    """
    names = {module: name for name, module in model.named_modules()}
    count = 0
    for module, layers in groups_of_linears(model):
        weights = {name: quantize(names[layer], layer) for name, layer in layers.items()}
        quantized = {name: weight for name, weight in weights.items() if weight is not None}
        if len(quantized) == len(layers) and _can_stack(list(quantized.values())):
            _replace(module, layers, quantized)
        else:
            for name, weight in quantized.items():
                _replace(module, {name: layers[name]}, {name: weight})
        count += len(quantized)
    return count


def _replace(module: nn.Module, layers: Mapping[str, nn.Linear], weights: Mapping[str, QuantizedWeight]) -> None:
    product = _stacked(list(weights.values()), [layer.bias for layer in layers.values()])
    fused = FusedLinear(list(layers.values()), product)
    for index, name in enumerate(layers):
        module._modules[name] = FusedLinearSlice(fused, index, product)


def _can_stack(weights: Sequence[QuantizedWeight]) -> bool:
    if len({type(weight) for weight in weights}) > 1:
        return False
    return fp8_linear.can_stack([weight for weight in weights if isinstance(weight, Fp8Weight)])


def _stacked(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> QuantizedLinear:
    """Return one layer with the outputs of all weights, which are of one type."""
    held = [bias.data for bias in biases if bias is not None]
    bias = torch.cat(held) if held else None
    if eights := [weight for weight in weights if isinstance(weight, Int8Weight)]:
        return QuantizedLinear(int8_linear.pack(int8_linear.stack(eights)), int8_linear.int8_linear, bias)
    if fours := [weight for weight in weights if isinstance(weight, Int4Weight)]:
        return QuantizedLinear(int4_linear.pack(int4_linear.stack(fours)), int4_linear.int4_linear, bias)
    floats = [weight for weight in weights if isinstance(weight, Fp8Weight)]
    weight = fp8_linear.stack(floats) if len(floats) > 1 else floats[0]
    if not fp8_linear.supports(weight):
        return QuantizedLinear(weight, fp8_linear.fp8_linear_reference, bias)
    if skinny := skinny_gemm.supports(weight.codes):
        skinny_gemm.register()
    return QuantizedLinear(weight, partial(fp8_linear.fp8_linear, skinny=skinny), bias)
