"""What single tokens stand for, in bytes: parts of characters too."""

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of a tokenizer's tokens, so that those of a text's tokens together are its UTF-8.

    Special tokens have none, as they have no text in answers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token: added[token].content for token in added}
        kinds = _decoders(tokenizer)
        self._characters = _byte_of_characters() if "ByteLevel" in kinds else None
        self._space = "▁" if kinds & {"ByteFallback", "Metaspace", "Replace"} else None

    def __call__(self, token: int) -> bytes:
        if token in self._special:
            return b""
        if token in self._added:
            return str(self._added[token]).encode()
        piece: object = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, bytes):
            return piece
        if isinstance(piece, str):
            if self._characters is not None and self._characters.keys() >= set(piece):
                return bytes(self._characters[character] for character in piece)
            if self._space is not None:
                byte = _BYTE.fullmatch(piece)
                return bytes.fromhex(byte[1]) if byte else piece.replace(self._space, " ").encode("utf-8", "replace")
        return str(self._tokenizer.decode([token])).encode("utf-8", "replace")


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of steps by which the tokenizer's library turns tokens into text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None or backend.decoder is None else json.loads(backend.decoder.__getstate__())
    if decoder is None:
        return set()
    return {one["type"] for one in decoder.get("decoders", [decoder])}


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
