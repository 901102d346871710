"""Blocks in fewer operators give what transformers' own give; and are given back."""

import families
import pytest
import torch
from torch import Tensor, nn

from radixgen.kernels import packed_linear
from radixgen.model.fused_block import FusedBlock, blocks_agree, fuse_blocks, restore_blocks
from radixgen.model.reference import causal_over
from radixgen.model.tree_model import TreeModel

FUSED = {"llama": 2, "mistral": 2, "qwen2": 3, "qwen3": 3}
pytestmark = pytest.mark.skipif(not packed_linear.supports(torch.ones(8, 8)), reason="linear layers are not packed")


def logits(model: TreeModel, length: int = 37) -> Tensor:
    rows = torch.arange(length)
    return model.forward(rows % 150 + 3, rows, rows, causal_over([list(range(length))]))


def blocks(network: nn.Module) -> list[FusedBlock]:
    return [module for module in network.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_are_the_same(family: str) -> None:
    network = families.build(family)
    model = TreeModel(network, family, None)
    expected = logits(model)
    model.fuse_linears()
    model.fuse_blocks()
    assert len(blocks(network)) == FUSED.get(family, 0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.release()
    assert not blocks(network)


def test_a_block_that_somebody_watches_stays() -> None:
    network = families.build("llama")
    model = TreeModel(network, "llama", None)
    network.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.fuse_linears()
    model.fuse_blocks()
    assert len(blocks(network)) == 1


def test_blocks_without_fused_layers_stay() -> None:
    network = families.build("llama")
    assert fuse_blocks(network, TreeModel(network, "llama", None)) == []


def test_a_block_that_computes_otherwise_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """The norm of this one adds one to its weight, as Gemma's does."""
    network = families.build("llama")
    model = TreeModel(network, "llama", None)
    network.model.layers[0].input_layernorm = OneMore(network.model.layers[0].input_layernorm)
    model.fuse_linears()
    model.fuse_blocks()
    assert not blocks(network) and "its blocks are not fused" in caplog.text


def test_all_blocks_are_compared() -> None:
    network = families.build("llama")
    model = TreeModel(network, "llama", None)
    model.fuse_linears()
    fused = fuse_blocks(network, model)
    assert blocks_agree(fused, lambda: logits(model))
    assert not any(block.compares for block in fused)
    restore_blocks(network)


class OneMore(nn.Module):
    """A norm with another formula and the same attributes."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self._norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self._norm(hidden)
        return normed * (1 + 1 / self.weight)
