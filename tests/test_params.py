"""Every field of `SamplingParams`: accepted up to its limits, refused one past them, and never another exception."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from radixgen import InvalidRequest, Limits, SamplingParams

VOCAB = 8
LIMITS = Limits()
NAN, INF = math.nan, math.inf
LARGE = 2**31 - 1
FIELDS = tuple(SamplingParams.__dataclass_fields__)

INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, LIMITS.max_n),
    "top_k": (-1, LARGE),
    "min_tokens": (0, 16),
    "max_tokens": (1, LARGE),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, LIMITS.max_logprobs),
    "prompt_logprobs": (0, LIMITS.max_logprobs),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e4),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (5e-324, 1e4),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
FLAGS = ("include_stop_str_in_output", "skip_special_tokens", "ignore_eos")
GRAMMARS = ("json_schema", "regex", "grammar", "choice", "response_format")
OPTIONAL = ("logit_bias", "seed", "logprobs", "prompt_logprobs", "reading", *GRAMMARS)

ODD: dict[str, Any] = {
    "-1": -1,
    "2**31": 2**31,
    "2**63": 2**63,
    "2**64": 2**64,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "-10**400": -(10**400),
    "0.5": 0.5,
    "NaN": NAN,
    "inf": INF,
    "-inf": -INF,
    "''": "",
    "'1'": "1",
    "b'1'": b"1",
    "None": None,
    "True": True,
    "[]": [],
    "[1]": [1],
    "()": (),
    "{}": {},
    "set()": set(),
    "object": object(),
    "1j": 1j,
    "int8": np.int8(1),
    "int64": np.int64(1),
    "uint64": np.uint64(2**63),
    "float16": np.float16(1),
    "float32": np.float32(1),
    "float64": np.float64(1),
    "float64 NaN": np.float64(NAN),
    "bool_": np.bool_(True),
    "str_": np.str_("x"),
    "array 0-d": np.array(1),
    "array 1-d": np.array([1]),
}
"""What callers of a dynamic language pass, by name."""

SEQUENCES = {"[]", "()"}
ACCEPTED: dict[str, set[str]] = {
    "n": set(),
    "temperature": {"0.5", "float64"},
    "top_p": {"0.5", "float64"},
    "top_k": {"-1"},
    "min_p": {"0.5", "float64"},
    "repetition_penalty": {"0.5", "float64"},
    "presence_penalty": {"-1", "0.5", "float64"},
    "frequency_penalty": {"-1", "0.5", "float64"},
    "logit_bias": {"None", "{}"},
    "stop": {"'1'", "str_", *SEQUENCES},
    "stop_token_ids": {"[1]", *SEQUENCES},
    "end_token_ids": {"[1]", *SEQUENCES},
    "include_stop_str_in_output": {"True"},
    "skip_special_tokens": {"True"},
    "ignore_eos": {"True"},
    "min_tokens": set(),
    "max_tokens": set(),
    "seed": {"2**31", "2**63", "None"},
    "logprobs": {"None"},
    "prompt_logprobs": {"None"},
    "json_schema": {"'1'", "str_", "{}", "None"},
    "regex": {"'1'", "str_", "None"},
    "grammar": {"'1'", "str_", "None"},
    "choice": {"None"},
    "response_format": {"None"},
    "reading": {"None"},
}
"""Of `ODD`, all that is taken; the rest is refused. NumPy's float64 and str_ are Python's own by inheritance."""


def validate(**fields: Any) -> None:
    SamplingParams(**fields).validate(LIMITS, VOCAB)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        validate(**fields)
    return caught.value


def check_refusal(error: InvalidRequest, field: str, value: object) -> None:
    """The message is field, value and limit, in bounded length."""
    assert field in error.field and error.limit
    assert str(error).startswith(f"{error.field}=") and str(error).endswith(f": {error.limit}")
    assert error.value is value or error.value == value or error.value != error.value
    assert len(str(error)) < 300


def test_the_tables_name_every_field() -> None:
    assert set(ACCEPTED) == set(FIELDS)
    others = {"logit_bias", "stop", "stop_token_ids", "end_token_ids", "reading"}
    assert {*INTEGERS, *NUMBERS, *FLAGS, *GRAMMARS, *others} == set(FIELDS)


def test_the_defaults_are_accepted() -> None:
    validate()


# -- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "span"), INTEGERS.items())
def test_integers_end_at_their_limits(field: str, span: tuple[int, int]) -> None:
    low, high = span
    for inside in (low, high):
        validate(**{field: inside})
    for outside in (low - 1, high + 1):
        error = refusal(**{field: outside})
        check_refusal(error, field, outside)
        assert str(low) in error.limit and str(high) in error.limit


@pytest.mark.parametrize(("field", "span"), NUMBERS.items())
def test_numbers_end_at_their_limits(field: str, span: tuple[float, float]) -> None:
    low, high = span
    for inside in (low, high, int(high)):
        validate(**{field: inside})
    for outside in (math.nextafter(low, -INF), math.nextafter(high, INF)):
        error = refusal(**{field: outside})
        check_refusal(error, field, outside)
        assert f"{high:g}" in error.limit


@pytest.mark.parametrize("field", ["top_p", "repetition_penalty"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_some_numbers_stay_above_zero(field: str, zero: float) -> None:
    check_refusal(refusal(**{field: zero}), field, zero)


def test_min_tokens_ends_at_max_tokens() -> None:
    validate(min_tokens=3, max_tokens=3)
    check_refusal(refusal(min_tokens=4, max_tokens=3), "min_tokens", 4)


def test_the_limits_are_the_engines_own() -> None:
    own = Limits(max_n=2, max_logprobs=0, max_stop=1, max_stop_len=1, max_stop_token_ids=1, max_logit_bias=1)
    fitting: dict[str, Any] = {"n": 2, "logprobs": 0, "stop": "x", "stop_token_ids": [1], "logit_bias": {1: 0.0}}
    SamplingParams(**fitting).validate(own, VOCAB)
    beyond: dict[str, Any] = {"n": 3, "logprobs": 1, "stop_token_ids": [1, 2], "logit_bias": {1: 0.0, 2: 0.0}}
    for field, value in [*beyond.items(), ("stop", "xy"), ("stop", ["x", "y"]), ("prompt_logprobs", 1)]:
        with pytest.raises(InvalidRequest, match=field):
            SamplingParams(**{field: value}).validate(own, VOCAB)


# -- odd values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_are_accepted_or_named(field: str, name: str) -> None:
    value = ODD[name]
    if name in ACCEPTED[field]:
        validate(**{field: value})
        return
    named = 1 if (field, name) in (("stop", "[1]"), ("choice", "[1]")) else value
    check_refusal(refusal(**{field: value}), field, named)


@pytest.mark.parametrize("field", FIELDS)
def test_none_is_for_what_may_be_absent(field: str) -> None:
    assert ("None" in ACCEPTED[field]) == (field in OPTIONAL)


def test_the_first_bad_field_is_named() -> None:
    assert refusal(temperature=-1, n=0).field == "n"


def test_a_long_value_is_shown_short() -> None:
    error = refusal(stop=["x" * 10_000])
    assert len(str(error)) < 200 and error.value == "x" * 10_000


# -- sequences and mappings -------------------------------------------------------------------------------


def test_stop_ends_at_its_limits() -> None:
    longest = "x" * LIMITS.max_stop_len
    for stop in (longest, [longest] * LIMITS.max_stop, ("a",), "\0", "é🙂"):
        validate(stop=stop)
    assert refusal(stop=["a"] * (LIMITS.max_stop + 1)).field == "len(stop)"
    for bad in ("", longest + "x", b"a", None, 1, ["a"]):
        check_refusal(refusal(stop=["a", bad]), "stop", bad)
    for bad in ({"a"}, {"a": 1}, iter("a"), b"a", bytearray(b"a")):
        check_refusal(refusal(stop=bad), "stop", bad)


def test_stop_token_ids_end_at_their_limits() -> None:
    most = LIMITS.max_stop_token_ids
    for ids in ([0, LARGE], (1,) * most, [1] * most):
        validate(stop_token_ids=ids)
    assert refusal(stop_token_ids=[1] * (most + 1)).field == "len(stop_token_ids)"
    for bad in (-1, LARGE + 1, 10**400, 1.0, NAN, True, None, "1", np.int64(1), [1]):
        check_refusal(refusal(stop_token_ids=[1, bad]), "stop_token_ids", bad)
    for bad in ("12", b"12", {1}, {1: 1}, range(2), iter([1]), np.array([1]), 1):
        check_refusal(refusal(stop_token_ids=bad), "stop_token_ids", bad)


class Halves(Mapping[int, float]):
    """Half of each token id, as nothing but a mapping."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, token: int) -> float:
        return token / 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))

    def __len__(self) -> int:
        return self.size


def test_logit_bias_ends_at_its_limits() -> None:
    for bias in ({0: -100, VOCAB - 1: 100.0}, MappingProxyType({1: 0}), Halves(VOCAB), {1: np.float64(1)}):
        validate(logit_bias=bias)
    for token in (-1, VOCAB, 2**63, 10**400, 10**5000, "1", 1.0, None, True, np.int64(1), (1,)):
        check_refusal(refusal(logit_bias={1: 0.0, token: 1.0} if token != 1 else {token: 1.0}), "logit_bias", token)
    for value in (100.5, -100.5, NAN, INF, -INF, 10**400, "1", None, True, [], np.float32(1)):
        error = refusal(logit_bias={3: value})
        check_refusal(error, "logit_bias[3]", value)
    for bad in ([(1, 1.0)], "1", {1}, 1, True, np.array([1.0])):
        check_refusal(refusal(logit_bias=bad), "logit_bias", bad)


def test_logit_bias_is_counted_before_it_is_read() -> None:
    most = LIMITS.max_logit_bias
    SamplingParams(logit_bias=dict.fromkeys(range(most), 1.0)).validate(LIMITS, most)
    error = refusal(logit_bias=Halves(2**62))
    assert error.field == "len(logit_bias)" and str(most) in error.limit


# -- grammars ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["json_schema", "regex", "grammar"])
def test_grammars_end_at_their_limits(field: str) -> None:
    most = LIMITS.max_grammar_chars
    for text in ("x", "x" * most):
        validate(**{field: text})
    for text in ("", "x" * (most + 1)):
        check_refusal(refusal(**{field: text}), field, text)


def test_choices_end_at_their_limits() -> None:
    most, longest = LIMITS.max_choices, LIMITS.max_grammar_chars
    for choice in (["a"], ("a", "b"), ["x" * (longest // most)] * most, ["x" * longest], ["a", "a"], ["\0", "é🙂"]):
        validate(choice=choice)
    assert refusal(choice=["a"] * (most + 1)).field == "len(choice)"
    check_refusal(refusal(choice=["x" * longest, "y"]), "choice", longest + 1)
    for bad in ("", "x" * (longest + 1), b"a", None, 1, ["a"]):
        check_refusal(refusal(choice=["a", bad]), "choice", bad)
    for bad in ("ab", {"a"}, {"a": 1}, iter("a"), [], ()):
        check_refusal(refusal(choice=bad), "choice", bad)


def test_schemas_that_are_no_json() -> None:
    itself: dict[str, Any] = {}
    itself["items"] = itself
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    for bad in ({"enum": {1}}, {"minimum": NAN}, {(1, 2): 3}, itself, deep):
        assert refusal(json_schema=bad).field == "json_schema"
    for fine in ({"type": "object"}, MappingProxyType({"items": MappingProxyType({})}), {"const": None}):
        validate(json_schema=fine)


def test_a_schema_is_written_no_further_than_it_may_be_long() -> None:
    """Shared parts: 60 objects that would be 2**60 in JSON."""
    shared: dict[str, Any] = {}
    for _ in range(60):
        shared = {"items": shared, "contains": shared}
    error = refusal(json_schema=shared)
    assert error.field == "json_schema" and str(LIMITS.max_grammar_chars) in error.limit


def test_at_most_one_grammar() -> None:
    given: dict[str, Any] = {
        "json_schema": {},
        "regex": "a",
        "grammar": 'start: "a"',
        "choice": ["a"],
        "response_format": {"type": "json_object"},
    }
    for first, second in zip(GRAMMARS, GRAMMARS[1:], strict=False):
        error = refusal(**{first: given[first], second: given[second]})
        assert error.field == second and first in error.limit
    validate(regex="a", response_format={"type": "text"})


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"type": "xml"},
        {"type": ["json_object"]},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": None},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": "{}"}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": {1}}}},
    ],
)
def test_response_formats_that_say_nothing(bad: dict[str, Any]) -> None:
    assert refusal(response_format=bad).field == "response_format"


def test_what_response_formats_ask_for() -> None:
    def text(response_format: dict[str, Any]) -> str | None:
        source = SamplingParams(response_format=response_format).grammar_source(LIMITS)
        return source.text if source else None

    asked = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "integer"}}}
    assert text(asked) == '{"type": "integer"}'
    assert text({"type": "json_object"}) == '{"type": "object"}'
    assert text({"type": "text"}) is None and not SamplingParams(response_format={"type": "text"}).structured


# -- what the fields mean ---------------------------------------------------------------------------------


def test_stop_strings() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def test_greedy_is_a_temperature_of_zero() -> None:
    assert all(SamplingParams(temperature=zero).greedy for zero in (0, 0.0, -0.0))
    assert not SamplingParams(temperature=5e-324).greedy


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {1: 0.0}},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
    ],
)
def test_shaped(fields: dict[str, Any]) -> None:
    assert SamplingParams(**fields).shaped
    assert not SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, logit_bias={}).shaped
