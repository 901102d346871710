"""Text from tokens as they come, one token at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 6


class Detokenizer:
    """The text of one sequence. Bytes of an unfinished character are held back until it is whole."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", prompt: Sequence[int]) -> None:
        self.text = ""
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        if self._backend is not None:
            # Step by step: a stream begun with tokens whose text ends in half a character gives all of it out.
            for token in prompt[-_CONTEXT:]:
                self.push(token)
            self.text = ""

    def push(self, token: int) -> None:
        """Append what `token` makes certain."""
        if self._tokenizer is None:
            return
        if self._backend is None:
            self._ids.append(token)
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            self.text = text if not text.endswith("\ufffd") else self.text
            return
        piece = self._stream.step(self._backend, token)
        if piece:
            self.text += piece
