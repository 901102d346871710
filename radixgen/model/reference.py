"""Reference causal attention, with which models are probed."""

import torch
from torch import Tensor

from radixgen.core import Window, first_seen
from radixgen.kernels.merge import apply_sinks
from radixgen.model.layer_call import LayerAttention, LayerCall

TOLERANCE = 0.05
"""Relative to the largest value. Rounding in half precision stays well below it; a missing or extra key does not."""


def causal_attention(call: LayerCall, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Reference causal attention over packed sequences of `lengths`."""
    group = call.q.shape[1] // call.k.shape[1]
    q, k, v = call.q.float(), call.k.float(), call.v.float()
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(q), device=q.device)
    starts = torch.tensor([sum(lengths[:index]) for index in range(len(lengths))], device=q.device)
    seen = (owner[:, None] == owner) & sees(call.window, place - starts[owner])
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    lse = scores.logsumexp(-1).transpose(0, 1)
    if call.sinks is not None:
        out = apply_sinks(out, lse, call.sinks)
    return out.to(call.q.dtype), lse


def causal_over(sequences: list[list[int]]) -> LayerAttention:
    """Return reference causal attention over packed `sequences`."""
    lengths = [len(sequence) for sequence in sequences]
    return lambda call: causal_attention(call, lengths)


def sees(window: Window | None, positions: Tensor) -> Tensor:
    """Return which positions see which, bool `[rows, keys]`."""
    seen = positions[:, None] >= positions
    if window is not None:
        first = torch.from_numpy(first_seen(window, positions.cpu().numpy())).to(positions.device)
        seen &= positions >= first[:, None]
    return seen


def close_to(actual: Tensor, expected: Tensor) -> bool:
    """Return whether the logits of two rows differ by no more than rounding."""
    return float((actual - expected).abs().max()) <= TOLERANCE * (float(expected.abs().max()) + 1e-6)
