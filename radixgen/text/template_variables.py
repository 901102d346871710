"""Variables of a chat template that callers may set."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from radixgen.core import InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Environment
    from transformers import PreTrainedTokenizerBase

_RESERVED = {"messages", "conversations", "tokenizer", "loop", "caller", "varargs", "kwargs", "self"}
"""Names that templates or their renderer define, besides arguments of functions"""


def check_options(field: str, options: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise `InvalidRequest` for an option that is not a variable of the chat template, or reserved by its renderer."""
    special = {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}
    taken = _RESERVED | _arguments(type(tokenizer)) | special
    known = template_variables(tokenizer.chat_template) - taken
    for name, value in options.items():
        if name not in known:
            limit = f"must be a variable of the chat template: {', '.join(sorted(known)) or 'it has none'}"
            raise InvalidRequest(f"{field}.{name}"[:200], value, limit[:1_000])


def check_template(field: str, text: str) -> None:
    """Raise `InvalidRequest` if `text` is not a valid Jinja template."""
    from jinja2 import TemplateError

    try:
        _environment().parse(text)
    except TemplateError as error:
        raise InvalidRequest(field, text, f"must be a Jinja template: {error}") from error


def template_variables(template: str | Mapping[str, str]) -> frozenset[str]:
    """Names that a template uses but does not define, including Jinja's functions; for several templates, of all."""
    texts = [template] if isinstance(template, str) else template.values()
    return frozenset().union(*map(_names, texts))


def _arguments(kind: type["PreTrainedTokenizerBase"]) -> frozenset[str]:
    """Arguments of the functions that render for a tokenizer of this type, and globals of the environment."""
    from jinja2.defaults import DEFAULT_NAMESPACE
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    renders = (
        kind.apply_chat_template,
        PreTrainedTokenizerBase.apply_chat_template,
        chat_template_utils.render_jinja_template,
    )
    own = {name for function in renders for name in inspect.signature(function).parameters}
    return frozenset(own | DEFAULT_NAMESPACE.keys() | {"raise_exception", "strftime_now"})


@lru_cache
def _names(text: str) -> frozenset[str]:
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables

    try:
        return frozenset(find_undeclared_variables(_environment().parse(text)))
    except TemplateError:
        return frozenset()


def _environment() -> "Environment":
    """Jinja environment that parses the same templates as transformers."""
    from jinja2 import Environment
    from jinja2.ext import Extension, loopcontrols

    class GenerationTag(Extension):
        """`{% generation %}`, with which templates mark the assistant's text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(extensions=[GenerationTag, loopcontrols])
