"""Drawing tokens on a GPU, by the kernels of `radixgen.kernels.draw_kernels`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams
from radixgen.kernels import draw_kernels
from radixgen.kernels.upload import upload

BLOCK = 2048
"""Tokens whose logits one program reads at once"""
_CHUNK, _WAYS = 1024, 16
_MOST_PASSES = 64
_LARGEST_UNIT = 1e30
"""A lower temperature draws the likeliest tokens alone."""


def draw_tokens(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> Tensor:
    """As `radixgen.kernels.draw.draw_tokens`, in float32."""
    if logits.dtype != torch.float32:
        logits = logits.clamp(max=torch.finfo(torch.float32).max).float()
    draws, width = len(rows), logits.shape[1]
    blocks = triton.cdiv(width, BLOCK)
    device = logits.device
    asked = upload(_settings(rows, params, uniforms), device)
    tops, masses = torch.empty((2, draws, blocks), dtype=torch.float32, device=device)
    best = torch.empty((draws, blocks), dtype=torch.int32, device=device)
    floors = torch.empty(draws, dtype=torch.float32, device=device)
    tokens = torch.empty(draws, dtype=torch.int64, device=device)
    filtered = any(one.top_k > 0 or one.top_p < 1.0 or one.min_p for one in params if not one.greedy)
    padded = triton.next_power_of_2(blocks)
    sizes = {"BLOCK": BLOCK, "num_warps": 4}
    draw_kernels.weigh_blocks[(blocks, draws)](
        logits, logits.stride(0), asked, floors, tops, masses, best, width, draws, blocks, FILTERED=False, **sizes
    )
    if filtered:
        draw_kernels.find_floors[(draws,)](
            logits, logits.stride(0), asked, floors, tops, width, draws, blocks,
            BLOCKS=padded, CHUNK=_CHUNK, WAYS=_WAYS, MOST_PASSES=_MOST_PASSES, num_warps=8,
        )  # fmt: skip
        draw_kernels.weigh_blocks[(blocks, draws)](
            logits, logits.stride(0), asked, floors, tops, masses, best, width, draws, blocks, FILTERED=True, **sizes
        )
    draw_kernels.choose[(draws,)](
        logits, logits.stride(0), asked, floors, tops, masses, best, tokens, width, draws, blocks,
        BLOCKS=padded, FILTERED=filtered, **sizes,
    )  # fmt: skip
    return tokens


def _settings(
    rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What the kernels read of each draw, float64 `[6, draws]`. UNIT is what logits are multiplied by to be exponents
    of 2, 0 for a greedy draw; MIN_P the base-2 logarithm of min_p, so that floors are told in logits.
    """
    units = [0.0 if one.greedy else min(math.log2(math.e) / one.temperature, _LARGEST_UNIT) for one in params]
    least = [math.log2(one.min_p) if one.min_p else -math.inf for one in params]
    top_k, top_p = [max(one.top_k, 0) for one in params], [one.top_p for one in params]
    return np.array([rows, units, top_k, top_p, least, uniforms], np.float64)
