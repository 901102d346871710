"""vLLM's EngineCore wire: what front ends and workers say to each other, as types, and to and from bytes.

The one place that knows the wire. No sockets here. docs/wire.md says field by field what is read, what is refused
and what is written. Arrays may grow at their end and maps may have more keys: what is not known is skipped, never
built. Fields whose presence is all that counts stay `Raw`, so that a small frame can't become large objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Raw, Struct, field

from radixgen.core import FinishReason, InvalidRequest, Limits, RadixgenError, SamplingParams, check_text, check_texts
from radixgen.core.adapters import ADAPTERS
from radixgen.core.grammar import format_source

T = TypeVar("T")

VLLM_VERSION = "0.33.0"
"""The version whose wire this is."""
DEAD = b"ENGINE_CORE_DEAD"
"""The only frame of an engine's last message."""
ADD, ABORT, START_WAVE, UTILITY = b"\x00", b"\x01", b"\x02", b"\x03"
BLOCK_SIZE = 16
"""Tokens of what the wire calls a block. It is a unit of reporting only."""
FINISH: Final[tuple[FinishReason, ...]] = ("stop", "length", "abort", "error")
"""Finish reasons by their number."""
RAW_VIEW = 3
"""The extension type of an array's bytes."""
NIL = Raw(b"\xc0")


class Malformed(RadixgenError):
    """A frame that is no message of this wire."""


# -- handshake ------------------------------------------------------------------------------------------------


class Status(Struct):
    """Worker to front end, over the handshake: `HELLO`, then, after `Init`, `READY`."""

    status: Literal["HELLO", "READY"]
    local: bool = True
    headless: bool = True


class Addresses(Struct):
    """Where a worker dials in: one input and one output for each of the front end's processes."""

    inputs: list[str]
    outputs: list[str]
    coordinator_input: str | None = None
    coordinator_output: str | None = None
    frontend_stats_publish_address: str | None = None


class Init(Struct):
    """Front end to worker: the answer to `HELLO`. Additions of ours: a front end that names `heartbeat`, in seconds,
    answers ZMTP's pings; cache salts of one that names `salt_key` become namespaces by that secret.
    """

    addresses: Addresses
    parallel_config: Raw = Raw(b"\x80")
    heartbeat: float = 0.0
    salt_key: bytes = b""


class Ready(Struct):
    """Worker to front end: its first message on an input. The last two are additions of ours."""

    max_model_len: int
    num_gpu_blocks: int
    block_size: int = BLOCK_SIZE
    dp_stats_address: str | None = None
    dtype: str = "float32"
    vllm_version: str = VLLM_VERSION
    world_size: int = 1
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    data_parallel_rank: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    instance_id: str = ""
    kv_cache_size_tokens: int | None = None
    kv_cache_max_concurrency: float | None = None
    kv_events_config: Raw = NIL
    supports_lora: bool = False
    max_loras: int = 0
    eos_token_ids: list[int] = []
    radixgen_version: str = ""


# -- requests -------------------------------------------------------------------------------------------------


class StructuredOutputs(Struct, omit_defaults=True):
    """At most one grammar."""

    json: Raw = NIL
    """A schema, or its text"""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Raw = NIL


class Sampling(Struct, omit_defaults=True):
    """vLLM's `SamplingParams` as far as they reach an engine: a map in which defaults are left out."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    eos_token_id: int | None = field(default=None, name="_eos_token_id")
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Raw = NIL
    structured_outputs: StructuredOutputs | None = None
    allowed_token_ids: Raw = NIL
    bad_words_token_ids: Raw = field(default=NIL, name="_bad_words_token_ids")
    logprob_token_ids: Raw = NIL
    thinking_token_budget: Raw = NIL
    repetition_detection: Raw = NIL


class Add(Struct, array_like=True):
    """A request, by position."""

    request_id: str
    prompt_token_ids: list[int] | None
    mm_features: Raw = NIL
    sampling_params: Sampling | None = None
    pooling_params: Raw = NIL
    arrival_time: Raw = Raw(b"\x00")
    lora_request: Raw = NIL
    cache_salt: str | None = None
    data_parallel_rank: Raw = NIL
    prompt_embeds: Raw = NIL
    prompt_is_token_ids: Raw = NIL
    client_index: int = 0
    current_wave: int = 0
    priority: int = 0
    trace_headers: Raw = NIL
    resumable: bool = False
    external_req_id: Raw = NIL
    reasoning_ended: Raw = NIL
    reasoning_parser_kwargs: Raw = NIL
    abort_immediately: bool = False


class _Head(Struct, array_like=True):
    request_id: str


class Call(Struct, array_like=True):
    """A call of a utility, by position; `args` is decoded by the utility."""

    client_index: int
    call_id: int
    method: str
    args: Raw = Raw(b"\x90")


# -- outputs --------------------------------------------------------------------------------------------------


class Array(Struct, array_like=True):
    """A NumPy array: its type, its shape, its bytes."""

    dtype: str
    shape: list[int]
    data: msgspec.msgpack.Ext


class Logprobs(Struct, array_like=True):
    """Of each position the token, then the likeliest `k`, likeliest first."""

    token_ids: Array
    """`[positions, k + 1]`, int64"""
    logprobs: Array
    """`[positions, k + 1]`, float32, natural"""
    ranks: Array
    """`[positions]`, int64, from 1: of the token among all; `k + 1` where it is not among the `k`."""
    cu_num_generated_tokens: None = None


class PrefillStats(Struct):
    """Tokens of a prompt: how many were cached when the request was admitted."""

    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int = 0


class Output(Struct, array_like=True, gc=False):
    """What is new of one request, by position."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: Logprobs | None = None
    new_prompt_logprobs: Logprobs | None = None
    pooling_output: None = None
    finish_reason: int | None = None
    stop_reason: int | str | None = None
    events: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
    trace_headers: None = None
    prefill_stats: PrefillStats | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class PrefixCacheStats(Struct):
    """Of the requests that were admitted since the last report: their prompt tokens, and those that were cached."""

    requests: int = 0
    queries: int = 0
    hits: int = 0
    reset: bool = False
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0


class Load(Struct):
    """What the wire calls scheduler statistics: gauges of this moment. SMG drops a message that lacks one of these."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    """From 0 to 1"""
    prefix_cache_stats: PrefixCacheStats
    num_skipped_waiting_reqs: int = 0
    step_counter: int = 0
    current_wave: int = 0
    connector_prefix_cache_stats: None = None
    kv_cache_eviction_events: list[None] = []
    spec_decoding_stats: None = None
    kv_connector_stats: None = None
    waiting_lora_adapters: dict[str, int] = {}
    running_lora_adapters: dict[str, int] = {}
    cudagraph_stats: None = None
    perf_stats: None = None


class Reply(Struct, array_like=True):
    """The answer to a `Call`: `result` is `(None, value)` unless it failed."""

    call_id: int
    failure_message: str | None = None
    result: tuple[None, Any] | None = None


class Outputs(Struct, array_like=True):
    """A message of an engine, by position: outputs of one step, or one reply."""

    engine_index: int = 0
    outputs: list[Output] = []
    scheduler_stats: Load | None = None
    timestamp: float = 0.0
    """Seconds of the worker's monotonic clock"""
    utility_output: Reply | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Status, Init, Ready, Add, list[str], Call, Outputs)
}


def encode(message: Any) -> bytes:
    """As MessagePack. Raises `InvalidRequest` for text that has no UTF-8."""
    try:
        return _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        check_text("text", error.object)
        raise


def decode(data: Raw | bytes | memoryview, kind: type[T]) -> T:
    """A message of this type. Raises `Malformed`, whatever the bytes are.

    Arrays may be longer and maps may have more keys than is known.
    """
    decoder = _DECODERS.get(kind) or msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)  # type: ignore[no-any-return]
    except Exception as error:  # UnicodeDecodeError, RecursionError and OverflowError are none of msgspec's
        raise Malformed(f"{getattr(kind, '__name__', kind)}: {error}") from None


def given(raw: Raw) -> bool:
    """Whether a field holds anything but nil, false, 0, or an empty string, array or map."""
    return bytes(memoryview(raw)[:2]) not in (b"\xc0", b"\xc2", b"\x00", b"\xa0", b"\x90", b"\x80")


def request_id_of(payload: bytes) -> str | None:
    """The id of an `Add` of which no more can be read."""
    try:
        return decode(payload, _Head).request_id
    except Malformed:
        return None


# -- to and from radixgen's own nouns ---------------------------------------------------------------------------


_UNSERVED = (
    "allowed_token_ids",
    "bad_words_token_ids",
    "logprob_token_ids",
    "thinking_token_budget",
    "repetition_detection",
)
_GRAMMARS = ("json_schema", "regex", "grammar", "choice", "response_format")


def check_served(request: Add) -> None:
    """Raise `InvalidRequest` for the first thing that is asked for and not served."""
    if given(request.lora_request):
        raise InvalidRequest("lora_request", "…", ADAPTERS)
    for name in ("mm_features", "pooling_params", "prompt_embeds", "prompt_is_token_ids"):
        if given(getattr(request, name)):
            raise InvalidRequest(name, "…", "is not served")
    if request.resumable:
        raise InvalidRequest("resumable", True, "is not served")
    sampling = request.sampling_params
    if sampling is None or request.prompt_token_ids is None:
        raise InvalidRequest("request", request.request_id, "must have prompt_token_ids and sampling_params")
    for name in _UNSERVED:
        if given(getattr(sampling, name)):
            raise InvalidRequest(name.removeprefix("_"), "…", "is not served")


def to_params(wire: Sampling, room: int, limits: Limits) -> SamplingParams:
    """Parameters for a prompt that leaves `room` tokens. Raises `InvalidRequest` for what is too large to be looked
    at; the rest is for the engine to check.

    End tokens are the front end's to name: its own, and those that stop a request.
    """
    ends = wire.stop_token_ids or []
    if len(ends) > limits.max_stop_token_ids:
        raise InvalidRequest("len(stop_token_ids)", len(ends), f"must be at most {limits.max_stop_token_ids}")
    if wire.eos_token_id is not None and not wire.ignore_eos and wire.eos_token_id not in ends:
        ends = [*ends, wire.eos_token_id]
    if wire.n != 1:
        raise InvalidRequest("n", wire.n, "a request of this wire has one sequence")
    most = max(room, 1)
    max_tokens = most if wire.max_tokens is None else min(wire.max_tokens, most)
    return SamplingParams(
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        seed=None if wire.seed is None else wire.seed % 2**64,
        max_tokens=max_tokens,
        min_tokens=min(wire.min_tokens, max_tokens),
        ignore_eos=True,
        stop_token_ids=tuple(ends),
        logprobs=wire.logprobs,
        prompt_logprobs=wire.prompt_logprobs,
        logit_bias=_bias(wire.logit_bias, limits),
        **_grammar(wire.structured_outputs, limits),
    )


def from_params(params: SamplingParams, eos_token_ids: Sequence[int]) -> Sampling:
    """What a front end sends. Raises `InvalidRequest` for what does not cross this wire."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest("params", params, "must be SamplingParams")
    if params.stop_strings:
        raise InvalidRequest("stop", params.stop, "is text, and a worker sees tokens: use stop_token_ids")
    if params.n != 1:
        raise InvalidRequest("n", params.n, "a request of this wire has one sequence")
    for name in _GRAMMARS:
        check_texts(name, getattr(params, name))
    ends = [] if params.ignore_eos else list(dict.fromkeys([*eos_token_ids, *params.end_token_ids]))
    eos = [token for token in ends if token not in params.stop_token_ids]  # the caller's own are told
    stops = [*params.stop_token_ids, *eos[1:]]
    return Sampling(
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
        logit_bias=NIL if params.logit_bias is None else Raw(encode(dict(params.logit_bias))),
        structured_outputs=_structured(params),
    )


def pack_logprobs(found: Sequence[Mapping[int, float]], k: int) -> Logprobs:
    """The engine's log-probabilities of some positions, each token's own first, as arrays of `k + 1` columns."""
    token_ids = np.zeros((len(found), k + 1), np.int64)
    logprobs = np.full((len(found), k + 1), -np.inf, np.float32)
    ranks = np.empty(len(found), np.int64)
    for row, one in enumerate(found):
        own = next(iter(one))
        ranked = sorted(one, key=lambda token: -one[token])
        place = ranked.index(own)
        if len(one) > k and k:  # the token's own is not among the likeliest
            place = k
            ranked.remove(own)
        columns = [own, *ranked[:k]]
        token_ids[row, : len(columns)] = columns
        logprobs[row, : len(columns)] = [one[token] for token in columns]
        ranks[row] = place + 1
    return Logprobs(_pack(token_ids), _pack(logprobs), _pack(ranks))


def unpack_logprobs(packed: Logprobs) -> list[dict[int, float]]:
    """As the engine gives them: of each position the token's own first. Raises `Malformed`."""
    token_ids, logprobs = _unpack(packed.token_ids, "<i8"), _unpack(packed.logprobs, "<f4")
    if token_ids.ndim != 2 or token_ids.shape != logprobs.shape:
        raise Malformed("log-probabilities and their tokens differ in shape")
    rows = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return [
        {token: value for token, value in zip(*row, strict=True) if value != float("-inf") or token == row[0][0]}
        for row in rows
    ]


def _pack(array: "np.ndarray[Any, Any]") -> Array:
    return Array(array.dtype.str, list(array.shape), msgspec.msgpack.Ext(RAW_VIEW, array.tobytes()))


def _unpack(array: Array, dtype: str) -> "np.ndarray[Any, Any]":
    if array.dtype != dtype or array.data.code != RAW_VIEW:
        raise Malformed(f"an array of {array.dtype} where {dtype} was due")
    try:
        unpacked: np.ndarray[Any, Any] = np.frombuffer(bytes(array.data.data), dtype).reshape(array.shape)
    except ValueError as error:
        raise Malformed(f"an array of shape {array.shape}: {error}") from None
    return unpacked


def _bias(raw: Raw, limits: Limits) -> dict[int, float] | None:
    if not given(raw):
        return None
    if len(memoryview(raw)) > 16 * limits.max_logit_bias:
        raise InvalidRequest("len(logit_bias)", "…", f"must be at most {limits.max_logit_bias}")
    try:
        return decode(raw, dict[int, float])
    except Malformed as error:
        raise InvalidRequest("logit_bias", "…", str(error)) from None


def _grammar(asked: StructuredOutputs | None, limits: Limits) -> dict[str, Any]:
    """As arguments of `SamplingParams`."""
    if asked is None:
        return {}
    if given(asked.structural_tag):
        raise InvalidRequest("structural_tag", "…", "is not served")
    found: dict[str, Any] = {
        name: value
        for name, value in (("regex", asked.regex), ("choice", asked.choice), ("grammar", asked.grammar))
        if value is not None
    }
    if bytes(asked.json) != b"\xc0":
        if len(memoryview(asked.json)) > 4 * limits.max_grammar_chars:
            raise InvalidRequest("json", "…", f"at most {limits.max_grammar_chars} characters")
        try:
            found["json_schema"] = decode(asked.json, dict[str, Any] | str)  # type: ignore[arg-type]
        except Malformed as error:
            raise InvalidRequest("json", "…", str(error)) from None
    if asked.json_object:
        found["response_format"] = {"type": "json_object"}
    return found


def _structured(params: SamplingParams) -> StructuredOutputs | None:
    if not params.structured:
        return None
    schema, asked = params.json_schema, params.response_format
    source = None if asked is None else format_source(asked, Limits())
    any_object = asked is not None and asked["type"] == "json_object"
    if source is not None and not any_object:
        if schema is not None:
            raise InvalidRequest("json_schema", "…", "response_format is given too; a request has one grammar")
        schema = source.text
    return StructuredOutputs(
        json=NIL if schema is None else Raw(encode(schema)),
        regex=params.regex,
        choice=None if params.choice is None else list(params.choice),
        grammar=params.grammar,
        json_object=any_object or None,
    )
