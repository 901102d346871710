"""Linear layers with the same input, fused into one matrix product: on a GPU by `radixgen.kernels.skinny_gemm` for few
rows, on a CPU by `radixgen.kernels.packed_linear`.

A product with few rows is bound by reading its weights, and a narrow one does not keep the whole chip busy. The modules
around the layers stay unchanged: the first layer called computes the outputs of all, and the others return theirs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from radixgen.kernels import packed_linear, skinny_gemm

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers' models apply to the same tensor, within one module."""


class FusedLinear:
    """The stacked weights of layers with the same input.

    The layers' own weights become views of them, or empty if they are packed and not `shared`.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, shared: bool = False) -> None:
        """`shared`: whether other modules have a weight of these layers, too."""
        self._layers = layers
        self.sizes = [layer.out_features for layer in layers]
        """Outputs of each layer"""
        weights = [layer.weight.data for layer in layers]
        self._weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        self._packed = packed_linear.supports(self._weight)
        self._emptied = self._packed and not shared
        if not self._packed:
            self._assign(torch.split(self._weight, self.sizes))
        else:
            self._weight = packed_linear.pack(self._weight)
        if self._emptied:
            self._assign([weight.new_empty(0) for weight in weights])
        self._skinny = self._bias is None and skinny_gemm.supports(self._weight)
        if self._skinny:
            skinny_gemm.register()
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._due = 0

    def weight(self, index: int) -> Tensor:
        """Return the weight of layer `index`, `[outputs, inputs]`."""
        return self._unpacked()[index] if self._emptied else self._layers[index].weight

    def restore(self) -> None:
        """Give the layers their own weights again."""
        if self._emptied:
            self._assign(self._unpacked())
            self._emptied = False

    def _unpacked(self) -> Sequence[Tensor]:
        return torch.split(packed_linear.unpack(self._weight), self.sizes)

    def _assign(self, weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.weight.data = weight

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
        """Return the partial sums of a layer without siblings: float32 `[n, ..., outputs]`, or the dtype of `given` if
        `n` is 1.

        Returns None if the product is not computed in parts.
        """
        alone = len(self.sizes) == 1 and self._skinny
        return skinny_gemm.linear_parts(given, self._weight) if alone else None

    def multiply(self, given: Tensor) -> Tensor:
        """Return the outputs of all layers, `[..., outputs]`."""
        if self._packed:
            return packed_linear.linear(given, self._weight, self._bias)
        return skinny_gemm.linear(given, self._weight) if self._skinny else linear(given, self._weight, self._bias)


class FusedLinearSlice(nn.Module):
    """One of the layers of a `FusedLinear`, in place of the original."""

    def __init__(self, fused: FusedLinear, index: int, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.fused, self._index = fused, index

    @property
    def weight(self) -> Tensor:
        return self.fused.weight(self._index)

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, given: Tensor) -> Tensor:
        return self.fused.share(self._index, given)

    def parts(self, given: Tensor) -> Tensor | None:
        """As `FusedLinear.parts`."""
        return self.fused.parts(given)

    def restore(self) -> nn.Linear:
        """Return the original layer, with its weight."""
        self.fused.restore()
        return self.layer


def fuse_linears(model: nn.Module) -> None:
    """Replace all fusible layers, and all others that `packed_linear` or `skinny_gemm` supports, by
    `FusedLinearSlice`s. `restore_linears` undoes it.
    """
    children = [child for module in model.modules() for child in module._modules.values() if child is not None]
    owners = Counter(id(weight) for child in children for weight in child._parameters.values())
    for module in list(model.modules()):
        for names in SIBLINGS:
            _fuse(module, names, owners)
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Linear) and _supported(child):
                _fuse(module, [name], owners)


def _fuse(module: nn.Module, names: Sequence[str], owners: Counter[int]) -> None:
    layers = [module._modules.get(name) for name in names]
    if not _fusible(layers):
        return
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    fused = FusedLinear(linears, shared=any(owners[id(layer.weight)] > 1 for layer in linears))
    for index, (name, layer) in enumerate(zip(names, linears, strict=True)):
        module._modules[name] = FusedLinearSlice(fused, index, layer)


def _supported(layer: nn.Linear) -> bool:
    """Return whether a product of the layer alone is faster than PyTorch's."""
    if not _fusible([layer]):
        return False
    skinny = layer._parameters["bias"] is None and skinny_gemm.supports(layer.weight)
    return skinny or packed_linear.supports(layer.weight)


def restore_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`."""
    for module, name, share in list(_shares(model)):
        module._modules[name] = share.restore()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers of a model with their names, those of packed layers unpacked."""
    packed = {id(share.layer.weight): share for _, _, share in _shares(model)}
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
