"""Text from tokens as they come, and the stop strings in it."""

from collections.abc import Sequence
from copy import copy, deepcopy
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
_CONTEXT = 10
"""Prompt tokens a stream starts from: half a character, a whole one before it, and half a one left by the cut."""


class Detokenizer:
    """The text of one sequence, up to the first stop string.

    `text` is all that is certain: whole characters, and what later tokens do not change. Bytes of an unfinished
    character are never given out, not even at the end. The first `safe_length` characters of it stay whatever
    comes; the rest may be the beginning of a stop string. Both only grow until a stop string is met, and then
    `text` is no shorter than `safe_length` was. Without a tokenizer the text is empty.

    `stop` holds non-empty strings. As in vLLM the one that is complete first wins, the first in `stop` where several
    are complete at the same character, however the text falls into tokens; so `"ab"` is met before `"abc"`. `text`
    ends before it, or after it with `include_stop`, where nothing need be held back.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        prompt: Sequence[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> None:
        self.text = ""
        self.safe_length = 0
        self._stop = stop
        self._include_stop = include_stop
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = backend is not None
        self._decoder: Any = backend if self._fast else tokenizer
        self._stream = self._new_stream()
        self._held: list[int] = []
        self._given = 0
        if tokenizer is not None:
            # Step by step: a stream begun with tokens whose text ends in half a character gives all of it out.
            for token in self._context(prompt):
                self._decode(token)

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Append what `token` makes certain; the stop string that is now met, else None.

        As under vLLM's `min_tokens`, a stop string counts if its last character comes with `may_stop`; it may begin
        earlier. Nothing is pushed after a stop string or `finish`. Raises what the tokenizer raises.
        """
        piece = self._decode(token) if self._decoder is not None else ""
        if not piece:
            return None
        searched = len(self.text)
        self.text += piece
        stop = self._cut(searched) if may_stop and self._stop else None
        if stop is not None or self._include_stop or not self._stop:
            self.safe_length = len(self.text)
        else:
            self.safe_length = min(_opening(self.text, each, self.safe_length) for each in self._stop)
        return stop

    def finish(self) -> None:
        """The sequence ended: what is held for a stop string is safe now."""
        self.safe_length = len(self.text)

    def fork(self) -> "Detokenizer":
        """An independent copy that goes on from here, half characters included. Costs the same at any length."""
        twin = copy(self)
        twin._stream = deepcopy(self._stream)
        twin._held = self._held.copy()
        return twin

    # -- inside -------------------------------------------------------------------------------------------

    def _context(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt's last tokens, from the beginning of a character on if the prompt ends with a whole one."""
        tails = [list(prompt[-count:]) for count in range(_CONTEXT, 0, -1)]
        return next((tail for tail in tails if _HALF not in self._read(tail)), tails[0])

    def _decode(self, token: int) -> str:
        """The characters that `token` makes whole. The stream holds a token that ends in half a character back, and
        whole characters with it: these are read from the held tokens, `_given` of them so far.
        """
        self._held.append(token)
        piece, given = self._step(token), self._given
        if piece is not None:
            self._held.clear()
            self._given = 0
            return piece[given:]
        held = self._read(self._held)
        piece = held.rstrip(_HALF) if held.endswith(_HALF) else ""
        self._given = len(piece)
        return piece[given:]

    def _step(self, token: int) -> str | None:
        """A stream fails when bytes that make no character change how the bytes before them decode. What is out
        stays, and a new stream begins with what is held; any other failure comes again.
        """
        try:
            return self._stream.step(self._decoder, token)
        except Exception:
            self._stream = self._new_stream()
            return "".join(self._stream.step(self._decoder, held) or "" for held in self._held) or None

    def _new_stream(self) -> "DecodeStream | _WindowStream":
        return DecodeStream(skip_special_tokens=True) if self._fast else _WindowStream()

    def _read(self, tokens: list[int]) -> str:
        return str(self._decoder.decode(tokens, skip_special_tokens=True))

    def _cut(self, searched: int) -> str | None:
        """Cut `text` at the first stop string that ends after its first `searched` characters."""
        places = [(self.text.find(stop, max(0, searched + 1 - len(stop))), stop) for stop in self._stop]
        met = [(place + len(stop), stop) for place, stop in places if place >= 0]
        if not met:
            return None
        end, stop = min(met, key=itemgetter(0))
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return stop


class _WindowStream:
    """`DecodeStream` for tokenizers that the tokenizers library does not run. The tokens of the last piece are the
    context in which the next is decoded.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._context = 0
        self._prefix = ""

    def step(self, tokenizer: "PreTrainedTokenizerBase", token: int) -> str | None:
        self._tokens.append(token)
        text = str(tokenizer.decode(self._tokens, skip_special_tokens=True))
        if len(text) <= len(self._prefix) or text.endswith(_HALF):
            return None
        piece = text[len(self._prefix) :]
        self._tokens = self._tokens[self._context :]
        self._context = len(self._tokens)
        self._prefix = str(tokenizer.decode(self._tokens, skip_special_tokens=True))
        return piece


def _opening(text: str, stop: str, start: int) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`, not all of it, and lies in
    `text[start:]`; `len(text)` if there is none.
    """
    place = text.find(stop[0], max(start, len(text) - len(stop) + 1))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return place if place >= 0 else len(text)
