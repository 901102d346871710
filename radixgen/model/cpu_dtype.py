"""The data type of `dtype="auto"` on a CPU: bfloat16 if this processor multiplies it faster than float32."""

import logging
import time

import torch
from torch import Tensor

from radixgen.kernels import packed_linear

logger = logging.getLogger(__name__)

_ROWS, _SIZE, _TIMES = 16, 1024, 5
"""Rows of the timed products, inputs and outputs of the weight, and how often each is timed"""


def multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products in bfloat16: AMX or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@torch.no_grad()
def fastest_dtype() -> torch.dtype:
    """Return bfloat16 if the processor multiplies it, and small products that are timed are faster; else float32."""
    weight = torch.ones(_SIZE, _SIZE)
    if not (multiplies_bfloat16() and packed_linear.supports(weight.bfloat16())):
        logger.info("dtype='auto': float32, because this processor does not multiply bfloat16")
        return torch.float32
    packed = {dtype: packed_linear.pack(weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    seconds = {dtype: min(_product_seconds(dtype, weight) for _ in range(_TIMES)) for dtype, weight in packed.items()}
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if gain > 1.0 else torch.float32
    name = str(chosen).removeprefix("torch.")
    logger.info("dtype='auto': %s, because products in bfloat16 are %.1f times as fast as in float32", name, gain)
    return chosen


def _product_seconds(dtype: torch.dtype, packed: Tensor) -> float:
    rows = torch.ones(_ROWS, _SIZE, dtype=dtype)
    begin = time.perf_counter()
    packed_linear.linear(rows, packed, None)
    return time.perf_counter() - begin
