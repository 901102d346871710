"""Limits on the digits of JSON numbers, so that a model that prefers digits to anything else still ends each number.

JSON schemas rarely limit numbers, and their grammars allow any number of digits.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DIGITS = 20
"""Maximum digits of an integer part, and of a fraction; 64 bits need 20."""
MAX_EXPONENT_DIGITS = 3
_DIGITS = b"0123456789"


class NumberState(NamedTuple):
    """State at the end of a JSON text: in a string or not, and the digits so far of a part of a number."""

    digits: int = 0
    exponent: bool = False
    in_string: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> "NumberState":
        """Return the state after `text`."""
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
    """Removes tokens from masks that would make a number too long.

    `token_bytes(token)`: the text of each of the `vocab_size` tokens. Only the leading digits of a token count, so that
    digits further inside a token can exceed the limit.
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
        """Return `mask` without tokens that exceed the limit after `state`: int32 `[ceil(vocab / 32)]`, as in
        `AllowedTokens`.

        Returns all of it if no other token is allowed, as within a long constant.
        """
        if state.in_string or state.room >= self._most:
            return mask
        bounded = mask & ~self._longer(state.room)
        return bounded if accepts or bounded.any() else mask

    def _pack(self, room: int) -> NDArray[np.int32]:
        """Return a mask of the tokens that begin with more than `room` digits."""
        bits = np.zeros(-(-self._leading.size // 32) * 32, np.bool_)
        bits[: self._leading.size] = self._leading > room
        return np.packbits(bits, bitorder="little").view(np.int32)
