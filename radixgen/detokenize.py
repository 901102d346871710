"""Text from tokens as they come, and the stop strings in it."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Sequence
from copy import copy
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, Self

from radixgen.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
_CONTEXT = 10
"""Prompt tokens a stream starts from: half a character, a whole one before it, and half a one left by the cut."""
_UNFINISHED = 3
"""Tokens that may be the beginning of a character: one has four bytes at the most."""
_MOST_HELD = 16
"""Tokens whose text is not out and that are decoded with each further one"""


class Detokenizer:
    """The text of one sequence, up to the first stop string.

    `text` is all that is certain: whole characters, and what later tokens do not change. Bytes that may become a
    character are never given out, not even at the end; bytes that can't are U+FFFD, after four of them at the latest.
    The first `safe_length` characters of it stay whatever comes; the rest may be the beginning of a stop string. Both
    only grow until a stop string is met, and then `text` is no shorter than `safe_length` was. Without a tokenizer the
    text is empty. With `skip_special` special tokens have no text. A token takes the same time whatever came before it.

    `stop` holds non-empty strings. As in vLLM the one that is complete first wins, the first in `stop` where several
    are complete at the same character, however the text falls into tokens; so `"ab"` is met before `"abc"`. `text`
    ends before it, or after it with `include_stop`, where nothing need be held back. One that special tokens make up is
    also met where they come and have no text.
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
        """vocabulary: the tokenizer's, where it is there already."""
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
        kind: type[_Stream] = _Bytes if self._vocabulary.byte_level else _Window
        self._stream = kind(self._vocabulary, skip_special)
        # Step by step: a stream begun with tokens whose text ends in half a character gives all of it out.
        for token in self._stream.context(prompt):
            self._decode(token)

    def push(self, token: int, may_stop: bool = True) -> str | None:
        """Append what `token` makes certain; the stop string that is now met, else None.

        As under vLLM's `min_tokens`, a stop string counts if its last character comes with `may_stop`; it may begin
        earlier. Nothing is pushed after a stop string or `finish`. Raises what the tokenizer raises.
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
        """The sequence ended: what is held for a stop string is safe now."""
        self.safe_length = len(self.text)

    def fork(self) -> "Detokenizer":
        """An independent copy that goes on from here, half characters included. Costs the same at any length."""
        twin = copy(self)
        if self._vocabulary is not None:
            twin._stream, twin._last = self._stream.fork(), self._last.copy()
        return twin

    # -- inside -------------------------------------------------------------------------------------------

    def _decode(self, token: int) -> str:
        """The characters that `token` makes certain; none where it has no text."""
        assert self._vocabulary is not None
        if token in self._skipped or not self._vocabulary.knows(token):
            return ""
        return self._stream.push(token)

    def _stopped_at(self, token: int) -> str | None:
        """The stop string of special tokens that `token` completes."""
        self._last.append(token)
        last = tuple(self._last)
        return next((each for tokens, each in self._stop_tokens.items() if last[-len(tokens) :] == tokens), None)

    def _cut(self, searched: int) -> str | None:
        """Cut `text` at the first stop string that ends after its first `searched` characters."""
        places = [(self.text.find(stop, max(0, searched + 1 - len(stop))), stop) for stop in self._stop]
        met = [(place + len(stop), stop) for place, stop in places if place >= 0]
        if not met:
            return None
        end, stop = min(met, key=itemgetter(0))
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return stop


class _Stream(Protocol):
    """Text from tokens that have one."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None: ...

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """The prompt's last tokens, in whose light the first of the answer are read."""

    def push(self, token: int) -> str:
        """What it adds, once that is certain."""

    def fork(self) -> Self:
        """An independent copy."""


class _Bytes:
    """For tokenizers whose tokens are bytes: these are read as UTF-8."""

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
    """For all others: the last tokens are decoded anew with each further one. The tokens of the last piece of text that
    was certain are the context in which those that are held are read.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._tokenizer = vocabulary.tokenizer
        if vocabulary.fast:
            self._tokenizer = vocabulary.tokenizer.backend_tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        self._before = ""
        """The context's text"""
        self._held: list[int] = []
        self._given = 0
        """Characters of the held tokens' text that are out"""

    def context(self, prompt: Sequence[int]) -> Sequence[int]:
        """From the beginning of a character on, if the prompt ends with a whole one."""
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
        """How many characters of the held tokens' text do not change any more."""
        whole = len(text.rstrip(_HALF))
        if whole == len(text) or len(self._held) <= _UNFINISHED:
            return whole
        known = self._text(self._held[:-_UNFINISHED])
        return max(whole, len(known)) if text.startswith(known) else whole

    def _shorten(self) -> None:
        """Hold no more than may be the beginning of a character."""
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
        # Bytes that make no character change how those before them decode. What is out stays.
        self._keep([])
        return self._read(held)

    def _keep(self, context: list[int]) -> None:
        self._context, self._before = context, self._read(context)

    def _read(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special))


def _opening(text: str, stop: str, start: int) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`, not all of it, and lies in
    `text[start:]`; `len(text)` if there is none.
    """
    place = text.find(stop[0], max(start, len(text) - len(stop) + 1))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return place if place >= 0 else len(text)
