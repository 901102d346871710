"""The wire, byte for byte, and what is made of bytes that are none of it."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutate_frames import frames, mutated

from radixgen import CacheHint, InvalidRequest, Limits, SamplingParams
from radixgen.serve.zmq import wire, wire_params

LIMITS = Limits()
SMG_ADD = (
    "dc0015d942636d706c2d67484d52594873714d6264486b3365474e55546d464448472d30316132313739302d636337322d373431662d62"
    "3235382d63323030613632356334396295cd01f8cd0df7cd011acd1229cd013ac08cab74656d7065726174757265ca00000000a5746f70"
    "5f70ca3f800000a5746f705f6b00aa6d61785f746f6b656e7308aa6d696e5f746f6b656e7300a56d696e5f70ca00000000b16672657175"
    "656e63795f70656e616c7479ca00000000b070726573656e63655f70656e616c7479ca00000000b272657065746974696f6e5f70656e61"
    "6c7479ca3f800000ae73746f705f746f6b656e5f696473921e02ad5f656f735f746f6b656e5f696402b35f616c6c5f73746f705f746f6b"
    "656e5f69647392021ec0cb41dac2052bce0167c0c0c0c0c0000000c0c2c0c0c0c2c0"
)
"""A completion of 8 tokens at the most, stopped by token 30, as SMG 1.13.0 asked for it with SmolLM2."""


def test_golden_handshake() -> None:
    hello = b"\x83\xa6status\xa5HELLO\xa5local\xc3\xa8headless\xc3"
    assert wire.encode(wire.Status("HELLO")) == hello and wire.decode(hello, wire.Status) == wire.Status("HELLO")
    addresses = b"\x82\xa6inputs\x91\xa7ipc:///\xa7outputs\x91\xa7ipc://x"
    init = wire.decode(b"\x82\xa9addresses" + addresses + b"\xafparallel_config\x80", wire.Init)
    assert (init.addresses.inputs, init.addresses.outputs, init.heartbeat) == (["ipc:///"], ["ipc://x"], 0.0)
    more = b"\x83\xa9addresses" + addresses + b"\xafparallel_config\x81\xa1a\x93\x01\x02\x03\xa3new\xc0"
    assert wire.decode(more, wire.Init).addresses == init.addresses
    ready = b"\xde\x00\x16\xadmax_model_len\xcd\x01\x00\xaenum_gpu_blocks\x20\xaablock_size\x10"
    assert wire.encode(wire.Ready(256, 32)).startswith(ready)


def test_golden_requests() -> None:
    """The call is vLLM's own encoding; it stands in SMG's tests. The request is what SMG 1.13.0 sent."""
    call = bytes.fromhex("9400cf0123456789abcdefb272657365745f7072656669785f636163686592c2c2")
    found = wire.decode(call, wire.Call)
    assert (found.client_index, found.call_id, found.method) == (0, 0x0123456789ABCDEF, "reset_prefix_cache")
    assert wire.encode(found) == call
    add = wire.decode(bytes.fromhex(SMG_ADD), wire.Add)
    assert add.request_id == "cmpl-gHMRYHsqMbdHk3eGNUTmFDHG-01a21790-cc72-741f-b258-c200a625c49b"
    assert add.prompt_token_ids == [504, 3575, 282, 4649, 314] and add.sampling_params is not None
    wire_params.check_served(add)
    params = wire_params.to_params(add.sampling_params, 99, LIMITS)
    wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=(30, 2))
    assert params == wanted and add.sampling_params.eos_token_id == 2


def test_a_request_may_be_short_or_long() -> None:
    short = b"\x96\xa1a\x92\x01\x02\xc0\x81\xaamax_tokens\x05\xc0\xcb" + bytes(8)
    request = wire.decode(short, wire.Add)
    assert (request.request_id, request.prompt_token_ids) == ("a", [1, 2])
    assert request.sampling_params == wire.Sampling(max_tokens=5)
    assert (request.cache_salt, request.priority, request.abort_immediately) == (None, 0, False)
    whole = msgspec.msgpack.decode(wire.encode(request))
    longer = wire.decode(msgspec.msgpack.encode([*whole, "session", {"hints": [1]}, 7]), wire.Add)
    assert wire.encode(longer) == wire.encode(request)


def test_golden_outputs() -> None:
    first = wire.Output("a", [5], prefill_stats=wire.PrefillStats(3, 1, 2, 2))
    last = wire.Output("b", [6, 7], finish_reason=1, stop_reason="x")
    message = wire.encode(wire.EngineCoreOutputs(1, [first, last], None, 0.5))
    stats = b"\x85\xb1num_prompt_tokens\x03\xb3num_computed_tokens\x01\xb1num_cached_tokens\x02"
    stats += b"\xb7num_local_cached_tokens\x02\xba" + b"num_external_cached_tokens\x00"
    one = b"\x9c\xa1a\x91\x05" + b"\xc0" * 9 + stats
    other = b"\x9c\xa1b\x92\x06\x07\xc0\xc0\xc0\x01\xa1x" + b"\xc0" * 5
    assert message == b"\x95\x01\x92" + one + other + b"\xc0\xcb" + b"\x3f\xe0" + bytes(6) + b"\xc0"
    assert wire.decode(message, wire.EngineCoreOutputs).outputs == [first, last]
    reply = wire.encode(wire.EngineCoreOutputs(0, [], None, 0.5, wire.Reply(7, None, (None, True))))
    assert reply == b"\x95\x00\x90\xc0\xcb\x3f\xe0" + bytes(6) + b"\x93\x07\xc0\x92\xc0\xc3"
    failure = wire.encode(wire.EngineCoreOutputs(0, [], None, 0.5, wire.Reply(7, "no")))
    assert failure == b"\x95\x00\x90\xc0\xcb\x3f\xe0" + bytes(6) + b"\x93\x07\xa2no\xc0"


def test_golden_logprobs() -> None:
    packed = wire.encode(wire.pack_logprobs([{5: -0.5}], 0))
    ids = b"\x93\xa3<i8\x92\x01\x01\xd7\x03\x05" + bytes(7)
    values = b"\x93\xa3<f4\x92\x01\x01\xd6\x03\x00\x00\x00\xbf"
    ranks = b"\x93\xa3<i8\x91\x01\xd7\x03\x01" + bytes(7)
    assert packed == b"\x94" + ids + values + ranks + b"\xc0"


@settings(max_examples=30)
@given(st.integers(0, 5), st.lists(st.lists(st.floats(-9, 0, width=32), min_size=7, max_size=7), max_size=5), st.data())
def test_logprobs_there_and_back(k: int, rows: list[list[float]], data: st.DataObject) -> None:
    """As the engine gives them: the token's own first, then the likeliest."""
    found = []
    for row in rows:
        own = data.draw(st.integers(0, 6))
        likeliest = sorted(range(7), key=lambda token: -row[token])[:k]
        found.append({own: row[own]} | {token: row[token] for token in likeliest})
    packed = wire.pack_logprobs(found, k)
    back = wire.unpack_logprobs(wire.decode(wire.encode(packed), wire.Logprobs))
    assert [dict(one) for one in back] == found and [next(iter(one)) for one in back] == [next(iter(o)) for o in found]
    assert packed.token_ids.shape == [len(rows), k + 1]


@settings(max_examples=30)
@given(
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        top_p=st.floats(0.1, 1),
        top_k=st.integers(-1, 50),
        seed=st.none() | st.integers(0, 2**64 - 1),
        max_tokens=st.integers(1, 99),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=4, unique=True).map(tuple),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-9, 9), min_size=1, max_size=3),
        regex=st.none() | st.text(),
        ignore_eos=st.booleans(),
    ),
    st.lists(st.integers(100, 200), max_size=3, unique=True),
)
def test_parameters_there_and_back(params: SamplingParams, eos: list[int]) -> None:
    """The end tokens come to be stop tokens; all else stays."""
    sent = wire.decode(wire.encode(wire_params.from_params(params, eos)), wire.Sampling)
    found = wire_params.to_params(sent, 1000, LIMITS)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    assert set(found.stop_token_ids) == ends and found.ignore_eos
    for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "logprobs", "prompt_logprobs", "regex"):
        assert getattr(found, name) == getattr(params, name), name
    assert (found.logit_bias or None) == (params.logit_bias or None)


def test_parameters_are_cut_to_what_is_left() -> None:
    assert wire_params.to_params(wire.Sampling(max_tokens=None), 7, LIMITS).max_tokens == 7
    assert wire_params.to_params(wire.Sampling(max_tokens=10**9, min_tokens=9), 7, LIMITS).max_tokens == 7
    assert wire_params.to_params(wire.Sampling(seed=-1), 7, LIMITS).seed == 2**64 - 1


@pytest.mark.parametrize(
    "params", [SamplingParams(n=2), SamplingParams(stop="x"), SamplingParams(response_format={"type": "json_schema"})]
)
def test_what_does_not_cross(params: SamplingParams) -> None:
    with pytest.raises(InvalidRequest):
        wire_params.from_params(params, [])


def test_structured_outputs() -> None:
    for params in (
        SamplingParams(json_schema={"type": "object"}),
        SamplingParams(json_schema='{"type": "object"}'),
        SamplingParams(choice=["a", "b"]),
        SamplingParams(grammar="start: /a/"),
        SamplingParams(response_format={"type": "json_object"}),
    ):
        sent = wire.decode(wire.encode(wire_params.from_params(params, [])), wire.Sampling)
        found = wire_params.to_params(sent, 9, LIMITS)
        for name in ("json_schema", "choice", "grammar", "response_format"):
            assert getattr(found, name) == getattr(params, name), name


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", wire.Add),
        (b"\x92\xa1\xff\x90", wire.Add),  # UnicodeDecodeError, which is none of msgspec's
        (b"\x91\xa1a", wire.Add),
        (b"\x92\xa1a\x91\xa1b", wire.Add),
        (b"\x93\xa1a\x90" + b"\x91" * 100_000, wire.Add),  # RecursionError
        (b"\x91\xc0", list[str]),
        (b"\x94\x00\x01\x02\x90", wire.Call),
        (b"\xc1", wire.EngineCoreOutputs),
    ],
)
def test_what_is_no_message(data: bytes, kind: type) -> None:
    with pytest.raises(wire.Malformed):
        wire.decode(data, kind)


def test_mutated_frames_raise_nothing_else() -> None:
    rng = random.Random(0)
    kinds = {b"\x00": wire.Add, b"\x01": list[str], b"\x03": wire.Call}
    good = 0
    for _ in range(10_000):
        frame = mutated(rng)
        if frame[0] not in kinds or len(frame) < 2:
            continue
        try:
            found = wire.decode(frame[1], kinds[frame[0]])
            if isinstance(found, wire.Add) and found.sampling_params is not None:
                wire_params.check_served(found)
                wire_params.to_params(found.sampling_params, 9, LIMITS)
        except (wire.Malformed, InvalidRequest):
            continue
        good += 1
    assert 1_000 < good < 9_000
    assert all(wire.decode(payload, kinds[kind]) is not None for kind, payload in (frames(rng) for _ in range(500)))


def test_a_small_frame_does_not_become_large_objects() -> None:
    """Pins that fields which are not served are skipped: as objects a million empty arrays take 64 MB."""
    import tracemalloc

    frame = b"\x96\xa1a\x91\x01\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000 + b"\x80\xc0\xc0"
    tracemalloc.start()
    request = wire.decode(frame, wire.Add)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20 and wire.given(request.mm_features)


def test_bias_that_is_too_large_or_no_map() -> None:
    for raw in (msgspec.Raw(b"\x81\xa1a\x01"), msgspec.Raw(msgspec.msgpack.encode(dict.fromkeys(range(20_000), 1.0)))):
        with pytest.raises(InvalidRequest, match="logit_bias"):
            wire_params.to_params(wire.Sampling(logit_bias=raw), 9, LIMITS)
    bias = wire_params.to_params(
        wire.Sampling(logit_bias=msgspec.Raw(b"\x81\x05\xca\x7f\x80\x00\x00")), 9, LIMITS
    ).logit_bias
    assert bias == {5: math.inf}  # for the engine to refuse


def kv_hints(*actions: object) -> msgspec.Raw:
    """vLLM's envelope of `(type, payload)`, or of whole actions."""
    whole = [
        {"action_id": "a", "action_type": action[0], "action_version": "1.0", "payload": action[1]}
        if isinstance(action, tuple)
        else action
        for action in actions
    ]
    return msgspec.Raw(msgspec.msgpack.encode({"protocol_version": "0.1", "message_id": "m", "actions": whole}))


OURS = {"include_current_request": True, "block_hashes": ["11"], "execute_at": "request_completion"}


@pytest.mark.parametrize(
    ("action", "payload", "wanted"),
    [
        (
            "kv.retain",
            {"directives": [{"start": 0, "end": 7, "priority": 80, "duration": 9.0}]},
            ("retain", 7, 9.0, 80),
        ),
        ("kv.retain", {"directives": [{"end": 999, "priority": 1, "duration": 5}]}, ("retain", 20, 5.0, 1)),
        ("kv.retain", {"scope": None, "directives": [{"priority": 5}]}, ("pin", 20, None, 5)),
        ("kv.retain", {"directives": [{"start": 9, "end": 12, "priority": 0}]}, ("demote", 9, None, 0)),
        ("kv.retain", {"directives": [{"covers_output": True, "priority": 0}]}, ("demote", 20, None, 0)),
        ("kv.retain", OURS | {"priority": 3, "ttl_seconds": 2.5}, ("retain", 20, 2.5, 3)),
        ("kv.retain", OURS | {"priority": 0, "ttl_seconds": 2.5}, ("retain", 20, 2.5, 1)),
        ("kv.evict", OURS, ("demote", 0, None, 0)),
        ("kv.retain", {"directives": [{"covers_output": True, "priority": 9}]}, None),
        ("kv.retain", {"directives": [{"start": 25, "priority": 9}]}, None),
        ("kv.retain", {"directives": [{"start": 25, "priority": 0}]}, None),
        ("kv.retain", {"directives": [{"end": 5, "priority": -1}]}, None),
        ("kv.retain", {"directives": [{"end": 5, "priority": 1, "duration": 0}]}, None),
        ("kv.retain", {"directives": [{"end": 5, "priority": 1, "duration": float("inf")}]}, None),
        ("kv.retain", {"directives": [{"end": "5", "priority": 1}]}, None),
        ("kv.retain", {"block_hashes": ["11"], "ttl_seconds": 9.0}, None),
        ("kv.evict", {"block_hashes": ["11"]}, None),
        ("kv.fetch", OURS, None),
    ],
)
def test_kv_hints_of_a_request_s_own_tokens(
    action: str, payload: dict[str, object], wanted: tuple[str, int, float | None, int] | None
) -> None:
    found = wire_params.to_kv_hints(kv_hints((action, payload)), 20, 16)
    assert found == ([] if wanted is None else [CacheHint(*wanted)])


def test_kv_hints_are_advice() -> None:
    """Neither bad ones nor too many end a request, and good ones beside them apply."""
    evict = ("kv.evict", OURS)
    bad = [3, {"action_type": "kv.evict"}]
    for other in ("future", "0.9", "2.0", ""):
        later = {"action_type": "kv.evict", "action_version": other, "payload": OURS}
        assert wire_params.to_kv_hints(kv_hints(later, evict), 20, 16) == [CacheHint("demote", 0)]
    for whole in (kv_hints(*bad), wire.NIL, msgspec.Raw(b"\x81"), msgspec.Raw(b"\xa4what")):
        assert wire_params.to_kv_hints(whole, 20, 16) == []
    spoilt = ("kv.retain", {"directives": [{"priority": None}]})
    assert wire_params.to_kv_hints(kv_hints(spoilt, evict), 20, 16) == [CacheHint("demote", 0)]
    assert len(wire_params.to_kv_hints(kv_hints(*(50 * [evict])), 20, 3)) == 3
    assert wire_params.to_kv_hints(kv_hints(evict), 20, 0) == []
    huge = ("kv.evict", OURS | {"block_hashes": 200_000 * ["11111111"]})
    assert wire_params.to_kv_hints(kv_hints(huge), 20, 16) == []


def test_kv_hints_stand_where_vllm_puts_them() -> None:
    """After 20 fields and the session's id."""
    add = wire.Add("a", [1], kv_hints=kv_hints(("kv.evict", OURS)))
    array = msgspec.msgpack.decode(wire.encode(add))
    assert len(array) == 22 and array[20] is None and array[21]["actions"][0]["action_type"] == "kv.evict"
    assert wire_params.to_kv_hints(wire.decode(wire.encode(add), wire.Add).kv_hints, 1, 1) == [CacheHint("demote", 0)]
