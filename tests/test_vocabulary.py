"""What a tokenizer knows of its tokens: their bytes, which are special, and which ids are none."""

from collections.abc import Callable

import pytest
import texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from radixgen.serve.http.logprobs import TokenTexts
from radixgen.text.vocabulary import Vocabulary

TEXT = "ab 日本 👩‍👧 ñ\n<x> ok"


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={one: place for place, one in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark for spaces, and bytes for what it does not know."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abok日"]
    model = models.BPE(
        vocab={one: place for place, one in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def made(make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """With a token that is not special, and two that are."""
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<x>", special=False)])
    tokenizer.add_special_tokens({"eos_token": "<end>", "additional_special_tokens": ["<turn>"]})
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_together_their_bytes_are_the_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = made(make)
    tokens = tokenizer(TEXT)["input_ids"]
    known = Vocabulary(tokenizer)
    assert b"".join(map(known.bytes_of, tokens)) == TEXT.encode() and all(map(known.bytes_of, tokens))
    assert known.bytes_of(tokenizer.convert_tokens_to_ids("<x>")) == b"<x>"
    assert known.bytes_of(tokenizer.eos_token_id) == b"<end>" and known.bytes_of(len(tokenizer) + 1) == b""


def test_special_tokens_have_bytes_where_they_are_shown() -> None:
    tokenizer = made(byte_level)
    texts_of = TokenTexts(tokenizer)
    assert texts_of.bytes(tokenizer.eos_token_id) == [], "what ends an answer adds nothing to it"
    assert texts_of.bytes(tokenizer.eos_token_id, special=True) == list(b"<end>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_texts_that_special_tokens_make_up(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = made(make)
    known = Vocabulary(tokenizer)
    end, turn = tokenizer.convert_tokens_to_ids(["<end>", "<turn>"])
    assert known.special >= {end, turn}
    assert known.special_tokens("<end>") == (end,) and known.special_tokens("<turn><end>") == (turn, end)
    for text in ("<x>", "ok", "ok<end>", "<end>ok", "<end", ""):
        assert known.special_tokens(text) == ()


def test_an_unknown_word_is_no_special_token() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert Vocabulary(tokenizer).special_tokens("b") == () and Vocabulary(tokenizer).special_tokens("[UNK]") == (0,)


def test_ids_that_are_unknown() -> None:
    tokenizer = made(byte_level)
    size = len(tokenizer)
    assert Vocabulary(tokenizer).unknown(size).size == Vocabulary(tokenizer).unknown(size - 9).size == 0
    assert Vocabulary(tokenizer).unknown(size + 3).tolist() == [size, size + 1, size + 2]
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a")))
    assert Vocabulary(holes).unknown(5).tolist() == [1, 2, 4]


def test_without_a_tokenizer() -> None:
    assert TokenTexts(None).bytes(5) is None and TokenTexts(texts.tokenizer()).bytes(5) is not None
