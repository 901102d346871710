"""Structured output: random weights that write valid JSON, masks by trial of every token, faults in their place."""

import asyncio
import gc
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from oracle import StampModel, expected_logits
from texts import tokenizer

from radixgen import AsyncEngine, CompletionOutput, Engine, InvalidRequest, Limits, SamplingParams
from radixgen.core import AllowedTokens, GrammarFailed, SamplingState
from radixgen.model import smollm2
from radixgen.sampling.sampler import fork_seed, sample, shape
from radixgen.sampling.structured import CompiledGrammar, Grammars, MatcherState

TOKENIZER = tokenizer()
VOCAB, END = families.VOCAB, families.VOCAB - 1
"""The end is a token that the tokenizer, of 104, knows nothing of."""
CONTEXT = 1024
SIZE = len(TOKENIZER)
GRAMMARS = Grammars(TOKENIZER, VOCAB, Limits())
PROMPT = [5, 6, 7]
NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "minItems": 1, "maxItems": 3},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "in": {"type": "boolean"}},
            "required": ["x", "in"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "tags", "at"],
    "additionalProperties": False,
}
SUM = 'start: term ("+" term)*\nterm: /[0-9]{1,3}/ | "(" start ")"'


def serve(slots: int = 8_000, *, vocab: int = VOCAB, limits: Limits | None = None, **options: Any) -> Engine:
    """An engine whose model checks every slot that it is told to read."""
    model = StampModel(vocab, CONTEXT, frozenset({END}))
    return Engine(model, tokenizer=TOKENIZER, kv_tokens=slots, debug=True, limits=limits, **options)


def asking(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 400, "seed": 1} | fields))


def run(engine: Engine, *params: SamplingParams, prompt: Sequence[int] = PROMPT) -> list[list[CompletionOutput]]:
    outputs = engine.generate([list(prompt)] * len(params), list(params))
    engine.check()
    return [output.outputs for output in outputs]


def ids(outputs: Sequence[CompletionOutput]) -> list[list[int]]:
    return [one.token_ids for one in outputs]


def check_json(text: str, schema: Any) -> None:
    jsonschema.validate(json.loads(text), schema)


def is_sum(text: str) -> bool:
    while (inner := re.sub(r"\(\d{1,3}(\+\d{1,3})*\)", "0", text)) != text:
        text = inner
    return bool(re.fullmatch(r"\d{1,3}(\+\d{1,3})*", text))


# -- outputs parse ----------------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "schema": ({"json_schema": NESTED}, lambda text: check_json(text, NESTED)),
    "schema as text": ({"json_schema": json.dumps(NESTED)}, lambda text: check_json(text, NESTED)),
    "schema of a number": ({"json_schema": {"type": "integer"}}, int),
    "regex": ({"regex": r"([0-9]{2}-){2}[a-f]+x?"}, re.compile(r"([0-9]{2}-){2}[a-f]+x?").fullmatch),
    "lark": ({"grammar": SUM}, is_sum),
    "choice": ({"choice": ["yes", "yes, but", 'a "é"\\', "漢😀"]}, {"yes", "yes, but", 'a "é"\\', "漢😀"}.__contains__),
    "format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NESTED, "strict": True}}},
        lambda text: check_json(text, NESTED),
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_parse(kind: str, temperature: float) -> None:
    fields, check = KINDS[kind]
    with serve() as engine:
        for one in run(engine, asking(n=4, temperature=temperature, **fields))[0]:
            assert one.finish_reason == "stop" and one.stop_reason is None
            assert check(one.text) is not False and one.text == engine.decode([t for t in one.token_ids if t != END])


def test_a_transformer_with_random_weights_writes_json() -> None:
    model = families.build("llama")
    with Engine(model, tokenizer=TOKENIZER, kv_tokens=4_000, debug=True) as engine:
        for one in run(engine, asking(n=4, json_schema=NESTED, max_tokens=240))[0]:
            check_json(one.text, NESTED)


def test_smollm2_answers_in_json() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "sunny": {"type": "boolean"}},
        "required": ["city", "sunny"],
        "additionalProperties": False,
    }
    chat = [{"role": "user", "content": "Is it sunny in Paris? Answer in JSON."}]
    with Engine(smollm2.fetch(), dtype="float32", kv_tokens=512, debug=True) as engine:
        one = engine.chat(chat, SamplingParams(json_schema=schema, max_tokens=60, temperature=0.0))[0].outputs[0]
        assert one.finish_reason == "stop"
        check_json(one.text, schema)
        words = ["Paris", "Rome", "a river"]
        answers = engine.generate(["The capital of France is", "The capital of Italy is"], asking(choice=words, n=8))
        assert {one.text for output in answers for one in output.outputs} <= set(words)
        engine.check()


def test_any_object() -> None:
    """OpenAI's `json_object` bounds nothing: what is cut is cut by length, and what is not cut parses."""
    with serve(60_000) as engine:
        asked = asking(response_format={"type": "json_object"}, n=32, max_tokens=200)
        ends = [(one.finish_reason, one.text) for one in run(engine, asked)[0]]
        assert {reason for reason, _ in ends} == {"stop", "length"}
        assert all(isinstance(json.loads(text), dict) for reason, text in ends if reason == "stop")


def schemas() -> st.SearchStrategy[Any]:
    """Small ones, every text of which is short."""
    names = st.text("abé", min_size=1, max_size=2)
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": "k"}, {"type": "number", "multipleOf": 10}]),
        st.lists(st.one_of(names, st.integers(-99, 99), st.none()), min_size=1, max_size=3).map(lambda v: {"enum": v}),
        st.tuples(st.integers(-99, 0), st.integers(1, 99)).map(
            lambda v: {"type": "integer", "minimum": v[0], "exclusiveMaximum": v[1]}
        ),
        st.integers(0, 5).map(lambda most: {"type": "string", "maxLength": most}),
        st.sampled_from(["^[ab]{1,4}$", "^x(yz?){2}$"]).map(lambda p: {"type": "string", "pattern": p}),
    )

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        arrays = st.tuples(inner, st.integers(0, 2)).map(
            lambda v: {"type": "array", "items": v[0], "minItems": v[1], "maxItems": 2}
        )
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda found: (
                st.lists(st.sampled_from(sorted(found)), unique=True).map(
                    lambda required: {
                        "type": "object",
                        "properties": found,
                        "required": required,
                        "additionalProperties": False,
                    }
                )
                if found
                else st.just({"type": "object", "additionalProperties": False})
            )
        )
        return st.one_of(arrays, objects, st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))

    return st.recursive(leaves, grow, max_leaves=4)


@pytest.fixture(scope="module")
def engine() -> Any:
    with serve(20_000) as engine:
        yield engine


@settings(max_examples=40, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_any_schema_is_kept_to(engine: Engine, schema: Any, seed: int) -> None:
    for one in run(engine, asking(json_schema=schema, n=3, seed=seed, max_tokens=900, temperature=2.0))[0]:
        assert one.finish_reason == "stop"
        check_json(one.text, schema)


# -- the twin ---------------------------------------------------------------------------------------------


class Tried:
    """A `GrammarState` that tries every token."""

    def __init__(self, grammar: str, tokens: Sequence[int] = ()) -> None:
        self._at = LLMatcher(GRAMMARS._tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        self._at.consume_tokens(list(tokens))
        self._found: AllowedTokens | None = None

    @property
    def complete(self) -> bool:
        return self.allowed().accepts and not self.allowed().mask.any()

    def allowed(self) -> AllowedTokens:
        if self._found is None:
            flags = np.array([self.allows(token) for token in range(VOCAB)])
            self._found = AllowedTokens(np.packbits(flags, bitorder="little").view(np.int32), self._at.is_accepting())
        return self._found

    def allows(self, token: int) -> bool:
        return token < SIZE and self._at.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        assert self._at.consume_token(token)
        self._found = None

    def fork(self) -> "Tried":
        raise NotImplementedError


def plain(params: SamplingParams, grammar: str, *, seed: int, index: int = 0, before: Sequence[int] = ()) -> list[int]:
    """One sequence by the plainest loop: no engine, no tree, no mask."""
    tried = Tried(grammar, before)
    ends = frozenset() if params.ignore_eos else frozenset({END})
    state = SamplingState(params, seed, index, np.array(PROMPT, np.int32), list(before), ends, tried)
    while len(state.output) < params.max_tokens and not tried.complete:
        logits = torch.from_numpy(expected_logits([*PROMPT, *state.output], VOCAB))[None]
        token = sample(logits, [0], [state]).tokens[0]
        state.output.append(token)
        if token in ends:
            break
        tried.accept(token)
    return state.output


TWINS = {
    "regex": ({"regex": "[ab]{2,30}(cd|c[ef])?"}, LLMatcher.grammar_from_regex("[ab]{2,30}(cd|c[ef])?")),
    "lark": ({"grammar": SUM}, LLMatcher.grammar_from_lark(SUM)),
    "schema": (
        {"json_schema": {"enum": ["abc", "abd", [1, {"a": 2}], 12, 123]}},
        LLMatcher.grammar_from_json_schema(
            {"enum": ["abc", "abd", [1, {"a": 2}], 12, 123]}, defaults={"whitespace_pattern": r"[ \n\r\t]{1,16}"}
        ),
    ),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.5, "top_k": 7, "min_p": 0.01},
    "shaped": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "logit_bias": {64: 3.0, 65: -100.0, 16: 2.5},
        "min_tokens": 4,
    },
    "without end": {"ignore_eos": True, "temperature": 1.0, "max_tokens": 12},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TWINS)
def test_a_mask_is_a_trial_of_every_token(kind: str, way: str) -> None:
    fields, grammar = TWINS[kind]
    params = asking(n=3, **({"max_tokens": 25} | WAYS[way] | fields))
    with serve() as engine:
        found = ids(run(engine, params)[0])
    assert found == [plain(params, grammar, seed=1, index=index) for index in range(3)]


@pytest.mark.parametrize("at", [0, 3, 9])
def test_forks_go_on_in_the_grammar(at: int) -> None:
    """As the plain loop from the same tokens, with the seeds of forks; the origin is not disturbed."""
    fields, grammar = TWINS["lark"]
    params = asking(max_tokens=25, ignore_eos=True, **fields)
    whole = plain(params, grammar, seed=1)
    with serve() as engine:
        origin = engine.submit(PROMPT, params)
        for _ in range(at):
            engine.step()
        forks = engine.fork(origin, 4)
        found = {}
        while engine.has_unfinished:
            found |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
            engine.check()
    assert found[origin] == whole
    for number, fork in enumerate(forks, 1):
        assert found[fork] == plain(params, grammar, seed=fork_seed(1, number), before=whole[:at])


# -- however it is served ---------------------------------------------------------------------------------

MIXED = [
    asking(json_schema=NESTED, n=8, max_tokens=60),
    asking(regex="[a-d]{5,40}", n=8, seed=2, max_tokens=60),
    asking(max_tokens=30, seed=3),
    asking(choice=["abcabcabc", "abcabcabd", "b"], n=8, temperature=0.0, max_tokens=60),
    asking(grammar=SUM, n=2, seed=5, max_tokens=40, logprobs=2),
    asking(json_schema=NESTED, seed=6, max_tokens=50, stop=['"'], include_stop_str_in_output=True),
]


@pytest.fixture(scope="module")
def alone() -> list[list[CompletionOutput]]:
    """Each of `MIXED` in an engine of its own, nothing shared, nothing begun ahead."""
    found = []
    for params in MIXED:
        with serve(share=False, async_scheduling=False) as engine:
            found += run(engine, params)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"slots": 250}, {"slots": 120, "max_step_tokens": 3}, {"share": False}, {"async_scheduling": False}],
    ids=str,
)
def test_a_batch_is_each_alone(options: dict[str, Any], alone: list[list[CompletionOutput]]) -> None:
    with serve(**options) as engine:
        assert run(engine, *MIXED) == alone
        assert run(engine, *MIXED) == alone, "cached"
        stats = engine.stats()
        assert stats.preemptions > 0 or "slots" not in options
        assert stats.cached_prompt_tokens > 0 or not options.get("share", True)


def test_steps_are_begun_before_their_tokens_are_known() -> None:
    with serve() as engine:
        run(engine, asking(regex="[ab]{200}"), asking(regex="[cd]{200}"))
        assert engine._core.model.rows_ahead > 300


def test_log_probabilities_are_the_models_own() -> None:
    with serve() as engine:
        one = run(engine, asking(regex="[ab]{20}", logprobs=0))[0][0]
    for at, found in enumerate(one.logprobs or []):
        logits = torch.from_numpy(expected_logits([*PROMPT, *one.token_ids[:at]], VOCAB))
        token = one.token_ids[at]
        assert found[token] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


# -- where it ends ----------------------------------------------------------------------------------------


def test_ends_are_allowed_where_the_text_is_whole() -> None:
    with serve() as engine:
        for one in run(engine, asking(regex="(ab){2,}", n=64, logit_bias={END: 3.0}))[0]:
            assert one.finish_reason == "stop" and one.token_ids[-1] == END
            assert re.fullmatch("(ab){2,}", one.text)
        assert len({len(one.text) for one in run(engine, asking(regex="(ab){2,}", n=64))[0]}) > 5


def test_a_text_that_cannot_be_longer_ends_with_its_last_token() -> None:
    with serve() as engine:
        steps = engine.num_steps
        one = run(engine, asking(choice=["abc"]))[0][0]
        assert (one.text, len(one.token_ids), one.finish_reason) == ("abc", 3, "stop")
        assert engine.num_steps - steps == 3
        assert run(engine, asking(choice=["abc"], max_tokens=3))[0][0].finish_reason == "stop"


def test_a_text_that_is_seen_late_to_be_whole() -> None:
    """No token of the tokenizer is the byte that could follow: only the mask tells."""
    with serve() as engine:
        ended, forever = run(engine, asking(regex="ab\\x7f?"), asking(regex="ab\\x7f?", ignore_eos=True, logprobs=1))
    assert (ended[0].text, ended[0].token_ids[2:], ended[0].finish_reason) == ("ab", [END], "stop")
    assert (forever[0].text, len(forever[0].token_ids), forever[0].finish_reason) == ("ab", 2, "stop")
    assert len(forever[0].logprobs or []) == 2


def test_length_cuts_and_says_so() -> None:
    with serve() as engine:
        for one in run(engine, asking(json_schema=NESTED, max_tokens=9, n=4))[0]:
            assert one.finish_reason == "length" and len(one.token_ids) == 9


def test_min_tokens_holds_ends_back_as_long_as_the_grammar_goes_on() -> None:
    with serve() as engine:
        for one in run(engine, asking(regex="a+", n=16, min_tokens=20))[0]:
            assert len(one.text) >= 20
        for least in (1, 3, 50):
            found = run(engine, asking(regex="ab?", n=16, min_tokens=least))[0]
            assert {one.finish_reason for one in found} == {"stop"}
            assert {one.text for one in found} == ({"a", "ab"} if least == 1 else {"ab"})


def test_an_end_before_min_tokens_where_there_is_nothing_else() -> None:
    """`b` is text and a stop token; before `min_tokens` it is drawn only where nothing is left, and then it is text."""
    b = TOKENIZER("b")["input_ids"]
    with serve() as engine:
        for one in run(engine, asking(regex="ab?", n=16, min_tokens=30, stop_token_ids=b))[0]:
            assert one.finish_reason == "stop" and one.text in ("a", "ab")


def test_without_an_end_token_a_grammar_ends_by_itself() -> None:
    with serve() as engine:
        for one in run(engine, asking(regex="a{2,9}", n=4, ignore_eos=True), asking(regex="a+", ignore_eos=True))[0]:
            assert (one.text, one.finish_reason) == ("a" * 9, "stop")
        one = run(engine, asking(regex="a+", ignore_eos=True, max_tokens=30))[0][0]
        assert (one.text, one.finish_reason) == ("a" * 30, "length")


def test_stop_tokens_end_a_whole_text_too() -> None:
    """One that is no text of the grammar is allowed where the end is."""
    stop = VOCAB - 2
    with serve() as engine:
        asked = asking(regex="(ab)+", n=16, ignore_eos=True, stop_token_ids=[stop], logit_bias={stop: 2.0})
        for one in run(engine, asked)[0]:
            assert (one.finish_reason, one.stop_reason) == ("stop", stop)
            assert re.fullmatch("(ab)+", one.text)


def test_stop_strings_still_cut() -> None:
    with serve() as engine:
        one = run(engine, asking(regex="[ab]{300}", stop="ab"))[0][0]
        assert (one.finish_reason, one.stop_reason) == ("stop", "ab") and "ab" not in one.text


def test_white_space_in_json_is_bounded() -> None:
    """A model that likes nothing better gets out of it again."""
    space = TOKENIZER(" ")["input_ids"][0]
    with serve() as engine:
        one = run(engine, asking(json_schema=NESTED, logit_bias={space: 50.0}, max_tokens=900))[0][0]
        check_json(one.text, NESTED)
        assert " " * 16 in one.text and one.finish_reason == "stop"
        dense = NESTED | {"x-guidance": {"whitespace_flexible": False}}
        one = run(engine, asking(json_schema=dense, logit_bias={space: 50.0}))[0][0]
        check_json(one.text, NESTED)
        assert one.text == json.dumps(json.loads(one.text), separators=(",", ":"), ensure_ascii=False)


# -- once -------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry a mask that is computed."""
    found: list[object] = []
    read = CompiledGrammar.read
    monkeypatch.setattr(CompiledGrammar, "read", lambda self, matcher: (found.append(self), read(self, matcher))[1])
    return found


def test_a_mask_is_computed_once_for_all_that_stand_alike(reads: list[object]) -> None:
    with serve() as engine:
        params = asking(regex="[ab]{30}", temperature=0.0, n=8)
        run(engine, params, params)
        assert len(reads) == 30
        run(engine, params, prompt=[9, 9])
        assert len(reads) == 30 + 29, "the first is kept with the grammar"


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = Grammars._compile
    monkeypatch.setattr(
        Grammars, "_compile", lambda self, kind, text: (compiled.append(text), compile_(self, kind, text))[1]
    )
    with serve(limits=Limits(max_grammars=2)) as engine:
        run(engine, asking(regex="a"), asking(regex="a", n=4), asking(json_schema={}), asking(json_schema="{}"))
        assert compiled == ["a", "{}"]
        engine.compile_grammar(asking(regex="b"))
        run(engine, asking(regex="b"))
        assert compiled == ["a", "{}", "b"]
        gc.collect()
        run(engine, asking(regex="a"))
        assert compiled == ["a", "{}", "b", "a"], "no more than two are kept"


def test_masks_of_any_width() -> None:
    """Of packed words, only the bits of the model's own tokens count, and of wider logits nothing else is left."""

    class Fixed:
        def __init__(self, flags: np.ndarray) -> None:
            words = np.zeros(-(-flags.size // 32) * 32, np.bool_)
            words[: flags.size] = flags
            self.found = AllowedTokens(np.packbits(words, bitorder="little").view(np.int32), accepts=False)

        def allowed(self) -> AllowedTokens:
            return self.found

    rng = np.random.default_rng(0)
    for width in (1, 31, 32, 33, 64, 100):
        flags = rng.random(width) < 0.5
        flags[rng.integers(width)] = True
        state = SamplingState(SamplingParams(), 0, 0, np.zeros(1, np.int32), [], frozenset(), Fixed(flags))
        other = SamplingState(SamplingParams(), 0, 0, np.zeros(1, np.int32), [], frozenset())
        for wider in (0, 1, 40):
            scores = torch.zeros(3, width + wider, dtype=torch.float64)
            shape(scores, [other, state, other])
            assert scores[1, :width].isfinite().tolist() == flags.tolist()
            assert not scores[1, width:].isfinite().any() and scores[[0, 2]].isfinite().all()


# -- faults -----------------------------------------------------------------------------------------------


def bystanders(engine: Engine, bad: SamplingParams) -> CompletionOutput:
    """Serve `bad` among others; they give what they give alone. Its own output."""
    others = [asking(regex="[ab]{30}"), asking(max_tokens=30)]
    with serve() as undisturbed:
        expected = run(undisturbed, *others)
    found = run(engine, others[0], bad, others[1])
    assert [found[0], found[2]] == expected
    return found[1][0]


def test_a_dead_end_ends_its_own_request() -> None:
    """After `ab` a byte must come that no token is."""
    with serve() as engine:
        one = bystanders(engine, asking(regex="ab\\x01"))
    assert (one.finish_reason, one.text) == ("error", "ab") and "no token" in str(one.stop_reason)


def test_a_mask_that_costs_too_much_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance's own limit, of Earley items here."""
    with serve() as engine:
        engine.inputs._grammars._parser_limits = LLParserLimits(step_max_items=60, verbose_errors=False)
        one = bystanders(engine, asking(grammar='start: start start | start start start | "a" | "b"', ignore_eos=True))
    assert one.finish_reason == "error" and "Too many items" in str(one.stop_reason)
    assert 0 < len(one.token_ids) < 20


@pytest.mark.parametrize("method", ["accept", "allowed", "allows"])
def test_an_exception_in_a_grammar_ends_its_own_request(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(MatcherState, method)
    bad: list[object] = []

    def fail(self: MatcherState, *arguments: Any) -> Any:
        if self._grammar in bad:
            raise RuntimeError("planted")
        return own(self, *arguments)

    with serve() as engine:
        params = asking(regex="z+", stop_token_ids=TOKENIZER("z")["input_ids"], min_tokens=5)
        bad.append(engine.inputs.grammar(params))
        monkeypatch.setattr(MatcherState, method, fail)
        one = bystanders(engine, params)
    assert (one.finish_reason, one.text) == ("error", "") and "planted" in str(one.stop_reason)


def test_a_token_that_the_grammar_refuses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a mask wrong, no output would be."""
    monkeypatch.setattr(
        CompiledGrammar, "read", lambda self, matcher: AllowedTokens(np.full(VOCAB // 32, -1, np.int32), accepts=False)
    )
    with serve() as engine:
        one = run(engine, asking(choice=["abcdefgh"]))[0][0]
    assert one.finish_reason == "error" and "abcdefgh".startswith(one.text) and "satisfy" in str(one.stop_reason)


def test_a_model_with_fewer_tokens_than_its_tokenizer() -> None:
    """What it cannot write is refused, or ends with `error`."""
    a, z = (TOKENIZER(letter)["input_ids"][0] for letter in "az")
    with serve(vocab=a + 1) as engine:
        with pytest.raises(InvalidRequest, match="no token of the model"):
            engine.submit(PROMPT, asking(regex="z"))
        assert a < z and run(engine, asking(regex="[az]{5}"))[0][0].text == "aaaaa"
        one = run(engine, asking(regex="az"))[0][0]
        assert (one.finish_reason, one.text) == ("error", "a")


def test_a_state_is_moved_by_what_it_allows_only() -> None:
    grammar = GRAMMARS.find(asking(regex="ab"))
    assert grammar is not None
    a, b = (TOKENIZER(letter)["input_ids"][0] for letter in "ab")
    first = grammar.start()
    assert first.allows(a) and not first.allows(b) and not first.complete and not first.allowed().accepts
    first.accept(a)
    second = first.fork()
    assert second.allowed() is first.allowed()
    second.accept(b)
    assert second.complete and second.allowed().accepts and not second.allowed().mask.any()
    assert not first.complete and not first.allowed().accepts
    with pytest.raises(GrammarFailed):
        first.accept(a)


# -- coroutines -------------------------------------------------------------------------------------------


def test_coroutines() -> None:
    async def main() -> None:
        async with AsyncEngine(serve()) as engine:

            async def text(params: SamplingParams) -> str:
                return "".join([delta.outputs[0].text async for delta in engine.generate(PROMPT, params)])

            found = await asyncio.gather(*(text(asking(json_schema=NESTED, seed=seed)) for seed in range(6)))
            for one in found:
                check_json(one, NESTED)
            for bad in (asking(regex="("), asking(response_format="json"), 5):
                with pytest.raises(InvalidRequest):
                    await text(bad)  # type: ignore[arg-type]
            await engine.check()

    asyncio.run(main())


def test_a_grammar_is_compiled_once_for_all_who_ask_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays while anybody holds it, however many others came since."""
    compiled: list[str] = []
    compile_ = Grammars._compile
    all_ask = threading.Barrier(4)

    def slowly(self: Grammars, kind: Any, text: str) -> Any:
        compiled.append(text)
        return compile_(self, kind, text)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    grammars = Grammars(TOKENIZER, VOCAB, Limits(max_grammars=1))

    def find() -> Any:
        all_ask.wait()
        return grammars.find(SamplingParams(regex="ab"))

    with ThreadPoolExecutor(4) as pool:
        found = [one.result() for one in [pool.submit(find) for _ in range(4)]]
    assert len({id(one) for one in found}) == 1 and compiled == ["ab"]
    grammars.find(SamplingParams(regex="b"))
    assert grammars.find(SamplingParams(regex="ab")) is found[0] and compiled == ["ab", "b"]
