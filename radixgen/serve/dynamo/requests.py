"""Conversion of Dynamo's requests to `SamplingParams`, and of outputs to Dynamo's chunks."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from radixgen.core import CompletionOutput, InvalidRequest, RequestOutput, SamplingParams
from radixgen.core.adapters import ADAPTER_FIELDS, ADAPTERS, refuse_adapter

Chunk = dict[str, Any]

_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
)
_UNSERVED = ("use_beam_search", "length_penalty", "bad_words_token_ids")
_GRAMMARS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_REASONS = {"stop": "stop", "length": "length", "abort": "cancelled"}


def sampling_params(request: Mapping[str, Any], room: int, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Convert a request of Dynamo's. Raises `InvalidRequest`.

    room: maximum number of output tokens.
    defaults: for fields that the request does not set; its `max_tokens` is a limit.

    Stop strings are ignored: Dynamo's frontend finds them and ends the request.
    """
    options, stops = _section(request, "sampling_options"), _section(request, "stop_conditions")
    output_options = _section(request, "output_options")
    for field in _UNSERVED:
        if options.get(field):
            raise InvalidRequest(field, options[field], "is not supported")
    if output_options.get("prompt_logprobs") is not None:
        raise InvalidRequest("prompt_logprobs", output_options["prompt_logprobs"], "is not supported")
    chosen = {**(defaults or {})}
    room = min(room, chosen.pop("max_tokens", room))
    chosen |= {field: options[field] for field in _SAMPLING if options.get(field) is not None}
    if "logit_bias" in chosen:
        chosen["logit_bias"] = _bias(chosen["logit_bias"])
    guided = options.get("guided_decoding")
    if isinstance(guided, Mapping):
        chosen |= {ours: guided[field] for field, ours in _GRAMMARS.items() if guided.get(field) is not None}
    max_tokens = stops.get("max_tokens")
    if isinstance(max_tokens, int) and not isinstance(max_tokens, bool):
        room = min(max_tokens, room) if max_tokens > 0 else max_tokens
    stop_token_ids = [*(stops.get("stop_token_ids") or ()), *(stops.get("stop_token_ids_hidden") or ())]
    ignore_eos = bool(stops.get("ignore_eos"))
    return SamplingParams(
        **chosen,
        max_tokens=room,
        min_tokens=stops.get("min_tokens") or 0,
        ignore_eos=ignore_eos,
        stop_token_ids=() if ignore_eos else tuple(dict.fromkeys(stop_token_ids)),
        logprobs=output_options.get("logprobs"),
    )


def check_adapter(request: Mapping[str, Any], served: Collection[str]) -> None:
    """Raise `InvalidRequest` if a request names an adapter, as its model or in a routing field."""
    model = request.get("model")
    if model is not None and model not in served:
        raise InvalidRequest("model", model, f"must be {' or '.join(served)}; {ADAPTERS}")
    for section in (request, *(request.get(name) for name in ("routing", "sampling_options", "extra_args", "nvext"))):
        if isinstance(section, Mapping):
            for field in sorted(ADAPTER_FIELDS.intersection(section)):
                refuse_adapter(field, section[field])


def chunks(output: RequestOutput, usage: "UsageCounter", text_of: Callable[[int], str]) -> Iterator[Chunk]:
    """Convert an output to one chunk per sequence; the last chunk of the request carries its usage."""
    usage.add(output)
    last = len(output.outputs) - 1
    for position, completion in enumerate(output.outputs):
        chunk: Chunk = {"token_ids": completion.token_ids, "index": completion.index}
        if completion.logprobs:
            chunk |= _logprobs(completion, text_of)
        if completion.finish_reason is not None:
            chunk["finish_reason"] = _REASONS.get(completion.finish_reason, f"error: {completion.stop_reason}")
        if output.finished and position == last:
            chunk["completion_usage"] = usage.as_dict()
        yield chunk


class UsageCounter:
    """Count of the tokens of one request, from its outputs so far."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.completion_tokens = 0

    def add(self, output: RequestOutput) -> None:
        """Count a delta."""
        self.cached_tokens = output.num_cached_tokens
        self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)

    def as_dict(self) -> Chunk:
        """The usage in OpenAI's format."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _section(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = request.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise InvalidRequest(name, section, "must be an object")
    return section


def _bias(bias: object) -> dict[int, Any]:
    """A logit bias by token id; JSON has strings for keys."""
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", bias, "must be an object")
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError) as error:
        raise InvalidRequest("logit_bias", bias, "must have token ids for keys") from error


def _logprobs(completion: CompletionOutput, text_of: Callable[[int], str]) -> Chunk:
    """The natural-log probability of each token, and the likeliest tokens at its position after the token itself."""
    assert completion.logprobs is not None
    top = [
        [
            {"rank": rank, "token_id": token, "token": text_of(token), "logprob": value}
            for rank, (token, value) in enumerate(position.items(), 1)
        ]
        for position in completion.logprobs
    ]
    return {"log_probs": [next(iter(position.values())) for position in completion.logprobs], "top_logprobs": top}
