"""Sampling from logits in PyTorch: filters, and inversion of the cumulative distribution.

Uses float64 and integer sums. `radixgen.kernels.triton_sampling` is the equivalent for GPUs: both draw the same token,
except for a uniform within 1e-6 of the boundary between two tokens.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams
from radixgen.kernels.upload import upload


def draw_tokens(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> Tensor:
    """Draw one token per draw, int64 `[draws]`, from `logits` `[rows, vocab]`.

    Draw `i` uses row `rows[i]`, the temperature, top-k, top-p and min-p of `params[i]`, and `uniforms[i]` in [0, 1).

    The token is the first at which the cumulative distribution, in the order of token ids, exceeds the uniform; for
    greedy draws, the first of the most likely ones. -1 if the row has NaN, +inf, or nothing finite. Draws are
    independent of each other.
    """
    best, likeliest = logits.max(-1)
    draw_rows = upload(np.array(rows, np.int64), logits.device)
    tokens = torch.where(best.isfinite(), likeliest, -1).index_select(0, draw_rows)
    sampled = [i for i, one in enumerate(params) if not one.greedy]
    if sampled:
        places = upload(np.array(sampled), logits.device)
        scores = logits.index_select(0, draw_rows.index_select(0, places)).double()
        drawn = _invert(probabilities(scores, [params[i] for i in sampled]), uniforms[sampled])
        tokens.index_copy_(0, places, torch.where(tokens.index_select(0, places) >= 0, drawn, -1))
    return tokens


def probabilities(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Convert float64 scores `[n, vocab]`, one row per draw, to filtered probabilities, which need not sum to 1.

    Greedy draws get the most likely token only.
    """
    scores = scores - scores.amax(-1, keepdim=True)  # so that no temperature, however low, makes infinities of them
    greedy = [one.greedy for one in params]
    scores /= _column([one.temperature or 1.0 for one in params], scores)
    found = scores.softmax(-1)
    filtered = [i for i, one in enumerate(params) if not greedy[i] and (one.top_k > 0 or one.top_p < 1.0)]
    if filtered:
        found[filtered] = _keep_likeliest(found[filtered], [params[i] for i in filtered])
    if any(one.min_p for one in params):
        least = _column([one.min_p for one in params], scores) * found.amax(-1, keepdim=True)
        found *= found >= least
    if any(greedy):
        chosen = torch.zeros_like(found).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        found = torch.where(upload(np.array(greedy), scores.device)[:, None], chosen, found)
    return found


def _invert(found: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    """Return one token per row, `[n]`, by the cumulative distribution in the order of token ids.

    A uniform is at most 1 - 2**-53, so the target is less than the total, and the token has a weight of its own.
    """
    cumulative = weights(found).cumsum(-1)
    target = upload(uniforms, cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target.long(), right=True)[:, 0]


def weights(found: Tensor) -> Tensor:
    """Convert probabilities `[n, vocab]` to int64 in units of 2**-62, whose sums are exact.

    On a GPU, the order in which floats of a row are summed depends on the number of rows, and for one row on timing.
    """
    return (found * 2.0**62).long()


def _keep_likeliest(found: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply top-k, then top-p to the rest. Keeps at least the most likely token, and all tokens tied with the last one
    kept.
    """
    ordered = found.sort(dim=-1, descending=True).values
    width = ordered.shape[1]
    counts = [min(one.top_k, width) if one.top_k > 0 else width for one in params]
    ordered *= ordered >= ordered.gather(-1, upload(np.array(counts), ordered.device)[:, None] - 1)
    shares = weights(ordered)
    cumulative = shares.cumsum(-1)
    most = _column([one.top_p if one.top_p < 1.0 else math.inf for one in params], ordered)
    kept = (cumulative - shares < most * cumulative[:, -1:]) & (ordered > 0)
    return found * (found >= torch.where(kept, ordered, math.inf).amin(-1, keepdim=True))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(np.array(values, np.float64), like.device)[:, None]
