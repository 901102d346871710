"""Merge of partial results by their log-sum-exp (LSE).

A partial result over a set of keys is a pair (out, lse). Two over disjoint sets merge into the pair over their union,
exactly up to rounding; the operation is associative. All partial results of a row are merged against their common
maximum, which loses less precision than merging them one after the other. (Hydragen, arXiv 2402.05099, section 3.2; the
pair is FlashInfer's attention state.)
"""

import torch
from torch import Tensor


def merge_partials(
    partials: Tensor, lses: Tensor, order: list[tuple[Tensor, Tensor]], rows: int
) -> tuple[Tensor, Tensor]:
    """Merge each row's partial results in a fixed order.

    partials `[partials, kv_heads, group, v_head_dim]`, lses `[partials, kv_heads, group]` (natural log), in the
    accumulation dtype. `order[k]`: `(row_index, partial_index)` of the k-th partial result of every row that has one.
    Returns `out [rows, kv_heads, group, v_head_dim]` and `lse [rows, kv_heads, group]`; a row without keys gives 0 and
    -inf.
    """
    lse_shape = (rows, *lses.shape[1:])
    top = torch.full(lse_shape, float("-inf"), dtype=lses.dtype, device=lses.device)
    for row_index, partial_index in order:
        top[row_index] = torch.maximum(top[row_index], lses[partial_index])
    base = torch.where(top.isneginf(), 0.0, top)
    total = torch.zeros_like(top)
    out = torch.zeros((rows, *partials.shape[1:]), dtype=partials.dtype, device=partials.device)
    for row_index, partial_index in order:
        weight = (lses[partial_index] - base[row_index]).exp()
        total[row_index] += weight
        out[row_index] += partials[partial_index] * weight.unsqueeze(-1)
    out /= torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return out, base + total.log()


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add one logit per head that takes weight and has no value: `out · e^lse / (e^lse + e^sink)`.

    out `[rows, q_heads, v_head_dim]`, lse `[rows, q_heads]`, sinks `[q_heads]`. Apply once, after the last merge.
    """
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)).unsqueeze(-1).to(out.dtype)
