"""Conversion between `SamplingParams` and the sampling parameters of vLLM's protocol."""

from collections.abc import Sequence
from typing import Any

from msgspec import Raw
from msgspec.structs import astuple

from radixgen.core import CacheHint, HintResult, InvalidRequest, Limits, SamplingParams, check_texts
from radixgen.core.adapters import ADAPTERS
from radixgen.core.grammar import format_source
from radixgen.core.reading import ReadingPolicy, check_reading, reading_from_json, reading_to_json
from radixgen.serve.zmq import wire

_UNSERVED = (
    "allowed_token_ids",
    "bad_words_token_ids",
    "logprob_token_ids",
    "thinking_token_budget",
    "repetition_detection",
)
_MAX_READING_BYTES = 1_024
_GRAMMARS = ("json_schema", "regex", "grammar", "choice", "response_format")


def check_served(request: wire.Add) -> None:
    """Raise `InvalidRequest` for the first field that is set but not supported."""
    if wire.given(request.lora_request):
        raise InvalidRequest("lora_request", "…", ADAPTERS)
    for name in ("mm_features", "pooling_params", "prompt_embeds", "prompt_is_token_ids"):
        if wire.given(getattr(request, name)):
            raise InvalidRequest(name, "…", "is not supported")
    if request.resumable:
        raise InvalidRequest("resumable", True, "is not supported")
    sampling = request.sampling_params
    if sampling is None or request.prompt_token_ids is None:
        raise InvalidRequest("request", request.request_id, "must have prompt_token_ids and sampling_params")
    for name in _UNSERVED:
        if wire.given(getattr(sampling, name)):
            raise InvalidRequest(name.removeprefix("_"), "…", "is not supported")


def to_params(sampling: wire.Sampling, room: int, limits: Limits) -> SamplingParams:
    """Convert the parameters of a request. Raises `InvalidRequest` for fields that are too large to decode.

    room: maximum number of output tokens.

    The engine checks all else. End tokens are only those that the front end sends.
    """
    ends = sampling.stop_token_ids or []
    if len(ends) > limits.max_stop_token_ids:
        raise InvalidRequest("len(stop_token_ids)", len(ends), f"must be at most {limits.max_stop_token_ids}")
    if sampling.eos_token_id is not None and not sampling.ignore_eos and sampling.eos_token_id not in ends:
        ends = [*ends, sampling.eos_token_id]
    if sampling.n != 1:
        raise InvalidRequest("n", sampling.n, "must be 1: send a request for each sequence")
    room = max(room, 1)
    max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=None if sampling.seed is None else sampling.seed % 2**64,
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        ignore_eos=True,
        stop_token_ids=tuple(ends),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logit_bias=_bias(sampling.logit_bias, limits),
        reading=_reading(sampling.reading),
        **_grammar(sampling.structured_outputs, limits),
    )


def from_params(params: SamplingParams, eos_token_ids: Sequence[int]) -> wire.Sampling:
    """Convert parameters for a worker. Raises `InvalidRequest` for those that the protocol does not have."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest("params", params, "must be SamplingParams")
    if params.stop_strings:
        raise InvalidRequest("stop", params.stop, "is not supported by workers: use stop_token_ids")
    if params.n != 1:
        raise InvalidRequest("n", params.n, "must be 1: send a request for each sequence")
    if params.reading is not None:
        check_reading("reading", params.reading)
    for name in _GRAMMARS:
        check_texts(name, getattr(params, name))
    ends = [] if params.ignore_eos else list(dict.fromkeys([*eos_token_ids, *params.end_token_ids]))
    eos = [token for token in ends if token not in params.stop_token_ids]  # hidden in outputs
    stops = [*params.stop_token_ids, *eos[1:]]
    return wire.Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=stops or None,
        eos_token_id=eos[0] if eos else None,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        logit_bias=wire.NIL if params.logit_bias is None else Raw(wire.encode(dict(params.logit_bias))),
        structured_outputs=_structured(params),
        reading=wire.NIL if params.reading is None else Raw(wire.encode(reading_to_json(params.reading))),
    )


def _bias(raw: Raw, limits: Limits) -> dict[int, float] | None:
    if not wire.given(raw):
        return None
    if len(memoryview(raw)) > 16 * limits.max_logit_bias:
        raise InvalidRequest("len(logit_bias)", "…", f"must be at most {limits.max_logit_bias}")
    try:
        return wire.decode(raw, dict[int, float])
    except wire.Malformed as error:
        raise InvalidRequest("logit_bias", "…", str(error)) from None


def _reading(raw: Raw) -> ReadingPolicy | None:
    if not wire.given(raw):
        return None
    if len(memoryview(raw)) > _MAX_READING_BYTES:
        raise InvalidRequest("len(reading)", len(memoryview(raw)), f"must be at most {_MAX_READING_BYTES} bytes")
    try:
        return reading_from_json(wire.decode(raw, dict[str, Any]))
    except wire.Malformed as error:
        raise InvalidRequest("reading", "…", str(error)) from None


def _grammar(structured: wire.StructuredOutputsParams | None, limits: Limits) -> dict[str, Any]:
    """A grammar as arguments of `SamplingParams`."""
    if structured is None:
        return {}
    if wire.given(structured.structural_tag):
        raise InvalidRequest("structural_tag", "…", "is not supported")
    fields: dict[str, Any] = {
        name: value
        for name, value in (("regex", structured.regex), ("choice", structured.choice), ("grammar", structured.grammar))
        if value is not None
    }
    if bytes(structured.json) != b"\xc0":
        if len(memoryview(structured.json)) > 4 * limits.max_grammar_chars:
            raise InvalidRequest("json", "…", f"must be at most {limits.max_grammar_chars} characters")
        try:
            fields["json_schema"] = wire.decode(structured.json, dict[str, Any] | str)  # type: ignore[arg-type]
        except wire.Malformed as error:
            raise InvalidRequest("json", "…", str(error)) from None
    if structured.json_object:
        fields["response_format"] = {"type": "json_object"}
    return fields


def _structured(params: SamplingParams) -> wire.StructuredOutputsParams | None:
    if not params.structured:
        return None
    schema, response_format = params.json_schema, params.response_format
    source = None if response_format is None else format_source(response_format, Limits())
    any_object = response_format is not None and response_format["type"] == "json_object"
    if source is not None and not any_object:
        if schema is not None:
            raise InvalidRequest("json_schema", "…", "response_format is given too; a request has one grammar")
        schema = source.text
    return wire.StructuredOutputsParams(
        json=wire.NIL if schema is None else Raw(wire.encode(schema)),
        regex=params.regex,
        choice=None if params.choice is None else list(params.choice),
        grammar=params.grammar,
        json_object=any_object or None,
    )


def to_hints(hints: Sequence[wire.Hint]) -> list[CacheHint]:
    """Convert cache hints, which the engine checks."""
    return [CacheHint(*astuple(hint)) for hint in hints]


def from_hints(hints: Sequence[CacheHint]) -> list[wire.Hint]:
    """Convert cache hints to those of the wire."""
    return [wire.Hint(hint.action, hint.num_tokens, hint.ttl, hint.priority) for hint in hints]


def to_results(answers: Sequence[wire.HintAnswer]) -> tuple[HintResult, ...]:
    """Convert answers to cache hints."""
    return tuple(HintResult(*astuple(answer)) for answer in answers)


def from_results(results: Sequence[HintResult]) -> list[wire.HintAnswer]:
    """Convert answers to cache hints to those of the wire."""
    return [wire.HintAnswer(r.action, r.status, r.num_tokens, r.ttl, r.reason) for r in results]
