"""Attention over a plan, and the merge of its partial results.

A backend is a class that is built from `(plan, window, device)` once a step and called as
`(q, k, v, scale, softcap) -> (out, lse)` once a layer. `backend_class` finds it by name and imports it only
then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from radixgen.core import InvalidRequest, Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BACKENDS = {"torch": ("radixgen.kernels.torch_backend", "TorchAttention")}
BACKENDS = tuple(_BACKENDS)


class AttentionBackend(Protocol):
    """Attention over one plan, for one window, on one device."""

    kv_tokens_read: int
    """Keys read in one layer, summed over the segments of every unit."""
    kv_tokens_unshared: int
    """Keys that the same rows would read, had each node's rows read their whole path alone."""

    def __init__(self, plan: Plan, window: int | None, device: "torch.device") -> None: ...

    def __call__(
        self, q: "Tensor", k: "Tensor", v: "Tensor", scale: float, softcap: float | None = None
    ) -> "tuple[Tensor, Tensor]": ...


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend called `name`; `"auto"` is the fastest one that runs here. Raises `InvalidRequest`."""
    if name == "auto":
        name = "torch"
    if name not in _BACKENDS:
        raise InvalidRequest("attention", name, f"must be one of auto, {', '.join(BACKENDS)}")
    module, attribute = _BACKENDS[name]
    found: type[AttentionBackend] = getattr(import_module(module), attribute)
    return found
