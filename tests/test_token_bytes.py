"""The bytes of a text's tokens are the text's, for each kind of decoder."""

import pytest
import texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from radixgen.serve.http.logprobs import TokenTexts
from radixgen.serve.http.token_bytes import TokenBytes

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


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_together_they_are_the_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokenizer.add_tokens([AddedToken("<x>", special=False)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokens = tokenizer(TEXT)["input_ids"]
    found = TokenBytes(tokenizer)
    assert b"".join(map(found, tokens)) == TEXT.encode() and all(map(found, tokens))
    assert found(tokenizer.convert_tokens_to_ids("<x>")) == b"<x>"
    assert found(tokenizer.eos_token_id) == b"", "what ends an answer adds nothing to it"


def test_without_a_tokenizer() -> None:
    assert TokenTexts(None).bytes(5) is None and TokenTexts(texts.tokenizer()).bytes(5) is not None
