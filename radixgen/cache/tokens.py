"""Token arrays, and their common prefixes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]

_FIRST_BLOCK = 2_048
_LAST_BLOCK = 65_536


def as_tokens(tokens: Sequence[int] | TokenArray) -> TokenArray:
    """Convert `tokens` to an int32 array, without a copy if possible."""
    return np.asarray(tokens, dtype=np.int32)


def common_prefix_len(a: TokenArray, b: TokenArray) -> int:
    """Return the number of equal leading tokens. Compares in growing blocks, so that early differences are cheap."""
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
