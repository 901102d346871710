"""Rows of inputs as 8-bit digits: one compiled loop in place of ten small operators.

Equal bit for bit to `radixgen.kernels.int8_linear.split_digits`.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.core.compiled import HAS_NUMBA, compiled

LARGEST = np.float32(127.0)
DIGIT = np.float32(254.0)
"""Steps of the second digit in one step of the first."""
SMALLEST = np.float32(1e-30)
"""Least scale of a row, for rows of zeros."""
_ROUND = np.float32(1.5 * 2**23)
"""Added and taken off again, it rounds a small number, halves to even."""
_NO_SIGN = np.int32(0x7FFFFFFF)


def supports(given: Tensor) -> bool:
    """Return whether `split_digits` takes this tensor; the compiler of PyTorch cannot look into it."""
    return HAS_NUMBA and given.device.type == "cpu" and not torch.compiler.is_compiling()


def split_digits(given: Tensor) -> tuple[Tensor, Tensor]:
    """As `radixgen.kernels.int8_linear.split_digits`."""
    rows, inputs = given.shape
    digits = torch.empty((2 * rows, inputs), dtype=torch.int8)
    steps = torch.empty((rows, 1), dtype=torch.float32)
    numbers = given.detach().float().contiguous()
    _split(numbers.numpy(), numbers.view(torch.int32).numpy(), digits.numpy(), steps.numpy())
    return digits, steps


@compiled
def _split(
    numbers: NDArray[np.float32], bits: NDArray[np.int32], digits: NDArray[np.int8], steps: NDArray[np.float32]
) -> None:
    """`bits` are the numbers as integers, whose order without the sign is that of absolute values, NaN the largest."""
    rows, inputs = numbers.shape
    largest = np.zeros(1, np.int32)
    for row in range(rows):
        most = np.int32(0)
        for i in range(inputs):
            most = max(most, np.int32(bits[row, i] & _NO_SIGN))
        largest[0] = most
        step = largest.view(np.float32)[0]
        if step < SMALLEST:  # noqa: PLR1730 `max` could drop NaN
            step = SMALLEST
        step = np.float32(step / LARGEST)
        steps[row, 0] = step
        for i in range(inputs):
            scaled = np.float32(numbers[row, i] / step)
            high = np.float32(np.float32(scaled + _ROUND) - _ROUND)
            low = np.float32(np.float32(np.float32(np.float32(scaled - high) * DIGIT) + _ROUND) - _ROUND)
            digits[row, i] = np.int8(np.int32(high))
            digits[rows + row, i] = np.int8(np.int32(low))
