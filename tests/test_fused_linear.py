"""Layers with one input, multiplied at once, give what they gave alone; and are given back."""

from functools import partialmethod

import families
import pytest
import torch
from torch import Tensor, nn

from radixgen.model.fused_linear import FusedLinearSlice, fuse_linears, restore_linears
from radixgen.model.layer_call import LayerCall
from radixgen.model.tree_model import TreeModel

SHARES = {"llama": 10, "qwen2": 15, "gemma2": 10, "phi3": 0}
"""Five for each layer; phi3 has its weights stacked by itself."""


def own_value(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Attention of rows that see nothing but themselves."""
    return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1), call.q[..., 0]


def logits(model: TreeModel) -> Tensor:
    rows = torch.arange(7)
    return model.forward(rows + 3, rows, rows, own_value)


def shares(model: nn.Module) -> int:
    return sum(isinstance(module, FusedLinearSlice) for module in model.modules())


@pytest.mark.parametrize("family", list(SHARES))
def test_logits_are_the_same(family: str) -> None:
    network = families.build(family)
    model = TreeModel(network, family, None)
    expected = logits(model)
    model.fuse_linears()
    assert shares(network) == SHARES[family]
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.release()
    assert shares(network) == 0
    torch.testing.assert_close(logits(TreeModel(network, family, None)), expected, rtol=1e-5, atol=1e-5)


def test_compiled_blocks_share_too(monkeypatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    model = TreeModel(families.build("qwen2"), "qwen2", None)
    expected = logits(model)
    model.fuse_linears()
    model.compile_blocks()
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.release()


def block(**layers: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(8, 5, bias=False),
        nn.Linear(9, 5),
        nn.Linear(8, 5, dtype=torch.float64),
        nn.Bilinear(8, 8, 5),
        nn.Sequential(nn.Linear(8, 5)),
    ],
)
def test_layers_that_differ_stay_alone(other: nn.Module) -> None:
    module = block(gate_proj=nn.Linear(8, 5), up_proj=other)
    fuse_linears(module)
    assert shares(module) == 0


def test_a_layer_that_somebody_watches_stays_alone() -> None:
    module = block(gate_proj=nn.Linear(8, 5), up_proj=nn.Linear(8, 5))
    module.up_proj.register_forward_hook(lambda *_: None)
    fuse_linears(module)
    assert shares(module) == 0


def test_a_layer_that_was_sharded_stays_alone() -> None:
    """transformers puts a `forward` of its own on the instance; the product of its weight alone would be half of it."""
    module = block(gate_proj=nn.Linear(8, 5), up_proj=nn.Linear(8, 5))
    module.up_proj.forward = module.up_proj.forward
    fuse_linears(module)
    assert shares(module) == 0


def test_each_input_is_multiplied_anew_and_none_is_kept() -> None:
    module = block(gate_proj=nn.Linear(8, 5), up_proj=nn.Linear(8, 3))
    gate, up = module.gate_proj, module.up_proj
    one, two = torch.randn(2, 4, 8)
    expected = [gate(one), up(one), up(two), gate(two), gate(one)]
    fuse_linears(module)
    found = [module.gate_proj(one), module.up_proj(one), module.up_proj(two), module.gate_proj(two)]
    assert module.gate_proj.fused._input is None
    found.append(module.gate_proj(one))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    restore_linears(module)
    assert module.gate_proj is gate and module.up_proj is up
    torch.testing.assert_close(up(two), expected[2])
