"""Sampling parameters of requests. Names and defaults follow vLLM's `SamplingParams`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from radixgen.core.errors import InvalidRequest, check_boolean, check_integer
from radixgen.core.grammar import (
    GrammarSource,
    GrammarState,
    choice_source,
    format_source,
    schema_source,
    single_source,
    text_source,
)
from radixgen.core.limits import Limits
from radixgen.core.reading import ReadingPolicy, check_reading
from radixgen.core.texts import check_text


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Logits are transformed in this order: `logit_bias` (a map from token id to an added value), `repetition_penalty`
    (prompt and output tokens), `presence_penalty` and `frequency_penalty` (output tokens), `min_tokens` (no end token
    before that many tokens), `temperature` (0 is greedy), `top_k` (0 or -1: off), `top_p` (1: off) and `min_p` (0:
    off), as in transformers.

    A sequence ends at a string of `stop`, which is cut from its text unless `include_stop_str_in_output`; at a token of
    `stop_token_ids`; and, unless `ignore_eos`, at an end token: the model's own, or one of `end_token_ids` (chats add
    the tokenizer's end token and the chat template's end of a turn). Special tokens have no text unless
    `skip_special_tokens=False`, but a stop string that names one matches it. Tokens unknown to the tokenizer are not
    sampled unless they are end tokens.

    `logprobs=k` reports the natural-log probabilities of the sampled token and of the `k` most likely ones, in the
    model's own distribution, before any of the transformations above. `prompt_logprobs=k` does the same for the prompt.
    `seed` makes sampling reproducible; by default it is derived from the engine's seed and the order of submission.

    At most one of these constrains the output to a grammar: `json_schema` (an object or its text), `regex`, `grammar`
    (Lark), `choice` (a list of texts), or OpenAI's `response_format`. Only tokens allowed by the grammar are sampled,
    and an end token only if the text is complete. A sequence ends with `stop` once its text is complete and cannot be
    extended, even before `min_tokens`. `max_tokens`, `stop` and `stop_token_ids` may still cut it short.

    `reading` is a policy of `radixgen.reading` by which the request reads its keys; by default the engine's, which is
    exact unless it was made with another.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    end_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 16
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    response_format: Mapping[str, Any] | None = None
    reading: ReadingPolicy | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def shaped(self) -> bool:
        """Whether anything but a grammar changes the logits before the temperature."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def structured(self) -> bool:
        """Whether the output is constrained by a grammar."""
        sources = (self.json_schema, self.regex, self.grammar, self.choice)
        return any(source is not None for source in sources) or (
            self.response_format is not None and self.response_format.get("type") != "text"
        )

    def validate(self, limits: Limits, vocab_size: int) -> None:
        """Raise `InvalidRequest` for the first field that is out of range."""
        check_integer("n", self.n, 1, limits.max_n)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        check_integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logit_bias is not None:
            _check_bias(self.logit_bias, limits, vocab_size)
        _check_stop(self.stop, limits)
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("end_token_ids", self.end_token_ids)):
            _sequence(name, tokens, limits.max_stop_token_ids)
            for token in tokens:
                check_integer(name, token, 0, 2**31 - 1)
        check_boolean("include_stop_str_in_output", self.include_stop_str_in_output)
        check_boolean("skip_special_tokens", self.skip_special_tokens)
        check_boolean("ignore_eos", self.ignore_eos)
        check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**64 - 1)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                check_integer(name, count, 0, limits.max_logprobs)
        if self.reading is not None:
            check_reading("reading", self.reading)
        self.grammar_source(limits)

    def grammar_source(self, limits: Limits) -> GrammarSource | None:
        """Return the source of the grammar, or None without a grammar. Raises `InvalidRequest`."""
        sources: list[GrammarSource] = []
        if self.json_schema is not None:
            sources.append(schema_source(self.json_schema, limits))
        if self.regex is not None:
            sources.append(text_source("regex", "regex", self.regex, limits))
        if self.grammar is not None:
            sources.append(text_source("grammar", "lark", self.grammar, limits))
        if self.choice is not None:
            sources.append(choice_source(self.choice, limits))
        if self.response_format is not None and (source := format_source(self.response_format, limits)):
            sources.append(source)
        return single_source(sources)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of one beam search, in place of `SamplingParams`. Names follow vLLM's and transformers'.

    The results are those of transformers' `generate(num_beams=beam_width, do_sample=False)` with the same
    `length_penalty` and `early_stopping`: `beam_width` hypotheses, best score first. The score is the cumulative
    natural-log probability divided by `len(token_ids) ** length_penalty`.

    Once there are `beam_width` hypotheses, the search ends: immediately with `early_stopping=True`; with False, when no
    beam that ended now would beat the worst hypothesis; with `"never"`, when no beam could beat it by `max_tokens`. A
    hypothesis ends at a token of `stop_token_ids` and, unless `ignore_eos`, at the model's end tokens and
    `end_token_ids`, but not before `min_tokens`.
    """

    beam_width: int
    max_tokens: int = 16
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: Sequence[int] = ()
    end_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    reading: ReadingPolicy | None = None

    @property
    def sampling(self) -> SamplingParams:
        """The equivalent parameters for greedy decoding."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            end_token_ids=self.end_token_ids,
            ignore_eos=self.ignore_eos,
            reading=self.reading,
        )

    def validate(self, limits: Limits, vocab_size: int) -> None:
        """Raise `InvalidRequest` for the first field that is out of range."""
        check_integer("beam_width", self.beam_width, 1, limits.max_n)
        _number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.early_stopping, bool | str) or self.early_stopping not in (True, False, "never"):
            raise InvalidRequest("early_stopping", self.early_stopping, "must be True, False or 'never'")
        self.sampling.validate(limits, vocab_size)


@dataclass(eq=False, slots=True)
class SamplingState:
    """Everything that sampling one sequence depends on, over its lifetime.

    The random number of a draw is a function of the seed, the index and the number of generated tokens.
    """

    params: SamplingParams
    seed: int
    """64 bits."""
    index: int
    """Index among the `n` sequences of the request."""
    prompt: NDArray[np.int32]
    output: list[int]
    """Tokens generated so far. The sampler's caller appends to it."""
    stop_ids: frozenset[int]
    """Tokens that end the sequence. They are suppressed before `min_tokens`."""
    grammar: GrammarState | None = None
    """Grammar state after the last token of `output`. The sampler's caller advances it."""
    counts: dict[int, int] = field(default_factory=dict)
    """Occurrences of each token in the output, as of the last `update`."""
    shaped: bool = field(init=False)
    """Whether anything changes the logits before the temperature."""
    plain: bool = field(init=False)
    """Whether sampling takes the most likely token of the unchanged logits."""
    _counted: int = 0
    _seen: NDArray[np.int64] | None = None
    """The prompt's distinct tokens in ascending order, then those that only the output has, then spare capacity."""
    _num_seen: int = 0
    _num_prompt: int = 0
    """Distinct tokens of the prompt."""
    _merged: int = 0
    """Entries of `counts` already merged into `_seen`."""

    def __post_init__(self) -> None:
        self.shaped = self.params.shaped or self.grammar is not None
        self.plain = self.params.greedy and not self.shaped

    def update(self) -> None:
        """Count the tokens generated since the last call."""
        for token in self.output[self._counted :]:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._counted = len(self.output)

    def seen(self) -> NDArray[np.int64]:
        """Return the distinct tokens of prompt and output as of the last `update`, unordered. Read-only."""
        if self._seen is None:
            self._seen = np.unique(self.prompt).astype(np.int64)
            self._num_seen = self._num_prompt = self._seen.size
        count = len(self.counts) - self._merged
        if count:
            self._merged += count
            self._see(self._seen, np.fromiter(islice(reversed(self.counts), count), np.int64, count))
        return self._seen[: self._num_seen]

    def _see(self, seen: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Add new output tokens that the prompt does not contain to `seen`."""
        prompt = seen[: self._num_prompt]
        new = tokens[np.searchsorted(prompt, tokens) == np.searchsorted(prompt, tokens, "right")]
        stop = self._num_seen + new.size
        if stop > seen.size:
            seen = self._seen = np.concatenate([seen[: self._num_seen], np.empty(stop, np.int64)])
        seen[self._num_seen : stop] = new
        self._num_seen = stop


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    span = f"from {low:g} to {high:g}" if not above else f"above {low:g}, at most {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, value, f"must be a number {span}")
    # An integer may be too large to be a float.
    if not low <= value <= high or not math.isfinite(value) or (above and value == low):
        raise InvalidRequest(name, value, f"must be finite, {span}")


def _sequence(name: str, value: Any, most: int) -> None:
    if not isinstance(value, tuple | list):
        raise InvalidRequest(name, value, "must be a tuple or a list")
    if len(value) > most:
        raise InvalidRequest(f"len({name})", len(value), f"must be at most {most}")


def _check_bias(bias: Any, limits: Limits, vocab_size: int) -> None:
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", bias, "must map token ids to numbers")
    if len(bias) > limits.max_logit_bias:
        raise InvalidRequest("len(logit_bias)", len(bias), f"must be at most {limits.max_logit_bias}")
    for token, value in bias.items():
        check_integer("logit_bias", token, 0, vocab_size - 1)
        _number(f"logit_bias[{token}]", value, -100.0, 100.0)


def _check_stop(stop: Any, limits: Limits) -> None:
    texts = [stop] if isinstance(stop, str) else stop
    _sequence("stop", texts, limits.max_stop)
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= limits.max_stop_len:
            raise InvalidRequest("stop", text, f"must be text of 1 to {limits.max_stop_len} characters")
        check_text("stop", text)
