"""Vocabulary of a tokenizer: known tokens, special tokens, and the bytes of each token."""

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """Tokens of a tokenizer. Thread-safe."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer: Any = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes: dict[int, bytes] = {}

    @property
    def fast(self) -> bool:
        """Whether it is a fast tokenizer, of the `tokenizers` library."""
        return self._backend is not None

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` omits from a text."""
        if self._backend is None:
            return frozenset(getattr(self.tokenizer, "all_special_ids", ()))
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token in added if added[token].special)

    @cached_property
    def byte_level(self) -> bool:
        """Whether a text is the concatenation of its tokens' bytes, decoded as UTF-8."""
        return self._decoders == ["ByteLevel"]

    def knows(self, token: int) -> bool:
        """Whether the token exists; always true for slow tokenizers."""
        return self._backend is None or self._backend.id_to_token(token) is not None

    def unknown(self, size: int) -> NDArray[np.int64]:
        """Unknown token ids below `size`, ascending.

        For slow tokenizers, those beyond the last known id; none if the tokenizer does not list its tokens.
        """
        try:
            known = {*self.tokenizer.get_vocab().values(), *getattr(self.tokenizer, "added_tokens_decoder", ())}
        except (AttributeError, NotImplementedError):
            return np.empty(0, np.int64)
        ids = np.fromiter(known, np.int64, len(known))
        return np.setdiff1d(np.arange(size), ids if self.fast else np.arange(ids.max(initial=-1) + 1))

    def special_tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that consists of special tokens only; empty for any other text."""
        if not self.special or not text:
            return ()
        tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self.special.issuperset(tokens):
            return ()
        return tokens if "".join(self.tokenizer.convert_ids_to_tokens(list(tokens))) == text else ()

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes that `token` adds to a text, possibly parts of a character; empty if it is unknown.

        The bytes of a text's tokens add up to the text. Those of a special token are its name.
        """
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._read(token)
        return data

    def _read(self, token: int) -> bytes:
        piece: object = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            return piece
        if isinstance(piece, str):
            if self._characters is not None and self._characters.keys() >= set(piece):
                return bytes(self._characters[character] for character in piece)
            if token in self._added or self.byte_level:
                return piece.encode("utf-8", "replace")
            if self._space is not None:
                byte = _BYTE.fullmatch(piece)
                return bytes.fromhex(byte[1]) if byte else piece.replace(self._space, " ").encode("utf-8", "replace")
        return str(self.tokenizer.decode([token])).encode("utf-8", "replace") if self.knows(token) else b""

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(getattr(self.tokenizer, "added_tokens_decoder", ()))

    @cached_property
    def _decoders(self) -> list[str]:
        """Types of the decoder steps of a fast tokenizer."""
        decoder = None if self._backend is None else self._backend.decoder
        state = None if decoder is None else json.loads(decoder.__getstate__())
        return [] if state is None else [step["type"] for step in state.get("decoders", [state])]

    @cached_property
    def _characters(self) -> dict[str, int] | None:
        return _byte_of_characters() if "ByteLevel" in self._decoders else None

    @cached_property
    def _space(self) -> str | None:
        return "▁" if {"ByteFallback", "Metaspace", "Replace"}.intersection(self._decoders) else None


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's byte encoding: the byte of each printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
