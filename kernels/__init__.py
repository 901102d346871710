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
    """Attention over one plan, for one window, on one device. Made once a step, called once a layer.

    A row at position `p` sees, of the segments of the units that cover it, the keys at positions `<= p`, and `> p -
    window` where there is a window. Any slot that no row may see is undefined memory, NaN perhaps: nothing of it
    may reach a result.
    """

    kv_tokens_read: int
    """Keys read in one layer, summed over the segments of every unit."""
    kv_tokens_unshared: int
    """Keys that the same rows would read, had each node's rows read their whole path alone."""

    def __init__(self, plan: Plan, window: int | None, device: "torch.device") -> None: ...

    def __call__(
        self, q: "Tensor", k: "Tensor", v: "Tensor", scale: float, softcap: float | None = None
    ) -> "tuple[Tensor, Tensor]":
        """
        Rows come in the plan's order: q `[rows, q_heads, head_dim]`. k `[slots, kv_heads, head_dim]` and v
        `[slots, kv_heads, v_head_dim]` are the whole pool, in any floating dtype. Scores are multiplied by `scale`,
        then capped: `softcap * tanh(score / softcap)`.

        Returns `out [rows, q_heads, v_head_dim]` and `lse [rows, q_heads]` (natural log), in float32, or in float64 for
        float64 inputs. A row that sees no key gives 0 and -inf.
        """


def backend_class(name: str) -> type[AttentionBackend]:
    """The backend called `name`; `"auto"` is the fastest one that runs here. Raises `InvalidRequest`."""
    if name == "auto":
        name = "torch"
    if not isinstance(name, str) or name not in _BACKENDS:
        raise InvalidRequest("attention", name, f"must be one of auto, {', '.join(BACKENDS)}")
    module, attribute = _BACKENDS[name]
    found: type[AttentionBackend] = getattr(import_module(module), attribute)
    return found
