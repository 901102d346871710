"""Names of request fields in error messages, where the engine uses different ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from radixgen.core import InvalidRequest
from radixgen.serve.http.protocol import ChatRequest, CompletionRequest

_STRUCTURED = {
    "json_schema": "structured_outputs.json",
    "regex": "structured_outputs.regex",
    "choice": "structured_outputs.choice",
    "grammar": "structured_outputs.grammar",
}


@contextmanager
def sent_as(names: Mapping[str, str]) -> Iterator[None]:
    """Context manager that renames fields of errors, also within `len(a)`, `a[0]` and `a + b`."""
    try:
        yield
    except InvalidRequest as error:
        field = "".join(names.get(word, word) for word in _words(error.field))
        if field == error.field:
            raise
        raise type(error)(field, error.value, error.limit) from error.__cause__


def _words(field: str) -> Iterator[str]:
    """Split a field into names and the characters between them."""
    word = ""
    for character in field:
        if character.isidentifier() or (word and character.isalnum()):
            word += character
        else:
            yield word
            yield character
            word = ""
    yield word


def names_of(body: ChatRequest | CompletionRequest) -> dict[str, str]:
    """Names of a request's fields, by the engine's names."""
    names = dict(_STRUCTURED)
    if isinstance(body, ChatRequest):
        names |= {"prompt": "messages", "logprobs": "top_logprobs", "template_options": "chat_template_kwargs"}
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if body.tools and body.structured_outputs is None:
            names |= {"json_schema": "tools", "grammar": "tools"}
    else:
        names["prompt_logprobs"] = "logprobs"
    return names
