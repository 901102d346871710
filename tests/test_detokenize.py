"""Text as tokens come: whole characters only, and in the end all of it."""

import pytest
import texts

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


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = Detokenizer(None, [1])
    stream.push(2)
    assert stream.text == ""
