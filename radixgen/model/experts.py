"""Mixture-of-experts layers with few rows, by the kernel of `radixgen.kernels.expert_gemm`.

A function registered with transformers' `ExpertsInterface` computes all experts of a layer. Ours handles few rows and
passes more on to transformers' grouped matrix products, which also read every weight once.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from radixgen.kernels import expert_gemm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "radixgen"
_SORTED = "grouped_mm"
"""transformers' default implementation."""


def expert_layers(model: nn.Module) -> list[Any]:
    """Return the modules whose forward pass goes through transformers' `ExpertsInterface`."""
    return [module for module in model.modules() if hasattr(module, "is_transposed") and hasattr(module, "down_proj")]


def use_expert_gemm(model: "PreTrainedModel") -> None:
    """Use our kernel for few rows, if the model has transformers' default implementation and the kernel supports its
    weights.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    layers = expert_layers(model)
    if not layers or any(module.config._experts_implementation != _SORTED for module in layers):
        return
    if all(expert_gemm.supports(weight) for module in layers for weight in _weights(module)):
        expert_gemm.register()
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
        model.set_experts_implementation(IMPLEMENTATION)


def restore_experts(model: "PreTrainedModel") -> None:
    """Undo `use_expert_gemm`."""
    if getattr(model.config.get_text_config(), "_experts_implementation", None) == IMPLEMENTATION:
        model.set_experts_implementation(_SORTED)


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    return module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute all experts of a layer: `hidden_states [rows, hidden]`; expert indices and weights `[rows, k]`."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    rows = top_k_index.shape[0]
    if not 0 < rows <= expert_gemm.MAX_ROWS:
        output: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return output
    experts = top_k_index.reshape(-1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, first, hidden_states, experts)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _linear(module, "down_proj", inner, experts)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = (outer * top_k_weights.reshape(-1, 1)).view(rows, -1, outer.shape[1])
    return weighted.sum(1).to(hidden_states.dtype)


def _linear(module: Any, name: str, given: Tensor, experts: Tensor) -> Tensor:
    output: Tensor = torch.ops.radixgen.expert_linear(given, getattr(module, name), experts, module.is_transposed)
    return output + getattr(module, f"{name}_bias")[experts] if module.has_bias else output
