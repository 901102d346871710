"""Attention of one layer, as models call it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from radixgen.core import Window


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's call of attention; q, k, v are `[rows, heads, head_dim]`."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: Window | None
    softcap: float | None
    sinks: Tensor | None


class LayerAttention(Protocol):
    """Computes one layer: `out [rows, q_heads, v_head_dim]` in q's dtype, and `lse [rows, q_heads]`."""

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]: ...
