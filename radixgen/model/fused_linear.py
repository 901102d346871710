"""Linear layers with the same input, fused into one matrix product: on a GPU by `radixgen.kernels.skinny_gemm` for few
rows, on a CPU by `radixgen.kernels.packed_linear`.

A product with few rows is bound by reading its weights, and a narrow one does not keep the whole chip busy. The modules
around the layers stay unchanged: the first layer called computes the outputs of all, and the others return theirs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from radixgen.kernels import packed_linear, skinny_gemm

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
        self._weight, self._bias = _stacked(layers)
        for layer, rows in zip(layers, torch.split(self._weight, _sizes(layers)), strict=True):
            layer.weight.data = rows
        self._skinny = self._bias is None and skinny_gemm.supports(self._weight)
        if self._skinny:
            skinny_gemm.register()

    def __call__(self, given: Tensor) -> Tensor:
        return skinny_gemm.linear(given, self._weight) if self._skinny else linear(given, self._weight, self._bias)

    def parts(self, given: Tensor) -> Tensor | None:
        return skinny_gemm.linear_parts(given, self._weight) if self._skinny else None


class PackedWeights:
    """The product with stacked weights that are packed for a CPU. The layers' own weights become empty, unless other
    modules have one of them, too.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, shared: bool) -> None:
        """`shared`: whether other modules have a weight of these layers, too."""
        self._layers, self._emptied = layers, not shared
        weight, self._bias = _stacked(layers)
        self._packed = packed_linear.pack(weight)
        if self._emptied:
            self._assign([weight.new_empty(0)] * len(layers))

    def __call__(self, given: Tensor) -> Tensor:
        return packed_linear.linear(given, self._packed, self._bias)

    def parts(self, given: Tensor) -> None:
        """Return None: the product is not computed in parts."""

    def weight(self, index: int) -> Tensor:
        """Return the weight of layer `index`, `[outputs, inputs]`."""
        return self._unpacked()[index] if self._emptied else self._layers[index].weight

    def restore(self) -> None:
        """Give the layers their own weights again."""
        if self._emptied:
            self._assign(self._unpacked())
            self._emptied = False

    def _unpacked(self) -> Sequence[Tensor]:
        return torch.split(packed_linear.unpack(self._packed), _sizes(self._layers))

    def _assign(self, weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.weight.data = weight


class FusedLinear:
    """Layers with the same input, computed at once by one product."""

    def __init__(self, layers: Sequence[nn.Linear], product: Product | None = None) -> None:
        """`product`: default `StackedWeights`."""
        self.sizes = _sizes(layers)
        """Outputs of each layer"""
        self.product = product or StackedWeights(layers)
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
        return self.product.parts(given) if len(self.sizes) == 1 else None

    def multiply(self, given: Tensor) -> Tensor:
        """Return the outputs of all layers, `[..., outputs]`."""
        return self.product(given)


class FusedLinearSlice(nn.Module):
    """One of the layers of a `FusedLinear`, in place of the original."""

    def __init__(self, fused: FusedLinear, index: int, layer: nn.Module) -> None:
        """`layer`: the original, or the module that computes the product if there is no original any more."""
        super().__init__()
        self.layer = layer
        self.fused, self._index = fused, index

    @property
    def weight(self) -> Tensor:
        packed = self.fused.product
        return packed.weight(self._index) if isinstance(packed, PackedWeights) else cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast(Tensor | None, self.layer.bias)

    def forward(self, given: Tensor) -> Tensor:
        return self.fused.share(self._index, given)

    def parts(self, given: Tensor) -> Tensor | None:
        """As `FusedLinear.parts`."""
        return self.fused.parts(given)


def fuse_linears(model: nn.Module) -> None:
    """Replace all fusible layers, and all others that `packed_linear` or `skinny_gemm` supports, by
    `FusedLinearSlice`s. `restore_linears` undoes it.
    """
    children = [child for module in model.modules() for child in module._modules.values() if child is not None]
    owners = Counter(id(weight) for child in children for weight in child._parameters.values())
    for module, layers in groups_of_linears(model):
        linears = list(layers.values())
        if len(linears) > 1 or _supported(linears[0]):
            fused = FusedLinear(linears, _product(linears, owners))
            for index, (name, layer) in enumerate(layers.items()):
                module._modules[name] = FusedLinearSlice(fused, index, layer)


def _product(layers: Sequence[nn.Linear], owners: Counter[int]) -> Product:
    if packed_linear.supports(layers[0].weight):
        return PackedWeights(layers, shared=any(owners[id(layer.weight)] > 1 for layer in layers))
    return StackedWeights(layers)


def _stacked(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the weights `[outputs, inputs]` and biases `[outputs]` of layers with the same input."""
    weights = [layer.weight.data for layer in layers]
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    return torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None


def _sizes(layers: Sequence[nn.Linear]) -> list[int]:
    return [layer.out_features for layer in layers]


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
    """Return whether a product of the layer alone is faster than PyTorch's."""
    skinny = layer._parameters["bias"] is None and skinny_gemm.supports(layer.weight)
    return skinny or packed_linear.supports(layer.weight)


def restore_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`. Slices of quantized weights stay, since the model was loaded with them."""
    for module, name, share in list(_shares(model)):
        if isinstance(share.layer, nn.Linear):
            if isinstance(share.fused.product, PackedWeights):
                share.fused.product.restore()
            module._modules[name] = share.layer


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers of a model with their names, those of packed layers unpacked."""
    packed = {
        id(share.layer.weight): share
        for _, _, share in _shares(model)
        if isinstance(share.fused.product, PackedWeights)
    }
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        yield name, packed[id(tensor)].weight if id(tensor) in packed else tensor


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
