"""The engine's log-probabilities in OpenAI's two shapes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from radixgen.core import CompletionOutput
from radixgen.serve.http.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from radixgen.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0
"""JSON has no infinity; OpenAI says this."""
_KEPT = 1 << 16


class TokenTexts:
    """Text of single tokens, the special ones too, where half a character is U+FFFD; and their bytes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self._tokenizer = tokenizer
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self.text = lru_cache(_KEPT)(self._text)

    def bytes(self, token: int, *, special: bool = False) -> list[int] | None:
        """What the token adds to a text in UTF-8, one that shows special tokens where `special`; None without a
        tokenizer.
        """
        if self._vocabulary is None:
            return None
        return [] if not special and token in self._vocabulary.special else list(self._vocabulary.bytes_of(token))

    def _text(self, token: int) -> str:
        return str(token) if self._tokenizer is None else str(self._tokenizer.decode([token]))


def chat_logprobs(output: CompletionOutput, count: int, texts: TokenTexts, *, special: bool = False) -> ChatLogprobs:
    """Of the tokens of `output`, each with the `count` likeliest; `special`: its text shows special tokens."""
    content = []
    for found in output.logprobs or []:
        own = next(iter(found))
        told = {t: (texts.text(t), _finite(found[t]), texts.bytes(t, special=special)) for t in found}
        top = [TopLogprob(*told[token]) for token in likeliest(found, count)]
        content.append(TokenLogprob(*told[own], top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[Mapping[int, float] | None],
    texts: TokenTexts,
    offset: int,
) -> CompletionLogprobs:
    """Of tokens, each with those that were told beside it, or None where it had no probability. `text_offset` counts
    the characters of the tokens' own texts, from `offset` on.
    """
    told = CompletionLogprobs()
    for token, found in zip(tokens, logprobs, strict=True):
        text = texts.text(token)
        told.tokens.append(text)
        told.token_logprobs.append(None if found is None else _finite(found[token]))
        told.top_logprobs.append(None if found is None else _top(found, texts))
        told.text_offset.append(offset)
        offset += len(text)
    return told


def join(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """Those of one text after those of another, added to `first` where there is one. `second` is left as it is."""
    if second is None:
        return first
    first = first or CompletionLogprobs()
    for name in first.__struct_fields__:
        getattr(first, name).extend(getattr(second, name))
    return first


def end_of(told: CompletionLogprobs) -> int:
    """The offset behind the last token."""
    return told.text_offset[-1] + len(told.tokens[-1]) if told.tokens else 0


def _top(found: Mapping[int, float], texts: TokenTexts) -> dict[str, float]:
    """The likeliest, and the token's own. Several tokens may have one text: the likeliest stands for it, so it is
    written last.
    """
    top = {texts.text(token): _finite(found[token]) for token in reversed(likeliest(found, len(found)))}
    return dict(reversed(top.items()))


def likeliest(found: Mapping[int, float], count: int) -> list[int]:
    """The `count` likeliest tokens, likeliest first."""
    return sorted(found, key=lambda token: -found[token])[:count]


def _finite(value: float) -> float:
    return max(value, _LOWEST)
