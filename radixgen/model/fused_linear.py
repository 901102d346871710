"""Linear layers with the same input, fused into one matrix product, by `radixgen.kernels.skinny_gemm` for few rows.

A product with few rows is bound by reading its weights, and a narrow one does not keep the whole chip busy. The modules
around the layers stay unchanged: the first layer called computes the outputs of all, and the others return theirs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from radixgen.kernels import skinny_gemm

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers' models apply to the same tensor, within one module."""


class FusedLinear:
    """The stacked weights of layers with the same input. The layers' own weights become views of them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        weights = [layer.weight.data for layer in layers]
        self._weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        for layer, rows in zip(layers, torch.split(self._weight, self._sizes), strict=True):
            layer.weight.data = rows
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = torch.cat([bias.data for bias in biases]) if biases else None
        self._skinny = self._bias is None and skinny_gemm.supports(self._weight)
        if self._skinny:
            skinny_gemm.register()
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._due = 0

    def share(self, index: int, given: Tensor) -> Tensor:
        """Return layer `index` of `given`. Outputs are kept until each of the fused layers was called once."""
        if given is not self._input:
            self._input, self._due = given, len(self._sizes)
            self._outputs = list(torch.split(self._multiply(given), self._sizes, -1))
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
        alone = len(self._sizes) == 1 and self._skinny
        return skinny_gemm.linear_parts(given, self._weight) if alone else None

    def _multiply(self, given: Tensor) -> Tensor:
        return skinny_gemm.linear(given, self._weight) if self._skinny else linear(given, self._weight, self._bias)


class FusedLinearSlice(nn.Module):
    """One of the layers of a `FusedLinear`, in place of the original."""

    def __init__(self, fused: FusedLinear, index: int, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self._fused, self._index = fused, index

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, given: Tensor) -> Tensor:
        return self._fused.share(self._index, given)

    def parts(self, given: Tensor) -> Tensor | None:
        """As `FusedLinear.parts`."""
        return self._fused.parts(given)


def fuse_linears(model: nn.Module) -> None:
    """Replace all fusible layers, and all others that `skinny_gemm` supports, by `FusedLinearSlice`s.

    `restore_linears` undoes it.
    """
    for module in list(model.modules()):
        for names in SIBLINGS:
            layers = [module._modules.get(name) for name in names]
            if _fusible(layers):
                linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
                fused = FusedLinear(linears)
                for index, (name, layer) in enumerate(zip(names, linears, strict=True)):
                    module._modules[name] = FusedLinearSlice(fused, index, layer)
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Linear) and _supported(child):
                module._modules[name] = FusedLinearSlice(FusedLinear([child]), 0, child)


def _supported(layer: nn.Linear) -> bool:
    return _fusible([layer]) and layer._parameters["bias"] is None and skinny_gemm.supports(layer.weight)


def restore_linears(model: nn.Module) -> None:
    """Undo `fuse_linears`."""
    for module, name, share in list(_shares(model)):
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
