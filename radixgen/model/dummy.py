"""Models with a config's shape and random weights, to try speed and memory without a checkpoint.

Each rank makes its own shard in place. The seed of a weight depends on its name and, if it is sharded, on the rank, so
that results depend neither on the order of weights nor on the timing of ranks.
"""

import warnings
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STD = 0.02
"""Standard deviation of the weights, as in most models."""


def make_dummy(
    config: Any, dtype: torch.dtype, device: torch.device, ranks: int = 1, rank: int = 0
) -> "PreTrainedModel":
    """Make a causal language model of `config` on `device`; with `ranks` above 1, the shard of `rank`, placed by
    transformers.

    Matrices are normally distributed; all other weights are initialized by transformers.
    """
    from transformers import AutoModelForCausalLM

    if ranks == 1:
        with device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        from transformers.distributed import DistributedConfig

        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # PyTorch's random distributed tensors lack a CPU kernel; weights are drawn below
            model = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                state_dict={},
                dtype=dtype,
                distributed_config=DistributedConfig(tp_size=ranks),
            )
    for name, parameter in model.named_parameters():
        local, sharded = _local(parameter)
        if local.ndim > 1 and local.is_floating_point():
            _draw(local, f"{name} of rank {rank}" if sharded else name)
    return model


def _local(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """Return this process's part of a parameter, and whether it is sharded."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter.data, False
    return parameter.to_local().data, not all(placement.is_replicate() for placement in parameter.placements)


@torch.no_grad()
def _draw(weight: Tensor, name: str) -> None:
    seed = int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1
    weight.normal_(0.0, _STD, generator=torch.Generator(weight.device).manual_seed(seed))
