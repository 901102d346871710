"""Log-probabilities in OpenAI's two formats: of chats and of completions."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from radixgen.core import CompletionOutput
from radixgen.serve.http.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from radixgen.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0
"""OpenAI's value for negative infinity, which JSON does not have"""
_CACHE_SIZE = 1 << 16


class TokenTexts:
    """Text and bytes of single tokens, including special ones. Text of incomplete characters is U+FFFD."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self._tokenizer = tokenizer
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.text = lru_cache(_CACHE_SIZE)(self._text)

    def bytes(self, token: int, *, special: bool = False) -> list[int] | None:
        """UTF-8 bytes that a token adds to a text; None without a tokenizer. `special`: whether special tokens show."""
        if self._vocabulary is None:
            return None
        return [] if not special and token in self._vocabulary.special else list(self._vocabulary.bytes_of(token))

    def _text(self, token: int) -> str:
        return str(token) if self._tokenizer is None else str(self._tokenizer.decode([token]))


def chat_logprobs(output: CompletionOutput, count: int, texts: TokenTexts, *, special: bool = False) -> ChatLogprobs:
    """Log-probabilities of an output's tokens, each with the `count` likeliest at its position.

    special: whether the text of the output shows special tokens.
    """
    content = []
    for position in output.logprobs or []:
        own = next(iter(position))
        entries = {t: (texts.text(t), _finite(position[t]), texts.bytes(t, special=special)) for t in position}
        top = [TopLogprob(*entries[token]) for token in likeliest(position, count)]
        content.append(TokenLogprob(*entries[own], top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[Mapping[int, float] | None],
    texts: TokenTexts,
    offset: int,
) -> CompletionLogprobs:
    """Log-probabilities of tokens, with the likeliest at each position; None for tokens without a probability.

    offset: text offset of the first token, in characters.
    """
    result = CompletionLogprobs()
    for token, position in zip(tokens, logprobs, strict=True):
        text = texts.text(token)
        result.tokens.append(text)
        result.token_logprobs.append(None if position is None else _finite(position[token]))
        result.top_logprobs.append(None if position is None else _top(position, texts))
        result.text_offset.append(offset)
        offset += len(text)
    return result


def join(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """Append the log-probabilities of one text to those of another. Modifies and returns `first`, if not None."""
    if second is None:
        return first
    first = first or CompletionLogprobs()
    for name in first.__struct_fields__:
        getattr(first, name).extend(getattr(second, name))
    return first


def end_of(logprobs: CompletionLogprobs) -> int:
    """Text offset after the last token."""
    return logprobs.text_offset[-1] + len(logprobs.tokens[-1]) if logprobs.tokens else 0


def _top(position: Mapping[int, float], texts: TokenTexts) -> dict[str, float]:
    """Log-probability of each text, in descending order; of tokens with the same text, the likeliest counts."""
    top = {texts.text(token): _finite(position[token]) for token in reversed(likeliest(position, len(position)))}
    return dict(reversed(top.items()))


def likeliest(position: Mapping[int, float], count: int) -> list[int]:
    """The `count` likeliest tokens of a position, in descending order."""
    return sorted(position, key=lambda token: -position[token])[:count]


def _finite(value: float) -> float:
    return max(value, _LOWEST)
