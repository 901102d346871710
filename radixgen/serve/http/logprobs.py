"""The engine's log-probabilities in OpenAI's two shapes."""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from radixgen.core import CompletionOutput
from radixgen.serve.http.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOWEST = -9999.0
"""JSON has no infinity; OpenAI says this."""
_KEPT = 1 << 16


class TokenTexts:
    """Text of single tokens, the special ones too. Half a character is U+FFFD, and has no bytes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(_KEPT)(self._text)

    def bytes(self, token: int) -> list[int] | None:
        text = self.text(token)
        return None if "\ufffd" in text else list(text.encode("utf-8", "replace"))

    def _text(self, token: int) -> str:
        return str(token) if self._tokenizer is None else str(self._tokenizer.decode([token]))


def chat_logprobs(output: CompletionOutput, count: int, texts: TokenTexts) -> ChatLogprobs:
    """Of the tokens of `output`, each with the `count` likeliest."""
    content = []
    for found in output.logprobs or []:
        own = next(iter(found))
        top = [TopLogprob(texts.text(t), _finite(found[t]), texts.bytes(t)) for t in likeliest(found, count)]
        content.append(TokenLogprob(texts.text(own), _finite(found[own]), texts.bytes(own), top))
    return ChatLogprobs(content)


def completion_logprobs(output: CompletionOutput, count: int, texts: TokenTexts, offset: int) -> CompletionLogprobs:
    """The same of a completion whose first `offset` characters were told before."""
    told = CompletionLogprobs([], [], [], [])
    for found in output.logprobs or []:
        own = next(iter(found))
        text = texts.text(own)
        told.tokens.append(text)
        told.token_logprobs.append(_finite(found[own]))
        # Several tokens may have one text: the likeliest stands for it, so it is written last.
        top = {texts.text(t): _finite(found[t]) for t in reversed(likeliest(found, count))}
        told.top_logprobs.append(dict(reversed(top.items())) if count else None)
        told.text_offset.append(offset)
        offset += len(text)
    return told


def likeliest(found: Mapping[int, float], count: int) -> list[int]:
    """The `count` likeliest tokens, likeliest first."""
    return sorted(found, key=lambda token: -found[token])[:count]


def _finite(value: float) -> float:
    return max(value, _LOWEST)
