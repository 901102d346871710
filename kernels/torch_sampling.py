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
    sampled = [i for i, param in enumerate(params) if not param.greedy]
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
    scores = scores - scores.amax(-1, keepdim=True)  # so that low temperatures do not overflow
    greedy = [param.greedy for param in params]
    scores /= _column([param.temperature or 1.0 for param in params], scores)
    probs = scores.softmax(-1)
    filtered = [i for i, param in enumerate(params) if not greedy[i] and (param.top_k > 0 or param.top_p < 1.0)]
    if filtered:
        probs[filtered] = _keep_likeliest(probs[filtered], [params[i] for i in filtered])
    if any(param.min_p for param in params):
        least = _column([param.min_p for param in params], scores) * probs.amax(-1, keepdim=True)
        probs *= probs >= least
    if any(greedy):
        chosen = torch.zeros_like(probs).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(upload(np.array(greedy), scores.device)[:, None], chosen, probs)
    return probs


def _invert(probs: Tensor, uniforms: NDArray[np.float64]) -> Tensor:
    """Return one token per row, `[n]`, by the cumulative distribution in the order of token ids.

    A uniform is at most 1 - 2**-53, so the target is less than the total, and the token has a weight of its own.
    """
    cumulative = weights(probs).cumsum(-1)
    target = upload(uniforms, cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target.long(), right=True)[:, 0]


def weights(probs: Tensor) -> Tensor:
    """Convert probabilities `[n, vocab]` to int64 in units of 2**-62, whose sums are exact.

    On a GPU, the order in which floats of a row are summed depends on the number of rows, and for one row on timing.
    """
    return (probs * 2.0**62).long()


def _keep_likeliest(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Apply top-k, then top-p to the rest. Keeps at least the most likely token, and all tokens tied with the last one
    kept.
    """
    ordered = probs.sort(dim=-1, descending=True).values
    width = ordered.shape[1]
    counts = [min(param.top_k, width) if param.top_k > 0 else width for param in params]
    ordered *= ordered >= ordered.gather(-1, upload(np.array(counts), ordered.device)[:, None] - 1)
    shares = weights(ordered)
    cumulative = shares.cumsum(-1)
    most = _column([param.top_p if param.top_p < 1.0 else math.inf for param in params], ordered)
    kept = (cumulative - shares < most * cumulative[:, -1:]) & (ordered > 0)
    return probs * (probs >= torch.where(kept, ordered, math.inf).amin(-1, keepdim=True))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(np.array(values, np.float64), like.device)[:, None]
