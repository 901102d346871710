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
_WAYS, _PASSES = 8, 12
"""Thresholds of a pass, and passes, of the search for a floor: a floor is right to 8**-11 of the logits' range."""
_LARGEST_UNIT = 1e30
"""A lower temperature draws the likeliest tokens alone."""


def draw_tokens(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> Tensor:
    """As `radixgen.kernels.draw.draw_tokens`, in float32."""
    if logits.dtype == torch.float64:  # against their largest: float32 tells those near it apart, and holds it
        logits = (logits - logits.amax(-1, keepdim=True)).float()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    drawing = [one for one in params if not one.greedy]
    by_count = any(one.top_k > 0 for one in drawing)
    by_weight = any(one.top_p < 1.0 for one in drawing)
    draws = _Draws(logits, upload(_settings(rows, params, uniforms), logits.device))
    draws.weigh_blocks()
    if by_count:
        draws.find_floors(weighed=False)
        draws.weigh_blocks(filtered=True)
    if by_weight:
        draws.find_floors(weighed=True)
    filtered = by_count or by_weight or any(one.min_p for one in drawing)
    if filtered:
        draws.settle_floors()
        draws.weigh_blocks(filtered=True)
    return draws.choose(filtered=filtered)


class _Draws:
    """What the kernels hand to each other for the draws of one step."""

    def __init__(self, logits: Tensor, settings: Tensor) -> None:
        """Logits `[rows, vocab]`, not float64; settings as `_settings` makes them."""
        self._logits = logits
        self._settings = settings
        self._draws, self._width = settings.shape[1], logits.shape[1]
        self._blocks = triton.cdiv(self._width, BLOCK)
        self._padded = triton.next_power_of_2(self._blocks)
        self._tops, self._masses = self._pair(self._draws, self._blocks)
        self._best = logits.new_empty((self._draws, self._blocks), dtype=torch.int32)
        self._floors = self._floats(self._draws).fill_(-math.inf)

    def _floats(self, *shape: int) -> Tensor:
        return self._logits.new_empty(shape, dtype=torch.float32)

    def _pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Two of this size, flat, at multiples of 16 bytes: a kernel is compiled anew for an address that is none."""
        first, second = self._floats(2, -(-math.prod(shape) // 4) * 4)
        return first, second

    def weigh_blocks(self, *, filtered: bool = False) -> None:
        draw_kernels.weigh_blocks[(self._blocks, self._draws)](
            self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses, self._best,
            self._width, self._draws, self._blocks, BLOCK=BLOCK, FILTERED=filtered, num_warps=4,
        )  # fmt: skip

    def find_floors(self, *, weighed: bool) -> None:
        """Search for the floors of top-p where they are `weighed`, else of top-k, from those that there are on."""
        bounds = self._floats(_PASSES + 1, 4, self._draws)
        found = self._pair(self._draws, self._blocks, _WAYS + 2)
        for turn in range(_PASSES):
            draw_kernels.narrow_floors[(self._blocks, self._draws)](
                self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses,
                bounds[turn], found[turn % 2 - 1], found[turn % 2], self._width, self._draws, self._blocks,
                BLOCKS=self._padded, BLOCK=BLOCK, WAYS=_WAYS, WEIGHED=weighed, FIRST=turn == 0, num_warps=4,
            )  # fmt: skip
        self._settle(bounds[-1], found[_PASSES % 2 - 1], searched=True)

    def settle_floors(self) -> None:
        """Raise floors to what min-p keeps."""
        self._settle(self._floors, self._floors, searched=False)

    def _settle(self, bounds: Tensor, found: Tensor, *, searched: bool) -> None:
        draw_kernels.settle_floors[(self._draws,)](
            self._settings, self._floors, self._tops, bounds, found, self._draws, self._blocks,
            BLOCKS=self._padded, WAYS=_WAYS, SEARCHED=searched, num_warps=1,
        )  # fmt: skip

    def choose(self, *, filtered: bool) -> Tensor:
        """Int64 `[draws]`."""
        tokens = self._logits.new_empty(self._draws, dtype=torch.int64)
        draw_kernels.choose[(self._draws,)](
            self._logits, self._logits.stride(0), self._settings, self._floors, self._tops, self._masses, self._best,
            tokens, self._width, self._draws, self._blocks,
            BLOCKS=self._padded, BLOCK=BLOCK, FILTERED=filtered, num_warps=4,
        )  # fmt: skip
        return tokens


def _settings(
    rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What the kernels read of each draw, float64 `[6, draws]`. UNIT is what logits are multiplied by to be exponents
    of 2, 0 for a greedy draw; MIN_P the base-2 logarithm of min_p, so that floors are told in logits.
    """
    found = np.empty((6, len(rows)))
    kinds: dict[int, tuple[float, float, float, float]] = {}
    for one in params:
        if id(one) not in kinds:
            unit = 0.0 if one.greedy else min(math.log2(math.e) / one.temperature, _LARGEST_UNIT)
            least = math.log2(one.min_p) if one.min_p else -math.inf
            kinds[id(one)] = unit, max(one.top_k, 0), one.top_p, least
    found[0], found[5] = rows, uniforms
    found[1:5] = np.array([kinds[id(one)] for one in params]).T
    return found
