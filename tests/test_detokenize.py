"""Text as tokens come: whole characters only, and in the end all of it."""

import families
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from radixgen.detokenize import Detokenizer


@pytest.mark.parametrize("text", ["plain", "é and ü", "漢漢漢", "😀!😀", "a😀漢é z"])
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    tokenizer = texts.tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    stream, seen = Detokenizer(tokenizer, tokenizer("before")["input_ids"]), [""]
    for token in ids:
        stream.push(token)
        assert "\ufffd" not in stream.text
        assert stream.text.startswith(seen[-1])
        seen.append(stream.text)
    assert stream.text == text


def test_half_a_character_is_held_back() -> None:
    tokenizer = texts.tokenizer()
    stream = Detokenizer(tokenizer, [])
    for token in tokenizer("x😀")["input_ids"][:-1]:
        stream.push(token)
    assert stream.text == "x"


def test_a_prompt_may_end_in_half_a_character() -> None:
    """The text of the prompt's last tokens came out with the character's other half."""
    text, tokenizer = "abcdef 漢 gh😀 z", texts.tokenizer()
    ids = tokenizer(text)["input_ids"]
    for cut in range(len(ids)):
        stream = Detokenizer(tokenizer, ids[:cut])
        for token in ids[cut:]:
            stream.push(token)
        whole = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert whole + stream.text == text


@given(st.lists(st.integers(0, families.VOCAB + 9), max_size=9), st.lists(st.integers(0, families.VOCAB + 9)))
@settings(max_examples=300, deadline=None)
def test_any_tokens_at_all_only_add_text(prompt: list[int], output: list[int]) -> None:
    """Bytes that make no character, and ids that the tokenizer lacks, as a model may draw them."""
    stream = Detokenizer(texts.tokenizer(), prompt)
    for token in output:
        before = stream.text
        stream.push(token)
        assert stream.text.startswith(before) and not stream.text.endswith("\ufffd")


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = Detokenizer(None, [1])
    stream.push(2)
    assert stream.text == ""
