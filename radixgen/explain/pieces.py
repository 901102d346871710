"""Prompts as sequences of pieces: lines, each of which is stored, tokenized and compared once."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import TokenArray, as_tokens, common_prefix_len

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = NDArray[np.int32]
"""A prompt as ids of its pieces, `[pieces]`, int32"""

BLANK = "\ufffc"
"""Placeholder for the content of a message"""
_LONG_PIECE = 160
"""Maximum length of a line of prose, in characters; longer ones are cut into sentences"""
_SAMPLES = 32
_PROBE = "".join(
    left + gap + right
    for left, gap, right in product(
        ("word", "end.", "7", ")", "é"), (" ", "\n", "\n\n", " \n", "\n  ", "\n\t", "  "), ("word", "7", "-", "(", "é")
    )
)
"""Text with every kind of place where prompts may be cut"""
_WORD = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])(?= \S)")


class PromptText(NamedTuple):
    """Prompt as text. `special`: whether the tokenizer adds special tokens, as it does except for chats."""

    text: str
    special: bool = True


LoggedPrompt = PromptText | Sequence[int]


class Pieces:
    """Table of distinct pieces, each with text and tokens, and methods that cut prompts into them.

    If the tokenizer never joins text across line breaks (or spaces), each distinct line (or word) is tokenized once.
    That is checked on a text with every kind of break and on samples of the prompts. If a token differs, prompts are
    tokenized as a whole, and their tokens are cut after line breaks.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.texts: list[str] = []
        self.tokens: list[TokenArray] = []
        self.template: set[int] = set()
        """Pieces that a chat template writes around contents"""
        self._tokenizer = tokenizer
        self._ids: dict[str | bytes, int] = {}
        self._words: dict[str, list[int]] = {}
        self._breaks: dict[int, bool] = {}
        self._sentences: dict[str, list[str]] = {}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each piece, `[pieces]`."""
        return np.fromiter((tokens.size for tokens in self.tokens), np.int64, len(self.tokens))

    def rows(self, prompts: Sequence[LoggedPrompt]) -> list[Row]:
        """Cut prompts into pieces."""
        rows: dict[int, Row] = {}
        for special in (False, True):
            texts = {
                n: prompt.text
                for n, prompt in enumerate(prompts)
                if isinstance(prompt, PromptText) and prompt.special == special
            }
            rows |= zip(texts, self._rows_of_texts(list(texts.values()), special), strict=True)
        rows |= {
            n: self._cut_ids(as_tokens(prompt))
            for n, prompt in enumerate(prompts)
            if not isinstance(prompt, PromptText)
        }
        return [rows[n] for n in range(len(prompts))]

    def add_templates(self, rows: Iterable[Row]) -> None:
        """Register the pieces of these prompts, except those with `BLANK`, as written by the chat template."""
        self.template.update(piece for row in rows for piece in row.tolist() if BLANK not in self.texts[piece])

    def tail(self, row: Row) -> int:
        """Number of pieces at the end of a prompt that the template writes."""
        return next((n for n, piece in enumerate(row[::-1].tolist()) if piece not in self.template), row.size)

    def add(self, texts: Iterable[str]) -> list[int]:
        """Add texts as pieces. Returns their ids."""
        wanted = list(texts)
        new = [text for text in dict.fromkeys(wanted) if text not in self._ids]
        for text, tokens in zip(new, self._encode(new), strict=True):
            self._intern(text, text, tokens)
        return [self._ids[text] for text in wanted]

    def tokens_of(self, row: Sequence[int] | Row) -> TokenArray:
        """Tokens of a sequence of pieces."""
        return np.concatenate([self.tokens[piece] for piece in row]) if len(row) else np.empty(0, np.int32)

    def text_of(self, row: Sequence[int] | Row) -> str:
        """Text of a sequence of pieces."""
        return "".join([self.texts[piece] for piece in row])

    # -- inside -------------------------------------------------------------------------------------------

    def _rows_of_texts(self, texts: list[str], special: bool) -> list[Row]:
        step = max(1, len(texts) // _SAMPLES)
        samples = [_PROBE, *texts[::step][:_SAMPLES]]
        whole = self._encode(samples, special)
        for cut, by_words in ((_before_breaks, True), (_after_breaks, False)):
            around = self._around(samples, whole, cut, by_words)
            if around is not None:
                return self._cut_texts(texts, cut, by_words, around)
        return [self._cut_ids(tokens) for tokens in self._encode(texts, special)]

    def _around(
        self, samples: list[str], whole: list[TokenArray], cut: Callable[[str], list[str]], by_words: bool
    ) -> tuple[TokenArray, TokenArray] | None:
        """Special tokens before and after every prompt; None if tokenizing a sample by pieces gives other tokens."""
        pairs: set[tuple[bytes, bytes]] = set()
        for text, tokens in zip(samples, whole, strict=True):
            pieces = self._cut(text, cut)
            encoded = self._encode_words(pieces) if by_words else self._encode(pieces)
            inner = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
            heads = range(tokens.size - inner.size + 1)
            head = next((n for n in heads if np.array_equal(tokens[n : n + inner.size], inner)), None)
            if head is None:
                return None
            pairs.add((tokens[:head].tobytes(), tokens[head + inner.size :].tobytes()))
        if len(pairs) > 1:
            return None
        before, after = pairs.pop()
        return np.frombuffer(before, np.int32), np.frombuffer(after, np.int32)

    def _cut_texts(
        self,
        texts: list[str],
        cut: Callable[[str], list[str]],
        by_words: bool,
        around: tuple[TokenArray, TokenArray],
    ) -> list[Row]:
        before, after = ([self._intern(tokens.tobytes(), "", tokens)] if tokens.size else [] for tokens in around)
        pieces = [self._cut(text, cut) for text in texts]
        new = [text for text in dict.fromkeys(chain.from_iterable(pieces)) if text not in self._ids]
        for text, tokens in zip(new, self._encode_words(new) if by_words else self._encode(new), strict=True):
            self._intern(text, text, tokens)
        ids = self._ids
        return [np.array([*before, *(ids[text] for text in parts), *after], np.int32) for parts in pieces]

    def _cut(self, text: str, cut: Callable[[str], list[str]]) -> list[str]:
        """Cut a text into lines, and long lines of prose into sentences, each with the space before it."""
        lines = cut(text)
        if max(map(len, lines), default=0) <= _LONG_PIECE:
            return lines
        known = self._sentences
        pieces: list[str] = []
        for line in lines:
            if len(line) > _LONG_PIECE and line not in known:
                prose = not line.lstrip().startswith(("{", "[", '"'))
                known[line] = _SENTENCE_END.split(line) if prose else [line]
            pieces += known[line] if len(line) > _LONG_PIECE else [line]
        return pieces

    def _cut_ids(self, tokens: TokenArray) -> Row:
        """Cut tokens after each one whose text contains a line break."""
        for token in set(tokens.tolist()) - self._breaks.keys():
            self._breaks[token] = "\n" in str(self._tokenizer.decode([token]))
        ends = np.flatnonzero([self._breaks[token] for token in tokens.tolist()]) + 1
        return np.array([self._piece_of(part) for part in np.split(tokens, ends) if part.size], np.int32)

    def _piece_of(self, tokens: TokenArray) -> int:
        key = tokens.tobytes()
        if key not in self._ids:
            self._intern(key, str(self._tokenizer.decode(tokens.tolist())), tokens)
        return self._ids[key]

    def _intern(self, key: str | bytes, text: str, tokens: TokenArray) -> int:
        self._ids[key] = len(self.texts)
        self.texts.append(text)
        self.tokens.append(tokens)
        return self._ids[key]

    def _encode_words(self, texts: list[str]) -> list[TokenArray]:
        words = [_WORD.findall(text) for text in texts]
        new = [word for word in dict.fromkeys(chain.from_iterable(words)) if word not in self._words]
        self._words.update(zip(new, (tokens.tolist() for tokens in self._encode(new)), strict=True))
        known = self._words.__getitem__
        return [np.array(list(chain.from_iterable(map(known, parts))), np.int32) for parts in words]

    def _encode(self, texts: list[str], special: bool = False) -> list[TokenArray]:
        if not texts:
            return []
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return [np.array(ids, np.int32) for ids in self._tokenizer(texts, **options)["input_ids"]]


def distinct_tokens(rows: Iterable[TokenArray]) -> int:
    """Number of tokens in the radix tree of these prompts, by the common prefixes of sorted neighbours."""
    ordered = sorted(row.astype(">i4").tobytes() for row in rows)
    arrays = [np.frombuffer(row, ">i4") for row in ordered]
    shared = sum(common_prefix_len(first, second) for first, second in zip(arrays, arrays[1:], strict=False))
    return sum(array.size for array in arrays) - shared


def _before_breaks(text: str) -> list[str]:
    """Lines, each with the line breaks before it; cuts are only between a visible character and white space."""
    lines = text.split("\n")
    visible = all(lines) and list(map(str.rstrip, lines)) == lines
    lines[1:] = [f"\n{line}" for line in lines[1:]]
    if visible:
        return lines
    pieces: list[str] = []
    for piece in lines:
        if pieces and (not pieces[-1] or pieces[-1][-1].isspace()):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _after_breaks(text: str) -> list[str]:
    """Lines, each with the line breaks after it."""
    pieces: list[str] = []
    for piece in filter(None, f"{text}\n".replace("\n", "\n\0")[:-2].split("\0")):
        if pieces and piece.isspace():
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces
