"""Rotary embeddings whose choice must not depend on a step."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from radixgen.core import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fix_rotary(model: "PreTrainedModel", name: str, max_model_len: int) -> list[tuple[nn.Module, Any]]:
    """Fix rotary embeddings that transformers would choose by the longest position of each step.

    `dynamic` has no single correct choice and is rejected; `longrope` has two, of which `max_model_len` selects one.
    Returns the changed modules with their former `rope_type`.
    """
    former = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None:
            continue
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        if any("dynamic" in str(kind) for kind in by_layer.values()):
            reason = "its 'dynamic' rotary embedding depends on the longest sequence of the batch"
            raise UnsupportedModel(f"{name}: {reason}")
        if "longrope" not in by_layer.values():
            continue
        former.append((module, kinds))
        last = torch.tensor([[max_model_len - 1]], device=model.device)
        probe = torch.zeros(1, dtype=model.dtype, device=model.device)
        for layer_type, kind in by_layer.items():
            if kind == "longrope":
                module(probe, last, *([] if layer_type is None else [layer_type]))
        fixed = {key: "fixed" if kind == "longrope" else kind for key, kind in by_layer.items()}
        module.rope_type = fixed if isinstance(kinds, dict) else fixed[None]
    return former
