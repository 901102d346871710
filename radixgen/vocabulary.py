"""What a tokenizer's tokens are: which it knows, which are special, and the bytes that each stands for."""

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
    """The tokens of one tokenizer. May be used from several threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer: Any = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes: dict[int, bytes] = {}

    @property
    def fast(self) -> bool:
        """Whether the tokenizers library runs it."""
        return self._backend is not None

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of a text."""
        if self._backend is None:
            return frozenset(getattr(self.tokenizer, "all_special_ids", ()))
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token in added if added[token].special)

    @cached_property
    def byte_level(self) -> bool:
        """Whether a text is its tokens' bytes, one after the other, read as UTF-8."""
        return self._decoders == ["ByteLevel"]

    def knows(self, token: int) -> bool:
        """Whether there is such a token; a tokenizer that the tokenizers library does not run says so of each."""
        return self._backend is None or self._backend.id_to_token(token) is not None

    def unknown(self, size: int) -> NDArray[np.int64]:
        """Those of the ids below `size` that it does not know, ascending; of a tokenizer that the tokenizers library
        does not run, those beyond its last one, or none where it does not tell its tokens.
        """
        try:
            known = {*self.tokenizer.get_vocab().values(), *getattr(self.tokenizer, "added_tokens_decoder", ())}
        except (AttributeError, NotImplementedError):
            return np.empty(0, np.int64)
        ids = np.fromiter(known, np.int64, len(known))
        return np.setdiff1d(np.arange(size), ids if self.fast else np.arange(ids.max(initial=-1) + 1))

    def special_tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that special tokens make up, and nothing else does; of any other, none."""
        if not self.special or not text:
            return ()
        tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not self.special.issuperset(tokens):
            return ()
        return tokens if "".join(self.tokenizer.convert_ids_to_tokens(list(tokens))) == text else ()

    def bytes_of(self, token: int) -> bytes:
        """What `token` adds to a text in UTF-8, parts of characters too, so that those of a text's tokens together are
        the text; a special token's own name. Empty where it is unknown.
        """
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._read(token)
        return found

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
        """The kinds of steps by which the tokenizers library turns tokens into text."""
        decoder = None if self._backend is None else self._backend.decoder
        state = None if decoder is None else json.loads(decoder.__getstate__())
        return [] if state is None else [one["type"] for one in state.get("decoders", [state])]

    @cached_property
    def _characters(self) -> dict[str, int] | None:
        return _byte_of_characters() if "ByteLevel" in self._decoders else None

    @cached_property
    def _space(self) -> str | None:
        return "▁" if {"ByteFallback", "Metaspace", "Replace"}.intersection(self._decoders) else None


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
