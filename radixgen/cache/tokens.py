"""Token arrays, their common prefixes, and marked tokens.

From some position on, a request may read inexactly, under a reading policy. The KV that it computes there must be found
by requests that read the same from the same position on, and by no others. So its token at that position is *marked*
in the tree, with the number of the policy: a marked token is another key than the token itself. All that follows it on
a path is inexact, and nothing else is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]

MAX_MARK = 2_047
MAX_MARKED_TOKEN = (1 << 20) - 1
"""Largest token id that can be marked."""
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


def marked(token: int, mark: int) -> int:
    """Return a token with a mark from 1 to `MAX_MARK`: a negative integer of 32 bits."""
    assert 0 < mark <= MAX_MARK and 0 <= token <= MAX_MARKED_TOKEN, (token, mark)
    return -(mark * (MAX_MARKED_TOKEN + 1) + token)


def token_ids(tokens: TokenArray) -> TokenArray:
    """Return `tokens` without marks, uncopied if there are none."""
    if (tokens >= 0).all():
        return tokens
    return np.where(tokens < 0, -tokens & MAX_MARKED_TOKEN, tokens)


def marks(tokens: TokenArray) -> NDArray[np.int32]:
    """Return the marks of those of `tokens` that have one."""
    return -tokens[tokens < 0] // (MAX_MARKED_TOKEN + 1)


def exact_len(tokens: TokenArray) -> int:
    """Return the number of tokens before the first that is marked."""
    inexact = tokens < 0
    first = int(inexact.argmax()) if inexact.size else 0
    return first if inexact.size and inexact[first] else tokens.size
