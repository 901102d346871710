"""Linear layers with the same input, fused into one matrix product, by `radixgen.kernels.skinny_gemm` for few rows.

A product with few rows is bound by reading its weights, and a narrow one does not keep the whole chip busy. The modules
around the layers stay unchanged: the first layer called computes the outputs of all, and the others return theirs.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from radixgen.kernels import skinny_gemm

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers' models apply to the same tensor, within one module."""


class Product(Protocol):
    """A product with the weights of one or more layers."""

    def __call__(self, given: Tensor) -> Tensor:
        """Multiply `given [..., inputs]`; returns `[..., outputs]`, outputs of one layer after those of another."""

    def parts(self, given: Tensor) -> Tensor | None:
        """The product in partial sums, `[n, ..., outputs]`: float32, or the dtype of `given` if `n` is 1.

        Returns None if the product is not computed in parts.
        """


class StackedWeights:
    """The product with stacked weights of layers with the same input. The layers' own weights become views of them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weights = [layer.weight.data for layer in layers]
        self._weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        for layer, rows in zip(layers, torch.split(self._weight, [len(weight) for weight in weights]), strict=True):
            layer.weight.data = rows
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        self._skinny = self._bias is None and skinny_gemm.supports(self._weight)
        if self._skinny:
            skinny_gemm.register()

    def __call__(self, given: Tensor) -> Tensor:
        return skinny_gemm.linear(given, self._weight) if self._skinny else linear(given, self._weight, self._bias)

    def parts(self, given: Tensor) -> Tensor | None:
        return skinny_gemm.linear_parts(given, self._weight) if self._skinny else None


class FusedLinear:
    """Layers with the same input, computed at once by one product."""

    def __init__(self, layers: Sequence[nn.Linear], product: Product | None = None) -> None:
        """`product`: default `StackedWeights`."""
        self.sizes = [layer.out_features for layer in layers]
        """Outputs of each layer"""
        self._product = product or StackedWeights(layers)
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._due = 0

    def share(self, index: int, given: Tensor) -> Tensor:
        """Return layer `index` of `given`. Outputs are kept until each of the fused layers was called once."""
        if given is not self._input:
            self._input, self._due = given, len(self.sizes)
            self._outputs = list(torch.split(self.multiply(given), self.sizes, -1))
        output = self._outputs[index]
        self._due -= 1
        if not self._due:
            self._input, self._outputs = None, []
        return output

    def parts(self, given: Tensor) -> Tensor | None:
        """As `Product.parts`, for a layer without siblings; else None."""
        return self._product.parts(given) if len(self.sizes) == 1 else None

    def multiply(self, given: Tensor) -> Tensor:
        """Return the outputs of all layers, `[..., outputs]`."""
        return self._product(given)


class FusedLinearSlice(nn.Module):
    """One of the layers of a `FusedLinear`, in place of the original."""

    def __init__(self, fused: FusedLinear, index: int, layer: nn.Module) -> None:
        """`layer`: the original, or the module that computes the product if there is no original any more."""
        super().__init__()
        self.layer = layer
        self.fused, self._index = fused, index

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast(Tensor | None, self.layer.bias)

    def forward(self, given: Tensor) -> Tensor:
        return self.fused.share(self._index, given)

    def parts(self, given: Tensor) -> Tensor | None:
        """As `FusedLinear.parts`."""
        return self.fused.parts(given)


def fuse_linears(model: nn.Module) -> None:
    """Replace all fusible layers, and all others that `skinny_gemm` supports, by `FusedLinearSlice`s.

    `restore_linears` undoes it.
    """
    for module, layers in groups_of_linears(model):
        linears = list(layers.values())
        if len(linears) > 1 or _supported(linears[0]):
            fused = FusedLinear(linears)
            for index, (name, layer) in enumerate(layers.items()):
                module._modules[name] = FusedLinearSlice(fused, index, layer)


def groups_of_linears(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
    """Yield the plain linear layers of each module by name: fusible ones together, every other alone."""
    for module in list(model.modules()):
        own = {name: child for name, child in module._modules.items() if type(child) is nn.Linear}
        for names in SIBLINGS:
            if _fusible([own.get(name) for name in names]):
                yield module, {name: own.pop(name) for name in names}
        for name, layer in own.items():
            if _fusible([layer]):
                yield module, {name: layer}


def _supported(layer: nn.Linear) -> bool:
    return layer._parameters["bias"] is None and skinny_gemm.supports(layer.weight)


def restore_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`. Slices of quantized weights stay, since the model was loaded with them."""
    for module, name, share in list(_shares(model)):
        if isinstance(share.layer, nn.Linear):
            module._modules[name] = share.layer


def _shares(model: nn.Module) -> Iterator[tuple[nn.Module, str, FusedLinearSlice]]:
    for module in model.modules():
        for name, child in module._modules.items():
            if isinstance(child, FusedLinearSlice):
                yield module, name, child


def _fusible(layers: Sequence[nn.Module | None]) -> bool:
    """Return whether these are plain linear layers without hooks or sharding, with the same input size, dtype and
    device, and with biases on all or none.
    """
    kinds = {
        (layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None)
        if type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
        else None
        for layer in layers
    }
    return len(kinds) == 1 and None not in kinds
