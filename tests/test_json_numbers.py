"""Numbers end, whatever a model prefers, and no text that a grammar needs is lost by it."""

import json
from typing import Any

import families
import numpy as np
import pytest
from texts import tokenizer

from radixgen import Limits, SamplingParams
from radixgen.sampling.json_numbers import MAX_DIGITS, NumberBounds, NumberState
from radixgen.sampling.structured import Grammars

TOKENIZER = tokenizer()
GRAMMARS = Grammars(TOKENIZER, families.VOCAB, Limits())
DIGITS = [TOKENIZER.convert_tokens_to_ids(str(digit)) for digit in range(9, -1, -1)]


def written(likes: list[int], **asked: Any) -> str:
    """What a model writes that takes the first token of `likes` that may follow; then any; the end if nothing may."""
    grammar = GRAMMARS.find(SamplingParams(**asked))
    assert grammar is not None
    state, tokens = grammar.start(), []
    while len(tokens) < 300:
        mask, accepts = state.allowed()
        open_to = [token for token in range(families.VOCAB) if mask[token // 32] >> (token % 32) & 1]
        liked = next((token for token in likes if token in open_to), None)
        if liked is None and (accepts or not open_to):
            return str(TOKENIZER.decode(tokens))
        tokens.append(open_to[0] if liked is None else liked)
        state.accept(tokens[-1])
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens)}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "integer", "minimum": 1},
        {"type": "number", "exclusiveMaximum": -5},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        {},
    ],
)
@pytest.mark.parametrize("first", ["", "-", ".", "e"])
def test_numbers_end(schema: dict[str, Any], first: str) -> None:
    likes = [TOKENIZER.convert_tokens_to_ids(one) for one in first] + DIGITS
    json.loads(written(likes, json_schema=schema))


def test_numbers_end_inside_a_lark_grammar() -> None:
    text = written(DIGITS, grammar='start: "n = " %json {"type": "integer"}')
    assert text == "n = " + "9" * MAX_DIGITS


def test_what_a_schema_needs_is_longer() -> None:
    """A constant of many digits, and digits in a string."""
    long = 10**24
    assert json.loads(written(DIGITS, json_schema={"const": long})) == long
    assert json.loads(written(DIGITS, json_schema={"type": "string", "pattern": "^9{40}$"})) == "9" * 40
    assert written(DIGITS, regex="[0-9]{40}") == "9" * 40


@pytest.mark.parametrize(
    ("text", "room"),
    [
        (b"", 20),
        (b"123", 17),
        (b"[12, 3", 19),
        (b"-0.25", 18),
        (b"1e", 3),
        (b"1e-", 3),
        (b"1E+12", 1),
        (b"true, 5", 19),
        (b'"12', 20),
        (b'"a\\"1", 22', 18),
        (b"9" * 30, 0),
    ],
)
def test_room(text: bytes, room: int) -> None:
    state = NumberState().after(text)
    assert (20 if state.in_string else state.room) == room
    for cut in range(len(text)):
        assert NumberState().after(text[:cut]).after(text[cut:]) == state


def test_tokens_of_several_digits() -> None:
    vocabulary = [b"1", b"22", b"333", b"a", b"", b".5", b"4,"]
    bounds = NumberBounds(vocabulary.__getitem__, len(vocabulary))
    whole = np.array([0b1111111], np.int32)
    for digits, expected in ((17, 0b1111111), (18, 0b1111011), (19, 0b1111001), (20, 0b0111000), (50, 0b0111000)):
        state = NumberState().after(b"9" * digits)
        assert bounds.bound(whole, state, accepts=False).tolist() == [expected], digits
    full, digit = NumberState().after(b"9" * 20), np.array([0b1], np.int32)
    assert bounds.bound(digit, full, accepts=False).tolist() == [1], "nothing else goes on"
    assert bounds.bound(digit, full, accepts=True).tolist() == [0], "the text may end"
    assert whole.tolist() == [0b1111111], "masks are shared and stay as they are"
