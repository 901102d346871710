"""Bad input from every side: a named error, nothing queued, and a running request that never notices."""

import math
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from names import name_of
from oracle import StampModel
from texts import tokenizer

from radixgen import (
    BeamSearchParams,
    DuplicateRequest,
    Engine,
    EngineClosed,
    InvalidRequest,
    Limits,
    ModelNotFound,
    PromptTooLong,
    RadixgenError,
    SamplingParams,
    UnknownRequest,
    UnsupportedModel,
)

VOCAB, CONTEXT, SLOTS = 8, 64, 128
LIMITS = Limits(max_num_seqs=100)
PROMPT = [1, 2, 3]
RUNNING = SamplingParams(seed=3, max_tokens=6, logprobs=2)
NAN, INF = math.nan, math.inf
HUGE = 10**5000
"""Python refuses to print it."""

Use = Callable[[Engine], object]


def short(value: object) -> str:
    """A name for a test; `HUGE` has no text."""
    return "10**5000" if value is HUGE else str(value)[:20]


def serve(**options: Any) -> Engine:
    return Engine(StampModel(VOCAB, CONTEXT), kv_tokens=SLOTS, limits=LIMITS, debug=True, **options)


def finish(engine: Engine) -> dict[str, object]:
    """The last output of everything that is queued."""
    ended: dict[str, object] = {}
    while engine.has_unfinished:
        ended |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check()
    return ended


@cache
def undisturbed() -> object:
    """What the running request gives where nobody else is there."""
    with serve() as engine:
        engine.submit(PROMPT, RUNNING, request_id="running")
        return finish(engine)["running"]


@contextmanager
def busy(engine: Engine) -> Iterator[Engine]:
    """One request runs meanwhile; in the end nothing else was queued, counted or kept, and its output is its own."""
    with engine:
        engine.submit(PROMPT, RUNNING, request_id="running")
        engine.step()
        before = engine.stats()
        yield engine
        engine.check()
        assert engine.stats() == before
        ended = finish(engine)
        assert list(ended) == ["running"]
        if engine.tokenizer is None:
            assert ended == {"running": undisturbed()}


def check_refusal(use: Use, field: str, kind: type[InvalidRequest] = InvalidRequest, **options: Any) -> InvalidRequest:
    """Two refusals of the same: the first one left nothing behind."""
    with busy(serve(**options)) as engine:
        for _ in range(2):
            with pytest.raises(InvalidRequest) as caught:
                use(engine)
            error = caught.value
            assert type(error) is kind and error.field.startswith(field) and error.limit
            assert str(error).startswith(f"{error.field}=") and len(str(error)) < 300
    return error


def names(cases: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases.items()])


# -- prompts ----------------------------------------------------------------------------------------------


class Endless(Sequence[int]):
    """As many tokens as `len` may tell, of which nobody should read more than fit a context."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, place: Any) -> int:
        assert place <= CONTEXT, "read before it was measured"
        return 1


PROMPTS: dict[str, Any] = {
    "negative": [1, -1],
    "too large": [VOCAB],
    "2**31": [2**31],
    "2**63": [2**63],
    "2**64": [2**64],
    "10**5000": [HUGE],
    "-10**5000": [1, -HUGE],
    "fraction": [1, 1.0],
    "NaN": [1, NAN],
    "flag": [True],
    "absent": [None],
    "digits": ["1"],
    "bytes inside": [b"1"],
    "nested": [1, [2, 3]],
    "float32": [np.float32(1)],
    "numpy flag": [np.bool_(True)],
    "tensor inside": [torch.tensor(1)],
    "bytes": b"12",
    "bytearray": bytearray(b"12"),
    "memoryview": memoryview(b"12"),
    "None": None,
    "int": 5,
    "10**5000 itself": HUGE,
    "float": 1.5,
    "set": {1, 2},
    "dict": {1: 2},
    "iterator": iter([1]),
    "object": object(),
    "tensor": torch.tensor([1]),
    "array of floats": np.array([1.0]),
    "array of flags": np.array([True]),
    "array of text": np.array(["1"]),
    "array of objects": np.array([1], object),
    "array 0-d": np.array(1),
    "array 2-d": np.array([[1]]),
    "array too large": np.array([1, VOCAB]),
    "array negative": np.array([-1], np.int8),
    "array 2**63": np.array([2**63], np.uint64),
    "text": "without a tokenizer",
    "no text": "",
}
ENTRIES: dict[str, Callable[[Engine, Any], object]] = {
    "submit": lambda engine, prompt: engine.submit(prompt),
    "generate": lambda engine, prompt: engine.generate([[1], prompt]),
    "stream": lambda engine, prompt: engine.stream(prompt),
    "score": lambda engine, prompt: engine.score(prompt, [[1]]),
    "submit_score": lambda engine, prompt: engine.submit_score(prompt, [1]),
    "pin": lambda engine, prompt: engine.pin(prompt),
    "apply_hints": lambda engine, prompt: engine.apply_hints(prompt, []),
    "tokenize": lambda engine, prompt: engine.tokenize(prompt),
}
SERVED = tuple(ENTRIES)[:5]


@pytest.mark.parametrize("entry", ENTRIES)
@names(PROMPTS)
def test_bad_prompts(case: Any, entry: str) -> None:
    check_refusal(lambda engine: ENTRIES[entry](engine, case), "prompt")


ODD_TOKENS = [
    True,
    False,
    1.0,
    NAN,
    "1",
    b"1",
    None,
    [2],
    HUGE,
    torch.tensor(5),
    np.bool_(True),
    np.float32(2),
    VOCAB,
    -1,
]


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), st.sampled_from(ODD_TOKENS), st.data())
def test_one_odd_token_is_named_wherever_it_stands(tokens: list[Any], odd: Any, data: st.DataObject) -> None:
    inputs = serve().inputs
    place = data.draw(st.integers(0, len(tokens)))
    assert inputs.tokenize(tokens).tolist() == tokens
    assert inputs.tokenize([np.int32(tokens[0]), *tokens[1:]]).tolist() == tokens
    with pytest.raises(InvalidRequest) as caught:
        inputs.tokenize([*tokens[:place], odd, *tokens[place:]])
    assert caught.value.field == f"prompt[{place}]"


@pytest.mark.parametrize("entry", SERVED)
@pytest.mark.parametrize("empty", [[], (), np.array([], np.int64)], ids=repr)
def test_empty_prompts(empty: Any, entry: str) -> None:
    check_refusal(lambda engine: ENTRIES[entry](engine, empty), "prompt")


def test_of_nothing_nothing_is_pinned() -> None:
    with busy(serve()) as engine:
        assert engine.pin([]) is None and engine.tokenize([]).size == 0


@pytest.mark.parametrize("entry", SERVED)
def test_prompts_past_the_context(entry: str) -> None:
    error = check_refusal(lambda engine: ENTRIES[entry](engine, [1] * CONTEXT), "len(prompt)", PromptTooLong)
    assert str(CONTEXT) in error.limit


@pytest.mark.parametrize("entry", SERVED)
def test_a_prompt_is_measured_before_it_is_read(entry: str) -> None:
    check_refusal(lambda engine: ENTRIES[entry](engine, Endless()), "len(prompt)", PromptTooLong)


@pytest.mark.parametrize("entry", ["submit", "generate", "stream"])
def test_prompts_past_the_pool(entry: str) -> None:
    def use(engine: Engine) -> object:
        small = Engine(StampModel(VOCAB, 10**6), kv_tokens=20)
        try:
            return ENTRIES[entry](small, [1] * 6)
        finally:
            assert not small.has_unfinished

    error = check_refusal(use, "len(prompt) + max_tokens", PromptTooLong)
    assert error.value == 6 + 16 and "20 slots" in error.limit
    with Engine(StampModel(VOCAB, 10**6), kv_tokens=20, debug=True) as engine:
        assert len(engine.generate([1] * 5)[0].outputs[0].token_ids) == 16


def test_no_step_is_needed_to_refuse_an_endless_output() -> None:
    params = SamplingParams(max_tokens=2**31 - 1)
    with Engine(StampModel(VOCAB, 10**6), kv_tokens=SLOTS) as engine, pytest.raises(PromptTooLong, match="slots"):
        engine.submit([1], params)


@names(
    {
        "None": None,
        "int": 5,
        "10**5000": HUGE,
        "set": {1},
        "dict": {},
        "bytes": b"1",
        "iterator": iter([[1]]),
        "array 0-d": np.array(1),
        "array of floats": np.array([1.0]),
        "empty prompt": [[]],
        "two of three": [[1], [2], None],
        "text": "text",
    }
)
def test_bad_lists_of_prompts(case: Any) -> None:
    check_refusal(lambda engine: engine.generate(case), "prompt")


def test_prompts_of_any_sequence() -> None:
    """What the refusals above are not about."""
    good = [[1, 2], (1, 2), range(1, 3), deque([1, 2]), np.array([1, 2], np.uint8), [np.int64(1), np.uint8(2)]]
    with serve() as engine:
        assert len(engine.generate(good)) == len(good) and engine.generate([]) == []


# -- text -------------------------------------------------------------------------------------------------


def test_text_past_its_limit_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    model, limits = StampModel(families.VOCAB, CONTEXT), Limits(max_prompt_chars=10)
    with busy(Engine(model, tokenizer=words, kv_tokens=SLOTS, limits=limits, debug=True)) as engine:
        assert engine.tokenize("0123456789").size == 10
        monkeypatch.setattr(type(words), "__call__", lambda *_, **__: pytest.fail("tokenized"))
        for entry in ENTRIES.values():
            with pytest.raises(PromptTooLong, match=r"len\(prompt\)=11: at most 10 characters") as caught:
                entry(engine, "0123456789+")
            assert caught.value.value == 11 and caught.value.limit
        with pytest.raises(PromptTooLong, match=r"len\(continuations\)=11"):
            engine.score([1], ["0123456789+"])


def test_a_tokenizer_may_know_more_tokens_than_the_model() -> None:
    with busy(Engine(StampModel(VOCAB, CONTEXT), tokenizer=tokenizer(), kv_tokens=SLOTS, debug=True)) as engine:
        for entry in ENTRIES.values():
            with pytest.raises(InvalidRequest, match=rf"prompt\[0\]=\d+: must be from 0 to {VOCAB - 1}"):
                entry(engine, "z")


@pytest.mark.parametrize("stop", ["x", ["x"], ("x", "y")])
def test_stop_strings_need_a_tokenizer(stop: Any) -> None:
    error = check_refusal(lambda engine: engine.submit(PROMPT, SamplingParams(stop=stop)), "stop")
    assert "tokenizer" in error.limit


CONVERSATIONS: dict[str, Any] = {
    "None": None,
    "int": 5,
    "text": "hello",
    "one message": {"role": "user", "content": "hello"},
    "no message": [],
    "numbers": [5],
    "None inside": [None],
    "no role": [{"content": "hello"}],
    "content absent": [{"role": "user"}],
    "empty role": [{"role": "", "content": "hello"}],
    "set": {1},
    "iterator": iter([{"role": "user", "content": "hello"}]),
}


@names(CONVERSATIONS)
def test_conversations_need_a_template(case: Any) -> None:
    check_refusal(lambda engine: engine.chat(case), "messages")
    check_refusal(lambda engine: engine.chat_tokens(case), "messages")


@names({name: CONVERSATIONS[name] for name in ("None", "int", "text", "one message", "numbers", "no role", "set")})
def test_bad_conversations(case: Any) -> None:
    with busy(Engine(StampModel(families.VOCAB, CONTEXT), tokenizer=tokenizer(), kv_tokens=SLOTS)) as engine:
        with pytest.raises(InvalidRequest, match="messages") as caught:
            engine.chat(case)
        assert caught.value.field.startswith("messages") and caught.value.limit


# -- parameters and options of a request ------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["submit", "generate", "stream"])
@pytest.mark.parametrize("params", [{}, {"n": 1}, 5, "x", [1], SamplingParams, object()], ids=name_of)
def test_params_of_the_wrong_type(params: Any, entry: str) -> None:
    uses: dict[str, Use] = {
        "submit": lambda engine: engine.submit(PROMPT, params),
        "generate": lambda engine: engine.generate([PROMPT], params),
        "stream": lambda engine: engine.stream(PROMPT, params),
    }
    check_refusal(uses[entry], "params")


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_params_as_prompts(count: int) -> None:
    error = check_refusal(lambda engine: engine.generate(PROMPT, [SamplingParams()] * count), "len(params)")
    assert error.value == count


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 101), ("n", 10**9), ("n", HUGE), ("logprobs", 21), ("logprobs", 10**9), ("prompt_logprobs", HUGE)],
    ids=short,
)
@pytest.mark.parametrize("entry", ["submit", "generate", "stream"])
def test_absurd_numbers(field: str, value: int, entry: str) -> None:
    params = SamplingParams(**{field: value})
    uses: dict[str, Use] = {
        "submit": lambda engine: engine.submit(PROMPT, params),
        "generate": lambda engine: engine.generate([PROMPT, PROMPT], [SamplingParams(), params]),
        "stream": lambda engine: engine.stream(PROMPT, params),
    }
    check_refusal(uses[entry], field)


GRAMMARS: dict[str, dict[str, Any]] = {
    "schema of a type unknown": {"json_schema": {"type": "objekt"}},
    "schema cut short": {"json_schema": '{"type": '},
    "schema that is a list": {"json_schema": "[1]"},
    "schema that is false": {"json_schema": "false"},
    "schema of nothing": {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
    "schema with a bad pattern": {"json_schema": {"type": "string", "pattern": "("}},
    "schema that points nowhere": {"json_schema": {"$ref": "#/nowhere"}},
    "schema from elsewhere": {"json_schema": {"$ref": "http://example.com/schema"}},
    "schema too deep": {"json_schema": '{"items":' * 1_000 + "{}" + "}" * 1_000},
    "schema beyond the library": {"json_schema": {"type": "array", "uniqueItems": True}},
    "regex": {"regex": "("},
    "regex that looks ahead": {"regex": "(?=a)b"},
    "regex of nothing": {"regex": "[^\\s\\S]"},
    "regex of the empty text": {"regex": "(b{0})*"},
    "regex without tokens": {"regex": "\x01"},
    "grammar without names": {"grammar": "x"},
    "grammar of an unknown name": {"grammar": "start: nobody"},
    "grammar that nests": {"grammar": "start: " + "(" * 9_000 + '"a"' + ")" * 9_000},
    "response format": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}},
}


@names(GRAMMARS)
def test_bad_grammars(case: dict[str, Any]) -> None:
    """The library's own words; nothing is disturbed, and the next grammar is served."""
    model = StampModel(families.VOCAB, CONTEXT)
    with busy(Engine(model, tokenizer=tokenizer(), kv_tokens=SLOTS, debug=True)) as engine:
        for use in (
            lambda: engine.submit(PROMPT, SamplingParams(**case)),
            lambda: engine.generate([PROMPT, PROMPT], [SamplingParams(), SamplingParams(**case)]),
            lambda: engine.compile_grammar(SamplingParams(**case)),
        ):
            with pytest.raises(InvalidRequest) as caught:
                use()
            assert caught.value.field == next(iter(case)) and len(str(caught.value)) < 600
            assert "llguidance says: " in caught.value.limit and len(caught.value.limit) > 20
    with Engine(model, tokenizer=tokenizer(), kv_tokens=SLOTS, debug=True) as engine:
        assert engine.generate(PROMPT, SamplingParams(choice=["fine"]))[0].outputs[0].text == "fine"


@pytest.mark.parametrize(
    "fields",
    [{"json_schema": {}}, {"regex": "a"}, {"grammar": "x"}, {"choice": ["a"]}, {"response_format": {"type": "xml"}}],
    ids=str,
)
def test_grammars_need_a_tokenizer(fields: dict[str, Any]) -> None:
    error = check_refusal(lambda engine: engine.submit(PROMPT, SamplingParams(**fields)), next(iter(fields)))
    assert "tokenizer" in error.limit or "type" in error.limit


def test_grammars_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = Engine(StampModel(families.VOCAB, CONTEXT), tokenizer=tokenizer(), kv_tokens=SLOTS)
    says = r"regex='a': needs llguidance: pip install 'radixgen\[structured\]'"
    with busy(engine), pytest.raises(InvalidRequest, match=says):
        engine.submit(PROMPT, SamplingParams(regex="a"))


PRIORITIES = ["high", "", 1.0, True, None, 2**31, -(2**31) - 1, 2**64, HUGE, NAN, [], np.int64(1)]
NAMES = [5, True, b"a", ["a"], (), NAN, "x" * 257, "\0", "tenant\x003.0"]
SPANS = [0, -1, 0.0, -1e-9, NAN, INF, -INF, "", "1", True, [], 10**400, HUGE, 1j, np.float32(1), np.array([1.0])]
OPTIONS: dict[str, tuple[list[Any], dict[str, Callable[[Engine, Any], object]]]] = {
    "priority": (
        PRIORITIES,
        {
            "submit": lambda engine, value: engine.submit(PROMPT, priority=value),
            "pin": lambda engine, value: engine.pin(PROMPT, priority=value),
        },
    ),
    "namespace": (
        [None, *NAMES],
        {
            "submit": lambda engine, value: engine.submit(PROMPT, namespace=value),
            "score": lambda engine, value: engine.score(PROMPT, [[1], [2]], namespace=value),
            "submit_score": lambda engine, value: engine.submit_score(PROMPT, [1], namespace=value),
            "pin": lambda engine, value: engine.pin(PROMPT, namespace=value),
            "apply_hints": lambda engine, value: engine.apply_hints(PROMPT, [], namespace=value),
        },
    ),
    "request_id": (
        NAMES,
        {
            "submit": lambda engine, value: engine.submit(PROMPT, request_id=value),
            "submit_score": lambda engine, value: engine.submit_score(PROMPT, [1], request_id=value),
        },
    ),
    "timeout": (SPANS, {"submit": lambda engine, value: engine.submit(PROMPT, timeout=value)}),
    "ttl": (SPANS, {"pin": lambda engine, value: engine.pin(PROMPT, ttl=value)}),
    "output_kind": (
        ["all", "", None, 5, True, [], {}, ["final"]],
        {"submit": lambda engine, value: engine.submit(PROMPT, output_kind=value)},
    ),
}


@pytest.mark.parametrize(
    ("field", "entry"), [(field, entry) for field, (_, entries) in OPTIONS.items() for entry in entries]
)
def test_bad_options_of_a_request(field: str, entry: str) -> None:
    values, entries = OPTIONS[field]
    with busy(serve()) as engine:
        for value in values:
            with pytest.raises(InvalidRequest) as caught:
                entries[entry](engine, value)
            assert caught.value.field == field and caught.value.limit, value


def test_options_at_their_limits() -> None:
    with serve() as engine:
        engine.submit(PROMPT, priority=2**31 - 1, namespace="x" * 256, request_id="x" * 256, timeout=5e-324)
        engine.submit(PROMPT, priority=-(2**31), namespace="\x01", request_id="é", timeout=1e300)
        assert set(finish(engine)) == {"x" * 256, "é"}
        assert engine.pin(PROMPT, ttl=1e300) is None


# -- ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "submit", [Engine.submit, lambda engine, prompt, **ids: engine.submit_score(prompt, [1], **ids)]
)
def test_an_id_is_taken_until_its_last_output(submit: Callable[..., object]) -> None:
    check_refusal(lambda engine: submit(engine, PROMPT, request_id="running"), "request_id", DuplicateRequest)


def test_an_empty_id_is_an_id() -> None:
    with serve() as engine:
        assert engine.submit(PROMPT, request_id="") == ""
        with pytest.raises(DuplicateRequest):
            engine.submit(PROMPT, request_id="")


@pytest.mark.parametrize("name", ["nobody", "", None, 5, NAN, (), [], {}, b"running"], ids=repr)
@pytest.mark.parametrize("use", [Engine.cancel, Engine.fork])
def test_unknown_ids(name: Any, use: Callable[[Engine, Any], object]) -> None:
    check_refusal(lambda engine: use(engine, name), "request_id", UnknownRequest)


@pytest.mark.parametrize("n", [0, -1, 129, 2**63, HUGE, True, None, 1.0, NAN, "1", [], np.int64(1)], ids=short)
def test_bad_numbers_of_forks(n: Any) -> None:
    check_refusal(lambda engine: engine.fork("running", n), "n")


@pytest.mark.parametrize("pin", [0, 99, -1, HUGE, None, "1", NAN, (), [], {}], ids=short)
def test_unknown_pins_are_gone(pin: Any) -> None:
    with busy(serve()) as engine:
        assert engine.unpin(pin) is False


# -- scores -----------------------------------------------------------------------------------------------


@names(
    {
        "one empty": [[1], []],
        "too large": [[1], [1, VOCAB]],
        "negative": [[-1]],
        "fraction": [[1.5]],
        "None": None,
        "int": 5,
        "None inside": [[1], None],
        "number inside": [1.5],
        "set": {1},
        "text": "text",
        "texts": ["text"],
        "no text": [""],
        "bytes": b"1",
        "nested": [[[1]]],
        "array 0-d": np.array(1),
    }
)
def test_bad_continuations(case: Any) -> None:
    check_refusal(lambda engine: engine.score(PROMPT, case), "continuations")


def test_continuations_past_the_context() -> None:
    fits = CONTEXT - len(PROMPT)
    for use in (
        lambda engine: engine.score(PROMPT, [[1], [1] * (fits + 1)]),
        lambda engine: engine.submit_score(PROMPT, [1] * (fits + 1)),
    ):
        assert check_refusal(use, "len(prompt) + len(continuation)", PromptTooLong).value == CONTEXT + 1
    with serve() as engine:
        assert [len(found) for found in engine.score(PROMPT, [[1] * fits])] == [fits]
        assert engine.score(PROMPT, []) == []


def test_continuations_past_the_pool() -> None:
    with Engine(StampModel(VOCAB, CONTEXT), kv_tokens=10, debug=True) as engine:
        with pytest.raises(PromptTooLong, match=r"len\(prompt\) \+ len\(continuation\)=12: .*10 slots"):
            engine.score(PROMPT, [[1] * 8, [1] * 9])
        assert not engine.has_unfinished and len(engine.score(PROMPT, [[1] * 8])[0]) == 8


# -- the engine's own options -----------------------------------------------------------------------------

SIZES = [0, -1, 2**63, 2**64, HUGE, -HUGE, 1.0, NAN, INF, True, "1", "", [], {}, np.int64(1), np.array([1])]
TYPES = [5, 1.5, "", "magic", b"auto", [], {}, ("auto",), object()]
ENGINE: dict[str, list[Any]] = {
    "kv_tokens": SIZES,
    "max_step_tokens": SIZES,
    "max_model_len": SIZES,
    "seed": [None, -1, 2**64, HUGE, 1.0, NAN, INF, True, "1", [], np.int64(1)],
    "plan": [None, *TYPES],
    "dtype": [None, *TYPES, "int3", torch.int8, torch.float64],
    "device": [None, *TYPES, "cpu:-3", "cuda:-1", "mps", "meta"],
    "attention": [None, *TYPES],
}


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return families.build("llama")


@pytest.mark.parametrize("field", ENGINE)
@pytest.mark.parametrize("kind", ["stamp", "llama"])
def test_bad_engine_options(field: str, kind: str, llama: torch.nn.Module) -> None:
    model = llama if kind == "llama" else StampModel(VOCAB, CONTEXT)
    for value in ENGINE[field]:
        with pytest.raises(InvalidRequest) as caught:
            Engine(model, **({"kv_tokens": SLOTS} | {field: value}))
        assert caught.value.field == field and caught.value.limit and len(str(caught.value)) < 300


@pytest.mark.parametrize("slots", [2**40, 2**62])
@pytest.mark.parametrize("kind", ["stamp", "llama"])
def test_a_pool_past_the_memory(slots: int, kind: str, llama: torch.nn.Module) -> None:
    """Refused by name, and a borrowed model is given back as it was."""
    model = llama if kind == "llama" else StampModel(VOCAB, CONTEXT)
    before = llama.config._attn_implementation
    with pytest.raises(InvalidRequest, match="kv_tokens"):
        Engine(model, kv_tokens=slots)
    assert llama.config._attn_implementation == before


@pytest.mark.parametrize(
    "model", [None, 5, 1.5, b"smollm2", [], {}, object(), StampModel, torch.nn.Linear(1, 1)], ids=short
)
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(InvalidRequest, match="model") as caught:
        Engine(model, kv_tokens=SLOTS)
    assert caught.value.field == "model" and caught.value.limit


# -- model files ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, llama: torch.nn.Module) -> Path:
    llama.save_pretrained(tmp_path)
    return tmp_path


def check_unloadable(path: str | Path, kind: type[RadixgenError]) -> None:
    """The error names what was asked for."""
    with pytest.raises(RadixgenError) as caught:
        Engine(path, kv_tokens=SLOTS)
    assert type(caught.value) is kind and str(path)[:20] in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["/absent", "./absent", "absent.gguf/", "/" + "x" * 5000, "./" + "x" * 300, "~nosuchuser/model", "/with\0zero"],
    ids=short,
)
def test_paths_without_a_model(path: str) -> None:
    check_unloadable(path, ModelNotFound)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"\xff\xfe\0",
        b"[]",
        b"{}",
        b"null",
        b"5",
        b'{"model_type": "nosuch"}',
        b'{"model_type": 5}',
        b'{"model_type": "llama", "hidden_size": "x"}',
        b'{"model_type": "llama", "hidden_size": -4}',
        b'{"model_type": "llama", "num_attention_heads": 0}',
        b'{"model_type": "llama", "num_attention_heads": null}',
    ],
    ids=str,
)
def test_broken_configs(saved: Path, config: bytes) -> None:
    (saved / "config.json").write_bytes(config)
    check_unloadable(saved, ModelNotFound)


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        bytes(8),
        b"\xff" * 100,
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"{}",
    ],
    ids=["empty", "zeros", "ones", "long header", "null", "no tensors"],
)
def test_broken_safetensors(saved: Path, weights: bytes) -> None:
    """ "no tensors" pins that a checkpoint without its weights was served with random ones."""
    (saved / "model.safetensors").write_bytes(weights)
    check_unloadable(saved, UnsupportedModel)


def test_truncated_safetensors(saved: Path) -> None:
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    for kept in (7, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:kept])
        check_unloadable(saved, UnsupportedModel)


def test_a_shard_that_is_missing(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    check_unloadable(saved, UnsupportedModel)
    for index in ("{", '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'):
        (saved / "model.safetensors.index.json").write_text(index)
        check_unloadable(saved, UnsupportedModel)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("weights", [b"", b"garbage", b"\x80\x04.", b"PK\x03\x04"], ids=str)
def test_broken_pickles(saved: Path, weights: bytes) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(weights)
    check_unloadable(saved, UnsupportedModel)


def gguf(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"garbage!" * 10,
        gguf(1, 1)[:10],
        gguf(0, 0),
        gguf(1, 1),
        gguf(2**40, 2**40),
        gguf(0, 1, struct.pack("<Q", 2**60) + b"general"),
        gguf(0, 1, struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 6) + b"nosuch"),
        gguf(1, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77) + bytes(50)),
        gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<IQ", 8, 5) + b"llama"),
    ],
    ids=["empty", "x", "garbage", "header", "nothing", "no fields", "counts", "length", "family", "kind", "name"],
)
def test_broken_ggufs(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    check_unloadable(path, ModelNotFound)
    check_unloadable(tmp_path, ModelNotFound)


@pytest.mark.parametrize("name", ["t5", "mamba"])
def test_unsupported_families_on_disk(tmp_path: Path, name: str) -> None:
    families.build_unsupported()[name]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=name) as caught:
        Engine(tmp_path, kv_tokens=SLOTS)
    assert str(tmp_path) in str(caught.value)


# -- after close ------------------------------------------------------------------------------------------

CLOSED: dict[str, Use] = {
    "generate": lambda engine: engine.generate(PROMPT),
    "generate nothing": lambda engine: engine.generate([]),
    "beam_search": lambda engine: engine.beam_search(PROMPT, BeamSearchParams(beam_width=2)),
    "chat": lambda engine: engine.chat([{"role": "user", "content": "hello"}]),
    "score": lambda engine: engine.score(PROMPT, [[1]]),
    "stream": lambda engine: engine.stream(PROMPT),
    "submit": lambda engine: engine.submit(PROMPT),
    "submit bad": lambda engine: engine.submit(None),
    "submit_score": lambda engine: engine.submit_score(PROMPT, [1]),
    "step": lambda engine: engine.step(),
    "cancel": lambda engine: engine.cancel("running"),
    "fork": lambda engine: engine.fork("running"),
    "conversation": lambda engine: engine.conversation(),
    "preload": lambda engine: engine.preload(PROMPT),
    "warm_up": Engine.warm_up,
    "warm_up_steps": Engine.warm_up_steps,
    "profile": lambda engine: engine.profile("."),
    "pin": lambda engine: engine.pin(PROMPT),
    "apply_hints": lambda engine: engine.apply_hints(PROMPT, []),
    "unpin": lambda engine: engine.unpin(1),
    "reset_prefix_cache": lambda engine: engine.reset_prefix_cache(),
}
OPEN = {
    "chat_tokens",
    "check",
    "runs_on_gpu",
    "close",
    "compile_grammar",
    "decode",
    "explain_plan",
    "fetching",
    "has_unfinished",
    "inspect",
    "knows",
    "num_steps",
    "num_unfinished_requests",
    "pins",
    "stats",
    "tokenize",
}
"""What may still be asked of a closed engine."""


def test_the_tables_name_every_method() -> None:
    public = {name for name in dir(Engine) if not name.startswith("_")}
    assert public == {name.split()[0] for name in CLOSED} | OPEN


@pytest.mark.parametrize("use", CLOSED.values(), ids=CLOSED)
def test_use_after_close(use: Use) -> None:
    with serve() as engine:
        engine.submit(PROMPT, RUNNING, request_id="running")
        engine.step()
    for _ in range(2):
        with pytest.raises(EngineClosed):
            use(engine)
        engine.close()


def test_what_a_closed_engine_still_tells() -> None:
    with serve() as engine:
        engine.generate(PROMPT)
        engine.submit(PROMPT, RUNNING)
        engine.step()
    assert not engine.has_unfinished and engine.num_steps > 0
    assert engine.stats().kv_tokens_total == SLOTS and engine._core.tree is not None
    assert engine.decode([1, 2]) == "1 2" and engine.model_name == "stamp" and engine.explain_plan()
    assert engine.tokenize([1]).tolist() == [1]
    with pytest.raises(InvalidRequest, match="messages"):
        engine.chat_tokens([])
    engine.check()


def test_a_stream_of_a_closed_engine_ends_by_name() -> None:
    engine = serve()
    stream = engine.stream(PROMPT, RUNNING)
    next(stream)
    engine.close()
    with pytest.raises(EngineClosed):
        next(stream)
    stream.close()
