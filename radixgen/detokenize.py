"""Incremental detokenization, and detection of stop strings."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Sequence
from copy import copy
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, Self

from radixgen.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
_CONTEXT = 10
"""Number of prompt tokens that are decoded as context: enough for incomplete characters at both ends"""
_UNFINISHED = 3
"""Maximum number of tokens of an incomplete character, which has up to four bytes"""
_MOST_HELD = 16
"""Maximum number of tokens whose text is incomplete, and which are decoded again with each new token"""


class Detokenizer:
    """Text of one sequence, up to the first stop string.

    `text` is the final part: complete characters that later tokens do not change. Bytes of an incomplete character are
    held back, even at the end; bytes that cannot form a character become U+FFFD, after at most four. The first
    `safe_length` characters of `text` can be output; the rest may be the beginning of a stop string. Both only grow
    until a stop string is found, and then `text` is cut, but not below `safe_length`. Each token takes constant time.
    Without a tokenizer the text is empty.

    stop: non-empty stop strings. As in vLLM, the one that is complete first counts, and of several the first in `stop`:
        `"ab"` is found before `"abc"`. A stop string of special tokens is also found if they have no text.
    include_stop: whether `text` includes the stop string.
    skip_special: whether special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        prompt: Sequence[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """vocabulary: that of the tokenizer, if it exists already."""
        self.text = ""
        self.safe_length = 0
        self._stop = stop
        self._include_stop = include_stop
        self._vocabulary = vocabulary or (Vocabulary(tokenizer) if tokenizer is not None else None)
        self._skipped: frozenset[int] = frozenset()
        self._stop_tokens: dict[tuple[int, ...], str] = {}
        if self._vocabulary is None:
            return
        if skip_special:
            self._skipped = self._vocabulary.special
            split = {self._vocabulary.special_tokens(each): each for each in reversed(stop)}
            self._stop_tokens = {tokens: each for tokens, each in split.items() if tokens}
        self._last: deque[int] = deque(maxlen=max(map(len, self._stop_tokens), default=0))
        kind: type[_TextStream] = _Bytes if self._vocabulary.byte_level else _Window
        self._stream = kind(self._vocabulary, skip_special)
        # One by one: an incomplete character at the end of the first tokens would be output.
        for token in self._stream.context(prompt):
            self._decode(token)

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Append a token. Returns the stop string that is now complete, or None.

        may_stop: whether a stop string may end with this token; it may start earlier, as with vLLM's `min_tokens`.

        Push nothing after a stop string or `finish`. Raises the tokenizer's errors.
        """
        if self._vocabulary is None:
            return None
        if self._stop_tokens and (stop := self._stopped_at(token)) is not None and may_stop:
            self.text += stop if self._include_stop else ""
            self.safe_length = len(self.text)
            return stop
        piece = self._decode(token)
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
        """End the sequence: text that was held back for a stop string becomes safe."""
        self.safe_length = len(self.text)

    def fork(self) -> "Detokenizer":
        """Create an independent copy, in constant time."""
        twin = copy(self)
        if self._vocabulary is not None:
            twin._stream, twin._last = self._stream.fork(), self._last.copy()
        return twin

    # -- inside -------------------------------------------------------------------------------------------

    def _decode(self, token: int) -> str:
        """Characters that become final with `token`."""
        assert self._vocabulary is not None
        if token in self._skipped or not self._vocabulary.knows(token):
            return ""
        return self._stream.push(token)

    def _stopped_at(self, token: int) -> str | None:
        """Stop string of special tokens that is complete with `token`."""
        self._last.append(token)
        last = tuple(self._last)
        return next((each for tokens, each in self._stop_tokens.items() if last[-len(tokens) :] == tokens), None)

    def _cut(self, searched: int) -> str | None:
        """Cut `text` at the first stop string that ends after its first `searched` characters."""
        starts = [(self.text.find(stop, max(0, searched + 1 - len(stop))), stop) for stop in self._stop]
        ends = [(start + len(stop), stop) for start, stop in starts if start >= 0]
        if not ends:
            return None
        end, stop = min(ends, key=itemgetter(0))
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return stop


class _TextStream(Protocol):
    """Incremental decoder of tokens that have text."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None: ...

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """Last tokens of the prompt, to decode before the answer."""

    def push(self, token: int) -> str:
        """Characters that become final with a token."""

    def fork(self) -> Self:
        """Create an independent copy."""


class _Bytes:
    """Decoder for byte-level tokenizers, by UTF-8."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        return prompt[-_CONTEXT:]

    def push(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary.bytes_of(token))

    def fork(self) -> Self:
        twin = copy(self)
        twin._decoder = copy(self._decoder)
        return twin


class _Window:
    """Decoder for all other tokenizers. The last tokens are decoded again with each new token.

    Tokens whose text is not final are held, and decoded after the tokens of the last final piece of text as context.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._tokenizer = vocabulary.tokenizer
        if vocabulary.fast:
            self._tokenizer = vocabulary.tokenizer.backend_tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        self._before = ""
        """Text of the context"""
        self._held: list[int] = []
        self._given = 0
        """Number of characters of the held tokens that were returned"""

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """Last tokens of the prompt that decode to complete characters, if there are any."""
        tails = [list(prompt[-count:]) for count in range(_CONTEXT, 0, -1)]
        return next((tail for tail in tails if _HALF not in self._read(tail)), tails[0])

    def push(self, token: int) -> str:
        self._held.append(token)
        text, given = self._text(self._held), self._given
        end = self._certain(text)
        if end > given:
            self._given = end
        if text and end == len(text):
            self._keep(self._held)
            self._held, self._given = [], 0
        elif len(self._held) > _MOST_HELD:
            self._shorten()
        return text[given:end]

    def fork(self) -> Self:
        twin = copy(self)
        twin._held = self._held.copy()
        return twin

    def _certain(self, text: str) -> int:
        """Number of characters of the held tokens' text that are final."""
        whole = len(text.rstrip(_HALF))
        if whole == len(text) or len(self._held) <= _UNFINISHED:
            return whole
        known = self._text(self._held[:-_UNFINISHED])
        return max(whole, len(known)) if text.startswith(known) else whole

    def _shorten(self) -> None:
        """Hold only the tokens that may be an incomplete character."""
        head = self._held[:-_UNFINISHED]
        known = self._text(head)
        if known:
            self._keep(head)
        self._held = self._held[-_UNFINISHED:]
        self._given = max(self._given - len(known), 0)

    def _text(self, held: list[int]) -> str:
        text = self._read([*self._context, *held])
        if text.startswith(self._before):
            return text[len(self._before) :]
        # Invalid bytes change how the bytes before them decode. What was returned stays.
        self._keep([])
        return self._read(held)

    def _keep(self, context: list[int]) -> None:
        self._context, self._before = context, self._read(context)

    def _read(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special))


def _opening(text: str, stop: str, start: int) -> int:
    """Index of the longest suffix of `text[start:]` that is a proper prefix of `stop`; `len(text)` if there is none."""
    index = text.find(stop[0], max(start, len(text) - len(stop) + 1))
    while index >= 0 and not stop.startswith(text[index:]):
        index = text.find(stop[0], index + 1)
    return index if index >= 0 else len(text)
