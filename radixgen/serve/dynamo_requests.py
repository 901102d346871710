"""Dynamo's requests as ours, and our outputs as its chunks: dictionaries in, dictionaries out."""

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
    """What a request asks for, with `defaults` for what it does not set; `max_tokens` is at most `room` and that of
    `defaults`.

    Stop strings are the frontend's to find: it ends the request then. Raises `InvalidRequest`.
    """
    options, stops = _part(request, "sampling_options"), _part(request, "stop_conditions")
    told = _part(request, "output_options")
    for field in _UNSERVED:
        if options.get(field):
            raise InvalidRequest(field, options[field], "is not served here")
    if told.get("prompt_logprobs") is not None:
        raise InvalidRequest("prompt_logprobs", told["prompt_logprobs"], "is not served here")
    chosen = {**(defaults or {})}
    room = min(room, chosen.pop("max_tokens", room))
    chosen |= {field: options[field] for field in _SAMPLING if options.get(field) is not None}
    if "logit_bias" in chosen:
        chosen["logit_bias"] = _bias(chosen["logit_bias"])
    guided = options.get("guided_decoding")
    if isinstance(guided, Mapping):
        chosen |= {ours: guided[field] for field, ours in _GRAMMARS.items() if guided.get(field) is not None}
    asked = stops.get("max_tokens")
    if isinstance(asked, int) and not isinstance(asked, bool):
        room = min(asked, room) if asked > 0 else asked
    hidden = [*(stops.get("stop_token_ids") or ()), *(stops.get("stop_token_ids_hidden") or ())]
    ignore_eos = bool(stops.get("ignore_eos"))
    return SamplingParams(
        **chosen,
        max_tokens=room,
        min_tokens=stops.get("min_tokens") or 0,
        ignore_eos=ignore_eos,
        stop_token_ids=() if ignore_eos else tuple(dict.fromkeys(hidden)),
        logprobs=told.get("logprobs"),
    )


def check_adapter(request: Mapping[str, Any], served: Collection[str]) -> None:
    """Raise `InvalidRequest` where a request names an adapter: as the model, or as front ends' routers do."""
    model = request.get("model")
    if model is not None and model not in served:
        raise InvalidRequest("model", model, f"must be {' or '.join(served)}; {ADAPTERS}")
    for place in (request, *(request.get(name) for name in ("routing", "sampling_options", "extra_args", "nvext"))):
        if isinstance(place, Mapping):
            for field in sorted(ADAPTER_FIELDS.intersection(place)):
                refuse_adapter(field, place[field])


def chunks(output: RequestOutput, usage: "Usage", text_of: Callable[[int], str]) -> Iterator[Chunk]:
    """What is new in an output, a chunk a sequence; with the last of the request, its usage."""
    usage.count(output)
    last = len(output.outputs) - 1
    for place, one in enumerate(output.outputs):
        chunk: Chunk = {"token_ids": one.token_ids, "index": one.index}
        if one.logprobs:
            chunk |= _logprobs(one, text_of)
        if one.finish_reason is not None:
            chunk["finish_reason"] = _REASONS.get(one.finish_reason, f"error: {one.stop_reason}")
        if output.finished and place == last:
            chunk["completion_usage"] = usage.told()
        yield chunk


class Usage:
    """The tokens of one request, as far as they were told."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.completion_tokens = 0

    def count(self, output: RequestOutput) -> None:
        """Take over a delta."""
        self.cached_tokens = output.num_cached_tokens
        self.completion_tokens += sum(len(one.token_ids) for one in output.outputs)

    def told(self) -> Chunk:
        """In OpenAI's words."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _part(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = request.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise InvalidRequest(name, part, "must be an object")
    return part


def _bias(bias: object) -> dict[int, Any]:
    """JSON has text for keys."""
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", bias, "must be an object")
    try:
        return {int(token): value for token, value in bias.items()}
    except (TypeError, ValueError) as error:
        raise InvalidRequest("logit_bias", bias, "must have token ids for keys") from error


def _logprobs(one: CompletionOutput, text_of: Callable[[int], str]) -> Chunk:
    """Each token's natural-log probability; of each place the likeliest, the token itself first."""
    assert one.logprobs is not None
    top = [
        [
            {"rank": rank, "token_id": token, "token": text_of(token), "logprob": value}
            for rank, (token, value) in enumerate(found.items(), 1)
        ]
        for found in one.logprobs
    ]
    return {"log_probs": [next(iter(found.values())) for found in one.logprobs], "top_logprobs": top}
