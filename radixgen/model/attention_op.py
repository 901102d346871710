"""`radixgen::layer_attention`: KV write and attention of a layer as one custom operator, opaque to `torch.compile`.

All layers share the code of one compiled block, so the operator cannot have an argument for the layer or the model.
Instead, each forward pass sets a function that handles its calls, and counts the calls to identify the layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor, library


class AttentionHandler(Protocol):
    """Computes the next layer of a forward pass."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Query `[1, q_heads, rows, head_dim]`, key and value `[1, kv_heads, rows, head_dim or v_head_dim]`.

        Returns a new tensor `[1, rows, q_heads, v_head_dim]` in the query's dtype.
        """


_ANSWER: ContextVar[AttentionHandler] = ContextVar("radixgen_layer_attention")


@contextmanager
def handle_attention(answer: AttentionHandler) -> Iterator[None]:
    """Handle calls of the operator in this thread with `answer`."""
    token = _ANSWER.set(answer)
    try:
        yield
    finally:
        _ANSWER.reset(token)


def layer_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Call the custom operator, with the arguments and the result of `AttentionHandler`. Requires `register`."""
    output: Tensor = torch.ops.radixgen.layer_attention(query, key, value, scale, softcap, sinks)
    return output


def register() -> None:
    """Register the operator with PyTorch."""
    if hasattr(torch.ops.radixgen, "layer_attention"):
        return

    @library.custom_op("radixgen::layer_attention", mutates_args=())
    def operator(
        query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        return _ANSWER.get()(query, key, value, scale, softcap, sinks)

    @operator.register_fake
    def _(
        query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        _, q_heads, rows, _ = query.shape
        return query.new_empty((1, rows, q_heads, value.shape[3]))
