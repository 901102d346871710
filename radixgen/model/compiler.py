"""Parts of a model that are compiled, and the options of `torch.compile`."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from radixgen.kernels.chip import Chip

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compilable_modules(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the blocks, and the modules called outside of them: the last norm and rotary embeddings."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    beside = [
        child
        for child in model.get_decoder().children()
        if not isinstance(child, nn.Embedding) and not any(isinstance(part, nn.ModuleList) for part in child.modules())
    ]
    return list(dict.fromkeys((*blocks, *beside)))


def compiler_options(device: torch.device) -> dict[str, bool] | None:
    """On a GPU, combine independent small kernels; on Hopper, let kernels overlap by programmatic dependent launch."""
    from torch._inductor import config

    if device.type != "cuda":
        return None
    early = Chip.of(device).overlaps and hasattr(config.triton, "enable_pdl")
    return {"combo_kernels": True} | ({"triton.enable_pdl": True} if early else {})


def is_compiler_error(error: RuntimeError) -> bool:
    """Return whether an error was raised by `torch.compile`."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)
