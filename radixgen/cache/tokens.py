"""Runs of token ids: how they are made, and how far two of them agree."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]

_FIRST_BLOCK = 2_048
_LAST_BLOCK = 65_536


def as_tokens(tokens: Sequence[int] | TokenArray) -> TokenArray:
    """`tokens` as an int32 array, without a copy where it is one already."""
    return np.asarray(tokens, dtype=np.int32)


def common_prefix_len(a: TokenArray, b: TokenArray) -> int:
    """How many leading tokens are equal. Compares in growing blocks, so that an early difference is cheap."""
    length = min(a.size, b.size)
    first, block = 0, _FIRST_BLOCK
    while first < length:
        stop = min(first + block, length)
        differs = a[first:stop] != b[first:stop]
        where = int(differs.argmax())
        if differs[where]:
            return first + where
        first, block = stop, min(block * 8, _LAST_BLOCK)
    return length
