"""A second model over the same weights, so that an engine can serve a model that is in use elsewhere."""

import copy
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from radixgen.core import InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "radixgen_shares_weights"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def share_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a model whose modules and config are copies, and whose parameters and buffers are those of `model`.

    An engine may change its modules and mode, while `model` runs and trains as ever. Both see in-place changes of the
    weights. Raises `InvalidRequest` if an engine holds `model`, and `UnsupportedModel` for modules that cannot be
    copied.
    """
    name = type(model).__name__
    if any("radixgen_owner" in vars(module) for module in model.modules()):
        raise InvalidRequest("model", name, "is in use by an engine; close it first")
    check_hooks(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module keeps beside its weights
        raise UnsupportedModel(f"{name}: its modules cannot be copied: {error}") from error
    for module in twin.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
    vars(twin)[_MARK] = True
    return twin


def shares_weights(model: nn.Module) -> bool:
    """Return whether `share_weights` returned this model, so that its weights may change at any time."""
    return _MARK in vars(model)


def check_hooks(model: nn.Module) -> None:
    """Raise `UnsupportedModel` if a module has forward hooks, which an engine would not call as often.

    Those that transformers registers itself only record outputs.
    """
    for name, module in model.named_modules():
        hooks = chain.from_iterable(getattr(module, hooks).values() for hooks in _HOOKS)
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            raise UnsupportedModel(f"{type(model).__name__}: {name or 'the model'} has a forward hook; remove it first")


def weight_places(model: nn.Module) -> tuple[object, ...]:
    """Return where the weights are in memory. It changes if any of them is moved, converted or replaced."""
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape) for tensor in _saved(model))


def weight_versions(model: nn.Module) -> tuple[int, ...]:
    """Return how often PyTorch has counted a change of each weight. Writes to `.data` are not counted."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in _saved(model))


def _saved(model: nn.Module) -> Iterable[Tensor]:
    """Return what a checkpoint has. Other buffers, such as rotary frequencies, may change with every forward pass."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return tensors.values()
