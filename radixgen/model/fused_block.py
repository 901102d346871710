"""Blocks of Llama's shape in few operators, for processors on which small operators cost as much as small products.

Rotary tables are prepared once a pass, queries and keys are rotated together, and norms are one operator each.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from radixgen.model.fused_linear import FusedLinear, FusedLinearSlice
from radixgen.model.layer_call import LayerCall
from radixgen.model.reference import close_to

if TYPE_CHECKING:
    from radixgen.model.tree_model import TreeModel

BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' blocks that differ from Llama's only in windows, biases, and norms of queries and keys."""

_ATTENTION = {"q_proj": 3, "o_proj": 1}
_MLP = {"gate_proj": 2, "down_proj": 1}
"""Layers by name, and how many are fused with each, itself included"""


class RotaryTables:
    """Cosines and sines of the rows of one pass, shared by all blocks."""

    def __init__(self) -> None:
        self._sin: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Convert transformers' tables `[1, rows, head_dim]` to `[rows, 1, head_dim]`, the sines of the first half
        negated.
        """
        if self._tables is None or self._sin is not sin:
            first, second = sin[0].chunk(2, -1)
            self._tables = cos[0].unsqueeze(1), torch.cat((-first, second), -1).unsqueeze(1)
            self._sin = sin
        return self._tables


class FusedBlock(nn.Module):
    """Computes a block of transformers in its place, with the attributes of the block."""

    def __init__(self, block: nn.Module, owner: "TreeModel", tables: RotaryTables) -> None:
        super().__init__()
        self.block = block
        self._owner, self._tables = owner, tables
        attention: Any = block.self_attn
        mlp: Any = block.mlp
        self._layer = owner.layer_of(attention)
        self._head_dim: int = attention.head_dim
        self._scale = float(attention.scaling)
        self._qkv, self._o = _product(attention.q_proj), _product(attention.o_proj)
        self._gate_up, self._down = _product(mlp.gate_proj), _product(mlp.down_proj)
        self._activation = mlp.act_fn
        self._norms: tuple[Any, Any] = (block.input_layernorm, block.post_attention_layernorm)
        self._head_norms: tuple[Any, Any] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = attention.q_norm, attention.k_norm
        self._kv_heads = self._qkv.sizes[1] // self._head_dim
        self._q_heads = self._qkv.sizes[0] // self._head_dim
        self.compares = False
        """Whether passes also run the block itself"""
        self.agrees = False
        """Whether the last pass that did differed by no more than rounding"""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """As the block, for hidden states `[1, rows, width]`."""
        output = self._compute(hidden, *self._tables.of(*options["position_embeddings"]))
        if self.compares:
            self.agrees = close_to(output, self.block(hidden, *arguments, **options))
        return output

    def _compute(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        before, after = self._norms
        attended = self._attend(self._qkv.multiply(_norm(before, hidden[0])), cos, sin)
        hidden = hidden + self._o.multiply(attended)
        gate, up = self._gate_up.multiply(_norm(after, hidden)).chunk(2, -1)
        return self._down.multiply(self._activation(gate).mul_(up)).add_(hidden)

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention over the rows' products `[rows, (q_heads + 2 * kv_heads) * head_dim]`; `[1, rows, width]`."""
        q_heads, kv_heads, dim = self._q_heads, self._kv_heads, self._head_dim
        heads = qkv.view(len(qkv), q_heads + 2 * kv_heads, dim)
        rotated, value = heads[:, : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
        if self._head_norms is not None:
            parts = zip(self._head_norms, (rotated[:, :q_heads], rotated[:, q_heads:]), strict=True)
            rotated = torch.cat([_norm(norm, part) for norm, part in parts], 1)
        rotated = torch.addcmul(rotated * cos, rotated.roll(dim // 2, -1), sin)
        q, k = rotated[:, :q_heads], rotated[:, q_heads:]
        window = self._owner.windows[self._layer]
        out = self._owner.compute(LayerCall(self._layer, q, k, value, self._scale, window, None, None))
        return out.reshape(1, len(qkv), q_heads * dim)


def fuse_blocks(model: nn.Module, owner: "TreeModel") -> list[FusedBlock]:
    """Replace blocks of `BLOCKS`, whose linear layers are fused, by `FusedBlock`s, and return these."""
    tables, fused = RotaryTables(), []
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and _fusible(child):
                module._modules[name] = block = FusedBlock(child, owner, tables)
                fused.append(block)
    return fused


def blocks_agree(blocks: Sequence[FusedBlock], run: Callable[[], object]) -> bool:
    """Return whether each block's output in the pass that `run` makes is that of the original one, up to rounding."""
    for block in blocks:
        block.compares = True
    run()
    for block in blocks:
        block.compares = False
    return all(block.agrees for block in blocks)


def restore_blocks(model: nn.Module) -> None:
    """Undo `fuse_blocks`."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, FusedBlock):
                module._modules[name] = child.block


def _fusible(block: nn.Module) -> bool:
    """Return whether it is one of transformers' own blocks, without hooks, and with fused linear layers."""
    kind = type(block)
    if kind.__name__ not in BLOCKS or not kind.__module__.startswith("transformers.models."):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in block.modules()):
        return False
    parts: Any = block
    products = [
        (module._modules.get(name), siblings)
        for module, names in ((parts.self_attn, _ATTENTION), (parts.mlp, _MLP))
        for name, siblings in names.items()
    ]
    return all(isinstance(layer, FusedLinearSlice) and len(layer.fused.sizes) == count for layer, count in products)


def _product(layer: Any) -> FusedLinear:
    fused: FusedLinear = layer.fused
    return fused


def _norm(norm: Any, given: Tensor) -> Tensor:
    return rms_norm(given, (given.shape[-1],), norm.weight, norm.variance_epsilon)
