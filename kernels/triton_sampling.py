"""Sampling on a GPU by the kernels of `radixgen.kernels.sampling_kernels`."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core import SamplingParams
from radixgen.kernels import sampling_kernels
from radixgen.kernels.draw_settings import draw_settings
from radixgen.kernels.upload import upload

BLOCK = 2048
"""Tokens whose logits one program reads at once."""
_WAYS, _PASSES = 8, 12
"""Thresholds per pass of the search for a floor, and number of passes: its precision is 8**-12 of the logits' range."""


def draw_tokens(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> Tensor:
    """As `radixgen.kernels.torch_sampling.draw_tokens`, in float32."""
    if logits.dtype == torch.float64:  # relative to the largest, so that float32 suffices near it
        logits = (logits - logits.amax(-1, keepdim=True)).float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    sampled = [param for param in params if not param.greedy]
    top_k = any(param.top_k > 0 for param in sampled)
    top_p = any(param.top_p < 1.0 for param in sampled)
    filtered = top_k or top_p or any(param.min_p for param in sampled)
    step = _SamplingStep(logits, upload(draw_settings(rows, params, uniforms), logits.device))
    step.weigh_blocks()
    if top_k:
        step.find_floors(weighed=False)
        step.weigh_blocks(filtered=True)
    if top_p:
        step.find_floors(weighed=True)
    if filtered:
        step.raise_floors()
        step.weigh_blocks(filtered=True)
    return step.choose(filtered=filtered)


class _SamplingStep:
    """All draws of one step: the kernels' launches, and the memory that passes results between them."""

    def __init__(self, logits: Tensor, settings: Tensor) -> None:
        """Logits `[rows, vocab]`, not float64; settings as returned by `draw_settings`."""
        self._logits = logits
        self._settings = settings
        self._draws, self._width = settings.shape[1], logits.shape[1]
        self._blocks = triton.cdiv(self._width, BLOCK)
        self._padded_blocks = triton.next_power_of_2(self._blocks)
        self._tops, self._masses = self._pair(self._draws, self._blocks)
        self._best = logits.new_empty((self._draws, self._blocks), dtype=torch.int32)
        self._floors = self._floats(self._draws).fill_(-math.inf)

    def _floats(self, *shape: int) -> Tensor:
        return self._logits.new_empty(shape, dtype=torch.float32)

    def _pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Return two tensors of this size, flat, aligned to 16 bytes: Triton compiles anew for other addresses."""
        first, second = self._floats(2, -(-math.prod(shape) // 4) * 4)
        return first, second

    def weigh_blocks(self, *, filtered: bool = False) -> None:
        sampling_kernels.weigh_blocks[(self._blocks, self._draws)](
            self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses, self._best,
            self._width, 0, self._draws, self._blocks, BLOCK=BLOCK, FILTERED=filtered, num_warps=4,
        )  # fmt: skip

    def find_floors(self, *, weighed: bool) -> None:
        """Raise the floors to what top-p keeps if `weighed`, else to what top-k keeps."""
        bounds = self._floats(_PASSES + 1, 4, self._draws)
        results = self._pair(self._draws, self._blocks, _WAYS + 2)
        for index in range(_PASSES):
            sampling_kernels.narrow_floors[(self._blocks, self._draws)](
                self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses,
                bounds[index], results[index % 2 - 1], results[index % 2], self._width, self._draws, self._blocks,
                BLOCKS=self._padded_blocks, BLOCK=BLOCK, WAYS=_WAYS, WEIGHED=weighed, FIRST=index == 0, num_warps=4,
            )  # fmt: skip
        self._settle(bounds[-1], results[_PASSES % 2 - 1], searched=True)

    def raise_floors(self) -> None:
        """Raise the floors to what min-p keeps."""
        self._settle(self._floors, self._floors, searched=False)

    def _settle(self, bounds: Tensor, results: Tensor, *, searched: bool) -> None:
        sampling_kernels.settle_floors[(self._draws,)](
            self._settings, self._floors, self._tops, bounds, results, self._draws, self._blocks,
            BLOCKS=self._padded_blocks, WAYS=_WAYS, SEARCHED=searched, num_warps=1,
        )  # fmt: skip

    def choose(self, *, filtered: bool) -> Tensor:
        """Return the tokens, int64 `[draws]`."""
        tokens = self._logits.new_empty(self._draws, dtype=torch.int64)
        sampling_kernels.choose[(self._draws,)](
            self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses, self._best,
            tokens, self._width, 0, self._draws, self._blocks, 0, self._blocks,
            BLOCKS=self._padded_blocks, BLOCK=BLOCK, FILTERED=filtered, num_warps=4,
        )  # fmt: skip
        return tokens
