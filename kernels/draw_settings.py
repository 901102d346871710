"""The settings of a step's draws as an array, which kernels read and ranks send."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from radixgen.core import SamplingParams

ROW, UNIT, TOP_K, TOP_P, MIN_P, UNIFORM = range(6)
"""Rows of the array: row of the logits; factor that turns logits into exponents of 2, 0 for greedy draws; number of
tokens to keep, 0 for all; share of the weight to keep; base-2 logarithm of the minimum weight to keep, relative to the
largest; random number in [0, 1).
"""
_LARGEST_UNIT = 1e30
"""Maximum base-2 exponents per logit. Lower temperatures draw only the most likely tokens."""


def draw_settings(
    rows: Sequence[int], params: Sequence[SamplingParams], uniforms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the settings of each draw, float64 `[6, draws]`."""
    settings = np.empty((6, len(rows)))
    columns: dict[int, tuple[float, float, float, float]] = {}
    for param in params:
        if id(param) not in columns:  # many draws share parameters
            unit = 0.0 if param.greedy else min(math.log2(math.e) / param.temperature, _LARGEST_UNIT)
            min_p = math.log2(param.min_p) if param.min_p else -math.inf
            columns[id(param)] = unit, max(param.top_k, 0), param.top_p, min_p
    settings[ROW], settings[UNIFORM] = rows, uniforms
    settings[UNIT : MIN_P + 1] = np.array([columns[id(param)] for param in params]).T
    return settings
