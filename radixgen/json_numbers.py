"""Bounds on the digits of JSON numbers: a model that prefers digits to anything else still ends each number.

JSON schemas rarely bound numbers, and a grammar of them allows digits without end.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DIGITS = 20
"""Digits of an integer, and of a fraction; 64 bits need 20."""
MAX_EXPONENT_DIGITS = 3
_DIGITS = b"0123456789"


class NumberState(NamedTuple):
    """Where the end of a JSON text stands: in a string or not, and behind how many digits of a number's part."""

    digits: int = 0
    exponent: bool = False
    in_string: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> "NumberState":
        """The state at the end of `text`, which follows."""
        state = self
        for byte in text:
            state = state._after(byte)
        return state

    @property
    def room(self) -> int:
        """Digits that may still follow in this part of the number."""
        return max(0, (MAX_EXPONENT_DIGITS if self.exponent else MAX_DIGITS) - self.digits)

    def _after(self, byte: int) -> "NumberState":
        if self.escaped:
            return _STRING
        if self.in_string:
            return _ESCAPE if byte == ord("\\") else _TEXT if byte == ord('"') else self
        if byte in _DIGITS:
            return NumberState(self.digits + 1, self.exponent)
        if byte == ord('"'):
            return _STRING
        begins_exponent = byte in b"eE" and self.digits > 0
        return _EXPONENT if begins_exponent or (byte in b"+-" and self.exponent and not self.digits) else _TEXT


_TEXT = NumberState()
_STRING = NumberState(in_string=True)
_ESCAPE = NumberState(in_string=True, escaped=True)
_EXPONENT = NumberState(exponent=True)


class NumberBounds:
    """Takes tokens out of masks that would make a number longer than it may be.

    `token_bytes(token)`: what each of the `vocab_size` tokens stands for. A token counts by the digits that it begins
    with, so those within a token can exceed the bound.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], vocab_size: int) -> None:
        self._bytes = token_bytes
        texts = (token_bytes(token) for token in range(vocab_size))
        self._leading = np.fromiter((len(text) - len(text.lstrip(_DIGITS)) for text in texts), np.int32, vocab_size)
        self._most = int(self._leading.max(initial=0))
        self._longer = cache(self._pack)

    def after(self, state: NumberState, token: int) -> NumberState:
        return state.after(self._bytes(token))

    def bound(self, mask: NDArray[np.int32], state: NumberState, *, accepts: bool) -> NDArray[np.int32]:
        """`mask` without tokens that exceed the bound behind `state`: int32 `[ceil(vocab / 32)]`, as of `AllowedTokens`. All
        of it where nothing else goes on, as behind the first digits of a long constant.
        """
        if state.in_string or state.room >= self._most:
            return mask
        bounded = mask & ~self._longer(state.room)
        return bounded if accepts or bounded.any() else mask

    def _pack(self, room: int) -> NDArray[np.int32]:
        """Tokens that begin with more than `room` digits, as a mask."""
        bits = np.zeros(-(-self._leading.size // 32) * 32, np.bool_)
        bits[: self._leading.size] = self._leading > room
        return np.packbits(bits, bitorder="little").view(np.int32)
