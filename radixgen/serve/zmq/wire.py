"""Messages of vLLM's EngineCore protocol between front ends and workers, and their encoding as MessagePack.

docs/wire.md documents each field. Unknown trailing array elements and unknown map keys are skipped. Where only the
presence of a field matters, it stays `Raw`, so that a small frame can't expand into large objects.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType, field

from radixgen.core import FinishReason, HintAction, HintStatus, RadixgenError, check_text

T = TypeVar("T")

VLLM_VERSION = "0.33.0"
"""Version of vLLM whose protocol this is"""
DEAD = b"ENGINE_CORE_DEAD"
"""Only frame of the message that an engine sends when it dies"""
ADD, ABORT, START_WAVE, UTILITY = b"\x00", b"\x01", b"\x02", b"\x03"
BLOCK_SIZE = 16
"""Tokens per block, the unit in which the KV cache size is reported"""
FINISH: Final[tuple[FinishReason, ...]] = ("stop", "length", "abort", "error")
"""Finish reasons by their number in messages"""
RAW_VIEW = 3
"""MessagePack extension type of array data"""
NIL = Raw(b"\xc0")


class Malformed(RadixgenError):
    """A frame that is not a valid message."""


# -- handshake ------------------------------------------------------------------------------------------------


class Status(Struct):
    """Handshake message of a worker: `HELLO`, then, after `Init`, `READY`."""

    status: Literal["HELLO", "READY"]
    local: bool = True
    headless: bool = True


class Addresses(Struct):
    """Addresses that a worker connects to: one input and one output per process of the front end."""

    inputs: list[str]
    outputs: list[str]
    coordinator_input: str | None = None
    coordinator_output: str | None = None
    frontend_stats_publish_address: str | None = None


class Init(Struct):
    """Answer of a front end to `HELLO`. `heartbeat` and `salt_key` are radixgen's own.

    heartbeat: seconds between ZMTP pings; 0 disables them.
    salt_key: secret key for this front end's cache salts; if empty, the worker uses its own.
    """

    addresses: Addresses
    parallel_config: Raw = Raw(b"\x80")
    heartbeat: float = 0.0
    salt_key: bytes = b""


class Ready(Struct):
    """First message of a worker on an input socket. The last three fields are radixgen's own."""

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
    host_kv_tokens: int | UnsetType = UNSET
    radixgen_version: str = ""


# -- requests -------------------------------------------------------------------------------------------------


class StructuredOutputsParams(Struct, omit_defaults=True):
    """Grammar of a request; at most one field is set."""

    json: Raw = NIL
    """JSON schema, as an object or as text"""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Raw = NIL


class Hint(Struct, array_like=True):
    """A `CacheHint`, as an array."""

    action: str
    num_tokens: int | None = None
    ttl: float | None = None
    priority: int = 0


class HintAnswer(Struct, array_like=True):
    """A `HintResult`, as an array."""

    action: HintAction
    status: HintStatus
    num_tokens: int
    ttl: float | None
    reason: str


class Sampling(Struct, omit_defaults=True):
    """vLLM's `SamplingParams`, as a map without the fields that have default values. The last three fields are
    radixgen's own.
    """

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
    structured_outputs: StructuredOutputsParams | None = None
    allowed_token_ids: Raw = NIL
    bad_words_token_ids: Raw = field(default=NIL, name="_bad_words_token_ids")
    logprob_token_ids: Raw = NIL
    thinking_token_budget: Raw = NIL
    repetition_detection: Raw = NIL
    cache_hints: list[Hint] = []
    hint_owner: str | None = None
    reading: Raw = NIL


class Add(Struct, array_like=True):
    """Request to generate, as an array."""

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
    """Call of a utility, as an array; the utility decodes `args`."""

    client_index: int
    call_id: int
    method: str
    args: Raw = Raw(b"\x90")


# -- outputs --------------------------------------------------------------------------------------------------


class Array(Struct, array_like=True):
    """NumPy array: dtype, shape and bytes."""

    dtype: str
    shape: list[int]
    data: msgspec.msgpack.Ext


class Logprobs(Struct, array_like=True):
    """Log-probabilities of each position: the token itself, then the likeliest `k` tokens in descending order."""

    token_ids: Array
    """`[positions, k + 1]`, int64"""
    logprobs: Array
    """`[positions, k + 1]`, float32, natural logarithm"""
    ranks: Array
    """`[positions]`, int64: rank of the token, from 1; `k + 1` if it is not among the `k` likeliest"""
    cu_num_generated_tokens: None = None


class PrefillStats(Struct):
    """Numbers of prompt tokens of a request: all, and those that were cached at its admission. `cache_hints` is
    radixgen's own.
    """

    num_prompt_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_local_cached_tokens: int
    num_external_cached_tokens: int = 0
    cache_hints: list[HintAnswer] | UnsetType = UNSET


class Output(Struct, array_like=True, gc=False):
    """New tokens of one request, as an array."""

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
    """Prompt tokens (`queries`) and cached prompt tokens (`hits`) of the requests admitted since the last report."""

    requests: int = 0
    queries: int = 0
    hits: int = 0
    reset: bool = False
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0


class Load(Struct):
    """Current load, called scheduler stats in vLLM. SMG drops messages in which a field is missing."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    """Fraction, from 0 to 1"""
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
    """Answer to a `Call`: `result` is `(None, value)`, or `failure_message` is set."""

    call_id: int
    failure_message: str | None = None
    result: tuple[None, Any] | None = None


class EngineCoreOutputs(Struct, array_like=True):
    """Message of a worker, as an array: the outputs of a step, or one reply."""

    engine_index: int = 0
    outputs: list[Output] = []
    scheduler_stats: Load | None = None
    timestamp: float = 0.0
    """Monotonic time of the worker, in seconds"""
    utility_output: Reply | None = None


_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[Any, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (Status, Init, Ready, Add, list[str], Call, EngineCoreOutputs)
}


def encode(message: Any) -> bytes:
    """Encode a message as MessagePack. Raises `InvalidRequest` for text that UTF-8 cannot encode."""
    try:
        return _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        check_text("text", error.object)
        raise


def decode(data: Raw | bytes | memoryview, kind: type[T]) -> T:
    """Decode a message of type `kind`. Raises `Malformed` for invalid bytes, and nothing else."""
    decoder = _DECODERS.get(kind) or msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)  # type: ignore[no-any-return]
    except Exception as error:  # besides msgspec's errors: UnicodeDecodeError, RecursionError, OverflowError
        raise Malformed(f"{getattr(kind, '__name__', kind)}: {error}") from None


def given(raw: Raw) -> bool:
    """Whether a raw field is set: neither nil, false, 0, nor an empty string, array or map."""
    return bytes(memoryview(raw)[:2]) not in (b"\xc0", b"\xc2", b"\x00", b"\xa0", b"\x90", b"\x80")


def request_id_of(payload: bytes) -> str | None:
    """Request id of an `Add` that cannot be decoded as a whole, or None."""
    try:
        return decode(payload, _Head).request_id
    except Malformed:
        return None


# -- log-probabilities -----------------------------------------------------------------------------------------


def pack_logprobs(positions: Sequence[Mapping[int, float]], k: int) -> Logprobs:
    """Convert one dict of log-probabilities per position, its own token first, to arrays with `k + 1` columns."""
    token_ids = np.zeros((len(positions), k + 1), np.int64)
    logprobs = np.full((len(positions), k + 1), -np.inf, np.float32)
    ranks = np.empty(len(positions), np.int64)
    for row, position in enumerate(positions):
        own = next(iter(position))
        ranked = sorted(position, key=lambda token: -position[token])
        rank = ranked.index(own) + 1
        if len(position) > k and k:  # the position's own token is not among the k likeliest
            rank = k + 1
            ranked.remove(own)
        columns = [own, *ranked[:k]]
        token_ids[row, : len(columns)] = columns
        logprobs[row, : len(columns)] = [position[token] for token in columns]
        ranks[row] = rank
    return Logprobs(_pack(token_ids), _pack(logprobs), _pack(ranks))


def unpack_logprobs(packed: Logprobs) -> list[dict[int, float]]:
    """Convert arrays to a dict per position, with its own token first. Raises `Malformed`."""
    token_ids, logprobs = _unpack(packed.token_ids, "<i8"), _unpack(packed.logprobs, "<f4")
    if token_ids.ndim != 2 or token_ids.shape != logprobs.shape:
        raise Malformed("log-probabilities and token ids differ in shape")
    rows = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return [
        {token: value for token, value in zip(*row, strict=True) if value != float("-inf") or token == row[0][0]}
        for row in rows
    ]


def _pack(array: "np.ndarray[Any, Any]") -> Array:
    return Array(array.dtype.str, list(array.shape), msgspec.msgpack.Ext(RAW_VIEW, array.tobytes()))


def _unpack(array: Array, dtype: str) -> "np.ndarray[Any, Any]":
    if array.dtype != dtype or array.data.code != RAW_VIEW:
        raise Malformed(f"array of {array.dtype}, must be {dtype}")
    try:
        unpacked: np.ndarray[Any, Any] = np.frombuffer(bytes(array.data.data), dtype).reshape(array.shape)
    except ValueError as error:
        raise Malformed(f"array of shape {array.shape}: {error}") from None
    return unpacked
