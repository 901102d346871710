"""Chat template that replaces the model's own: `--chat-template`."""

from pathlib import Path
from typing import TYPE_CHECKING

from radixgen.core import InvalidRequest
from radixgen.text.template_variables import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_CHARS = 1 << 20
_ESCAPES = {"\\n": "\n", "\\t": "\t", '\\"': '"'}


def tokenizer_with_template(model: str, given: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model` with the chat template of `read_template`. Raises `InvalidRequest`, `ModelNotFound`."""
    from transformers import PreTrainedTokenizerBase

    from radixgen.model.loader import load_tokenizer

    template, tokenizer = read_template(given), load_tokenizer(model)
    if tokenizer is None:
        raise InvalidRequest("chat_template", given, "the model has no tokenizer")
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        raise InvalidRequest("chat_template", given, f"{type(tokenizer).__name__} renders chats by itself")
    tokenizer.chat_template = template
    return tokenizer


def read_template(given: str) -> str:
    r"""Read a template from the file `given`; without such a file, `given` is the template, with `\n` for newlines.

    Raises `InvalidRequest`.
    """
    template = _read(given)
    if len(template) > _MOST_CHARS:
        raise InvalidRequest("len(chat_template)", len(template), f"must be at most {_MOST_CHARS}")
    check_template("chat_template", template)
    return template


def _read(given: str) -> str:
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if not {"{", "}", "\n"} & {*given}:
            raise InvalidRequest("chat_template", given, f"must be a file or a Jinja template: {error}") from None
    for escape, character in _ESCAPES.items():
        given = given.replace(escape, character)
    return given
