"""`InputProcessor`: tokenizes prompts, and checks prompts and parameters."""

import logging
import struct
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from radixgen.cache import PRIVATE, TokenArray
from radixgen.core import (
    BeamSearchParams,
    CacheHint,
    Grammar,
    HintAction,
    InvalidRequest,
    Limits,
    PromptTooLong,
    SamplingParams,
    check_integer,
    check_text,
    check_texts,
)
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model.end_tokens import chat_end_tokens
from radixgen.sampling.structured import Grammars
from radixgen.text.messages import Roles, template_messages
from radixgen.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Seq[int] | TokenArray
Messages = Seq[Mapping[str, Any]]
Tools = Seq[Mapping[str, Any]] | None
Params = SamplingParams | BeamSearchParams
P = TypeVar("P", bound=Params)
_HINT_ACTIONS = get_args(HintAction)
Warn = Callable[[str], None]

logger = logging.getLogger(__name__)


class InputProcessor:
    """Tokenizes and checks requests against one engine's limits. Raises `InvalidRequest` and its subclasses."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        vocab_size: int,
        max_model_len: int,
        kv_tokens: int,
        limits: Limits,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.kv_tokens = kv_tokens
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self._warned_of_bos = False
        self._grammars = Grammars(tokenizer, vocab_size, limits)

    @cached_property
    def max_text_chars(self) -> int:
        """Maximum prompt length in characters: `max_prompt_chars`, or less if even the longest tokens could not fit
        more into the context. Text that the tokenizer drops counts too.
        """
        if self.tokenizer is None:
            return self.limits.max_prompt_chars
        longest = max(map(len, self.tokenizer.get_vocab()), default=1)
        return min(self.limits.max_prompt_chars, longest * self.max_model_len)

    @cached_property
    def chat_eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer in a chat: the end tokens of the model, the tokenizer and its chat template."""
        own = chat_end_tokens(self.tokenizer) if self.tokenizer is not None else frozenset()
        return self.eos_token_ids | {token for token in own if token < self.vocab_size}

    @cached_property
    def drawable(self) -> DrawableTokens | None:
        """Tokens the sampler may pick; None if there is no restriction."""
        if self.vocabulary is None:
            return None
        unknown = np.setdiff1d(self.vocabulary.unknown(self.vocab_size), list(self.eos_token_ids))
        return DrawableTokens(unknown, self.vocab_size) if 0 < unknown.size < self.vocab_size else None

    def for_chat(self, params: P) -> P:
        """Return `params` for a chat, so that the answer also ends at `chat_eos_token_ids`."""
        if not isinstance(params, Params):
            raise InvalidRequest("params", params, "must be SamplingParams or BeamSearchParams")
        more = sorted(self.chat_eos_token_ids - self.eos_token_ids)
        return replace(params, end_token_ids=(*params.end_token_ids, *more)) if more else params

    def tokenize(
        self, prompt: Prompt, field: str = "prompt", *, special: bool = True, warn: Warn | None = None
    ) -> TokenArray:
        """Return `prompt` as token ids, int32. With `special`, text gets the tokenizer's special tokens. If two BOS
        tokens are at the start, log it once, and call `warn` each time.
        """
        tokens = self._tokenize(prompt, field, special)
        if tokens.size > 1 and tokens[0] == tokens[1]:
            self._check_bos(int(tokens[0]), field, warn)
        return tokens

    def _tokenize(self, prompt: Prompt, field: str, special: bool) -> TokenArray:
        if not isinstance(prompt, str):
            self._measure(prompt, field)
            return _token_ids(prompt, self.vocab_size, field)
        check_text(field, prompt)
        if self.tokenizer is None:
            raise InvalidRequest(field, prompt, "the model has no tokenizer: give token ids")
        self.check_text(prompt, field)
        return _token_ids(self.tokenizer(prompt, add_special_tokens=special)["input_ids"], self.vocab_size, field)

    def check_text(self, text: str, field: str) -> None:
        """Check that text of this length could fit into the context, before it is tokenized."""
        most = self.max_text_chars
        if len(text) > most:
            why = f": the context holds {self.max_model_len} tokens" if most < self.limits.max_prompt_chars else ""
            raise PromptTooLong(f"len({field})", len(text), f"at most {most} characters{why}")

    def tokenize_continuation(self, text: Prompt) -> TokenArray:
        """Tokenize text that follows a prompt, without special tokens."""
        return self.tokenize(text, "continuations", special=False)

    def decode(self, token_ids: Seq[int]) -> str:
        """Return the text of `token_ids`, including special tokens, or the ids as text if there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        return str(self.tokenizer.decode(token_ids))

    def check_params(self, params: Params, *, compiles: bool = True) -> None:
        """Check parameters independently of a prompt. With `compiles`, also compile their grammar."""
        if not isinstance(params, Params):
            raise InvalidRequest("params", params, "must be SamplingParams or BeamSearchParams")
        params.validate(self.limits, self.vocab_size)
        field, count = ("beam_width", params.beam_width) if isinstance(params, BeamSearchParams) else ("n", params.n)
        if count > self.limits.max_num_seqs:
            raise InvalidRequest(field, count, f"at most {self.limits.max_num_seqs} sequences run at a time")
        if isinstance(params, SamplingParams) and params.stop_strings and self.tokenizer is None:
            raise InvalidRequest("stop", params.stop, "the model has no tokenizer: use stop_token_ids")
        if compiles:
            self.grammar(params)

    def check(self, prompt: TokenArray, params: Params, *, compiles: bool = True) -> None:
        """Check that the request could run alone in this engine. With `compiles`, also compile its grammar."""
        self.check_params(params, compiles=compiles)
        if prompt.size == 0:
            raise InvalidRequest("prompt", [], "must hold at least one token")
        if prompt.size >= self.max_model_len:
            limit = f"the context holds {self.max_model_len} tokens, one of them generated"
            raise PromptTooLong("len(prompt)", prompt.size, limit)
        self._check_slots("len(prompt) + max_tokens", prompt.size + params.max_tokens)
        self.check_logprobs([prompt], params)

    def check_logprobs(self, prompts: Seq[TokenArray], params: Params, *, echoes: int = 1) -> None:
        """Check that one request does not need too many log-probabilities, over all its prompts.

        The log-probabilities of each prompt are returned `echoes` times.
        """
        if isinstance(params, BeamSearchParams):
            return
        length = echoes * sum(prompt.size for prompt in prompts)
        answers = params.n * sum(min(params.max_tokens, self.max_model_len - prompt.size) for prompt in prompts)
        most = self.limits.max_logprob_values
        for field, tokens, beside in (
            ("n × max_tokens × logprobs", answers, params.logprobs),
            (f"{'n × ' * (echoes > 1)}len(prompt) × prompt_logprobs", length, params.prompt_logprobs),
        ):
            if beside is not None and tokens * (1 + beside) > most:
                limit = f"at most {most} log-probabilities, those of the tokens themselves included"
                raise InvalidRequest(field, tokens * (1 + beside), limit)

    def grammar(self, params: Params) -> Grammar | None:
        """Return the grammar of checked `params`, compiling it if needed. May be called from any thread."""
        return self._grammars.find(params) if isinstance(params, SamplingParams) else None

    def check_score(self, prompt: TokenArray, continuation: TokenArray) -> None:
        """Check that `continuation` can be scored after `prompt`. Raises `InvalidRequest`."""
        for field, tokens in (("prompt", prompt), ("continuations", continuation)):
            if tokens.size == 0:
                raise InvalidRequest(field, [], "must hold at least one token")
        length = prompt.size + continuation.size
        if length > self.max_model_len:
            limit = f"the context holds {self.max_model_len} tokens"
            raise PromptTooLong("len(prompt) + len(continuation)", length, limit)
        self._check_slots("len(prompt) + len(continuation)", length)

    def check_name(self, field: str, text: object) -> None:
        """Check a request id or a namespace. A NUL is reserved for the private namespaces of unshared sequences."""
        limit = self.limits.max_request_id_len
        if not isinstance(text, str) or len(text) > limit or PRIVATE in text:
            raise InvalidRequest(field, text, f"must be text of at most {limit} characters, none of them NUL")
        check_text(field, text)

    def check_place(self, namespace: object, priority: object = 0) -> None:
        """Check the options that requests and pins have in common."""
        self.check_name("namespace", namespace)
        check_integer("priority", priority, -(2**31), 2**31 - 1)

    def check_hints(self, hints: object, owner: object = None) -> tuple[CacheHint, ...]:
        """Return the cache hints of a request, or raise `InvalidRequest` if one is malformed."""
        most = self.limits.max_cache_hints
        if not isinstance(hints, Seq) or not all(isinstance(hint, CacheHint) for hint in hints):
            raise InvalidRequest("cache_hints", hints, "must be a list of CacheHint")
        if len(hints) > most:
            raise InvalidRequest("len(cache_hints)", len(hints), f"must be at most {most}")
        for index, hint in enumerate(hints):
            field = f"cache_hints[{index}]"
            if hint.action not in _HINT_ACTIONS:
                raise InvalidRequest(f"{field}.action", hint.action, f"must be one of {', '.join(_HINT_ACTIONS)}")
            if hint.num_tokens is not None:
                check_integer(f"{field}.num_tokens", hint.num_tokens, 0, 2**31 - 1)
            self.check_seconds(f"{field}.ttl", hint.ttl)
            check_integer(f"{field}.priority", hint.priority, -(2**31), 2**31 - 1)
        if owner is not None:
            self.check_name("hint_owner", owner)
        return tuple(hints)

    def check_seconds(self, field: str, seconds: object) -> float:
        """Validate a positive duration in seconds. None means infinity."""
        if seconds is None:
            return float("inf")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= sys.float_info.max:
            raise InvalidRequest(field, seconds, "must be a finite number of seconds above 0")
        return float(seconds)

    def _check_bos(self, first: int, field: str, warn: Warn | None) -> None:
        """Warn if `first`, the first two tokens of a prompt, is the BOS token."""
        if first != getattr(self.tokenizer, "bos_token_id", None):
            return
        token = getattr(self.tokenizer, "bos_token", first)
        text = f"{field} begins with {token} twice: leave it out of the text, or ask for no special tokens"
        if warn is not None:
            warn(text)
        if not self._warned_of_bos:
            self._warned_of_bos = True
            logger.warning("%s; further prompts like it are not mentioned", text)

    def _measure(self, prompt: object, field: str) -> None:
        """Check the length of a prompt of token ids before any token is read."""
        if isinstance(prompt, Seq) and len(prompt) > self.max_model_len:
            raise PromptTooLong(f"len({field})", len(prompt), f"the context holds {self.max_model_len} tokens")

    def _check_slots(self, field: str, tokens: int) -> None:
        """Check that the pool has enough slots for a sequence; its last token needs none."""
        needed = min(tokens, self.max_model_len) - 1
        if needed > self.kv_tokens:
            raise PromptTooLong(field, tokens, f"needs {needed} of the pool's {self.kv_tokens} slots")


def chat_tokens(tokenizer: "PreTrainedTokenizerBase | None", messages: Messages, tools: Tools = None) -> list[int]:
    """Return the conversation as token ids, up to where the model's answer begins. Raises `InvalidRequest`."""
    check_texts("tools", tools)
    ids: list[int] = through_template(tokenizer, _prepared(tokenizer, messages), tools=tools, tokenize=True)
    return ids


def chat_text(tokenizer: "PreTrainedTokenizerBase | None", messages: Messages, tools: Tools = None) -> str:
    """Return the conversation as text, as `chat_tokens` does as token ids. Raises `InvalidRequest`."""
    check_texts("tools", tools)
    return str(through_template(tokenizer, _prepared(tokenizer, messages), tools=tools, tokenize=False))


def _prepared(tokenizer: "PreTrainedTokenizerBase | None", messages: Messages) -> Messages:
    return template_messages(messages, Roles(getattr(tokenizer, "chat_template", None)))


def through_template(tokenizer: "PreTrainedTokenizerBase | None", messages: Messages, /, **options: Any) -> Any:
    """Render a conversation with the tokenizer's chat template. Raises `InvalidRequest`."""
    if tokenizer is None or not tokenizer.chat_template:
        raise InvalidRequest("messages", "…", "the model has no chat template")
    options = {"return_dict": False, "add_generation_prompt": True} | options
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # whatever a template computes with what callers give it
        reason = str(error) if isinstance(error, TemplateError) else repr(error)
        raise InvalidRequest("messages", messages, f"the chat template refuses them: {reason[:1_000]}") from error


def as_prompts(prompts: Prompt | Seq[Prompt], field: str = "prompts") -> list[Prompt]:
    """Return a list of prompts, given text, token ids, or a list of either. Raises `InvalidRequest`."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Seq | np.ndarray) or (isinstance(prompts, np.ndarray) and not prompts.ndim):
        raise InvalidRequest(field, prompts, "must be text, token ids, or a list of either")
    if len(prompts) and isinstance(prompts[0], int | np.integer):
        return [prompts]  # type: ignore[list-item]
    for prompt in prompts:
        if not isinstance(prompt, str | Seq | np.ndarray):
            raise InvalidRequest(field, prompt, "must be text or token ids")
    return list(prompts)


def as_params(params: Params | Seq[Params] | None, count: int) -> list[Params]:
    """Return parameters for each of `count` prompts. Raises `InvalidRequest`."""
    if params is None or isinstance(params, Params):
        return [params or SamplingParams()] * count
    if not isinstance(params, Seq):
        raise InvalidRequest("params", params, "must be SamplingParams or BeamSearchParams, or a list of them")
    if len(params) != count:
        raise InvalidRequest("len(params)", len(params), f"must be {count}, as many as prompts")
    return list(params)


def _token_ids(prompt: Seq[int] | TokenArray, vocab_size: int, field: str) -> TokenArray:
    """Return a prompt as checked int32 token ids. A tokenizer may have tokens that the model lacks."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
        ids = prompt
    elif not isinstance(prompt, Seq) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InvalidRequest(field, prompt, "must be text or a flat sequence of token ids")
    else:
        ids = _integers(prompt, field)
    if ids.size and not _all_below(ids, vocab_size):
        place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise InvalidRequest(f"{field}[{place}]", int(ids[place]), f"must be from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def _integers(prompt: Seq[int], field: str) -> NDArray[Any]:
    """Return a prompt as an array: int32, or objects if a value does not fit or is not a plain integer."""
    plain = _plain_integers(prompt)
    if plain is not None:
        return plain
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InvalidRequest(f"{field}[{place}]", token, "must be an integer token id")
    return np.array(prompt, object)


def _plain_integers(prompt: Seq[int]) -> NDArray[np.int32] | None:
    """Return the prompt as int32, or None if not all items are integers that fit.

    This takes two loops in C and is far faster than `np.array`. If the sum is an integer, every item is an integer or
    a boolean. Booleans equal 0 or 1, so only items with these values are checked one by one.
    """
    try:
        with np.errstate(over="ignore"):
            if type(sum(prompt)) is not int:
                return None
        ids = np.frombuffer(struct.pack(f"={len(prompt)}i", *prompt), np.int32)
    except (TypeError, ValueError, struct.error):
        return None
    doubtful = np.flatnonzero(ids.view(np.uint32) < 2).tolist()
    return None if any(isinstance(prompt[place], bool) for place in doubtful) else ids


def _all_below(ids: NDArray[Any], bound: int) -> bool:
    """Whether all ids are at least 0 and below `bound`. One pass for int32: as uint32, negative ids are too large."""
    if ids.dtype == np.int32:
        return bool(ids.view(np.uint32).max() < bound)
    return bool(ids.min() >= 0 and ids.max() < bound)
