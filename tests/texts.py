"""A byte-level tokenizer with a chat template, for models of `families.VOCAB` tokens."""

from itertools import islice, product
from pathlib import Path

import families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
BYTES = "".join(chr(c) for c in range(32, 127)) + "éü漢😀"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, of the bytes that ASCII text and `BYTES` need; no merges. The other ids are pairs of control
    characters, which only a model writes, and in no JSON.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    needed = {token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(BYTES)}
    used = sorted({character for token in needed for character in token} | set(alphabet[:20]))[: families.VOCAB]
    control = [chr(0x100 + byte) for byte in range(0x02, 0x09)] + [chr(0x10E)]
    used += map("".join, islice(product(control, repeat=2), families.VOCAB - len(used)))
    plain = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(used)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, chat_template=TEMPLATE)


def saved_model(folder: Path) -> Path:
    """A tiny model with a tokenizer and a chat template, in `folder`."""
    families.build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
