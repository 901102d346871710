"""Grammars for structured output: sources in request parameters, and the interface that the sampler uses.

`radixgen.sampling.structured` implements the interface.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radixgen.core.errors import InvalidRequest
from radixgen.core.limits import Limits
from radixgen.core.texts import check_text, check_texts

GrammarKind = Literal["json_schema", "regex", "lark"]


class GrammarSource(NamedTuple):
    """The text of a grammar, and the request parameter that it came from."""

    field: str
    kind: GrammarKind
    text: str


class AllowedTokens(NamedTuple):
    """The tokens that a grammar allows next. Equal grammar states share one object."""

    mask: NDArray[np.int32]
    """`[ceil(vocab / 32)]`: bit `t % 32` of word `t // 32` is set if token `t` is allowed."""
    accepts: bool
    """Whether the text so far is complete. Only then may the sequence end."""


class GrammarState(Protocol):
    """The position of one sequence in its grammar."""

    @property
    def complete(self) -> bool:
        """Whether only an end token may follow."""

    def allowed(self) -> AllowedTokens:
        """Return the tokens allowed next.

        Raises `GrammarFailed` if the model has no such token and the text is not complete.
        """

    def allows(self, token: int) -> bool:
        """Return whether `token` is allowed next."""

    def accept(self, token: int) -> None:
        """Advance by `token`. Raises `GrammarFailed` if the grammar does not allow it."""

    def fork(self) -> "GrammarState":
        """Return an independent copy."""


class Grammar(Protocol):
    """A compiled grammar, shared by any number of sequences."""

    def start(self) -> GrammarState:
        """Return the state of a sequence without output."""


def schema_source(schema: object, limits: Limits, field: str = "json_schema") -> GrammarSource:
    """Make a source of a JSON schema, given as text or as an object. Raises `InvalidRequest`."""
    if isinstance(schema, str):
        return text_source(field, "json_schema", schema, limits)
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, schema, "must be a JSON schema, an object or its text")
    return GrammarSource(field, "json_schema", _dump_schema(schema, limits, field))


def text_source(field: str, kind: GrammarKind, text: object, limits: Limits) -> GrammarSource:
    """Check a grammar that is text already. Raises `InvalidRequest`."""
    most = limits.max_grammar_chars
    if not isinstance(text, str) or not 0 < len(text) <= most:
        raise InvalidRequest(field, text, f"must be text of 1 to {most} characters")
    check_text(field, text)
    return GrammarSource(field, kind, text)


def choice_source(choice: Any, limits: Limits) -> GrammarSource:
    """Make a Lark grammar that accepts exactly the given texts. Raises `InvalidRequest`."""
    if not isinstance(choice, tuple | list) or not choice:
        raise InvalidRequest("choice", choice, "must be a tuple or a list of one text or more")
    if len(choice) > limits.max_choices:
        raise InvalidRequest("len(choice)", len(choice), f"must be at most {limits.max_choices}")
    for text in choice:
        text_source("choice", "lark", text, limits)
    if (characters := sum(map(len, choice))) > limits.max_grammar_chars:
        raise InvalidRequest("choice", characters, f"must hold at most {limits.max_grammar_chars} characters")
    return GrammarSource("choice", "lark", "start: " + " | ".join(map(json.dumps, choice)))


def format_source(response_format: object, limits: Limits) -> GrammarSource | None:
    """Make a source of OpenAI's `response_format`; None for plain text. Raises `InvalidRequest`."""
    field = "response_format"
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSource(field, "json_schema", '{"type": "object"}')
    if kind != "json_schema":
        raise InvalidRequest(field, response_format, 'must have the type "text", "json_object" or "json_schema"')
    described = response_format.get("json_schema") if isinstance(response_format, Mapping) else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, response_format, 'must hold an object at ["json_schema"]["schema"]')
    check_texts(field, response_format)
    return schema_source(schema, limits, field)


def single_source(sources: Sequence[GrammarSource]) -> GrammarSource | None:
    """Return the only source, or None if there is none. Raises `InvalidRequest` for more than one."""
    if len(sources) > 1:
        raise InvalidRequest(
            sources[1].field, "…", f"cannot be combined with {sources[0].field}: a request has at most one grammar"
        )
    return sources[0] if sources else None


def _dump_schema(schema: Mapping[str, Any], limits: Limits, field: str) -> str:
    """Serialize `schema` to JSON, stopping at the length limit: shared parts can make a small object enormous."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in json.JSONEncoder(allow_nan=False, default=_mapping_as_dict).iterencode(schema):
            pieces.append(piece)
            length += len(piece)
            if length > limits.max_grammar_chars:
                break
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, schema, f"is not JSON: {error}") from error
    if length > limits.max_grammar_chars:
        raise InvalidRequest(field, schema, f"must be at most {limits.max_grammar_chars} characters of JSON")
    check_texts(field, schema)
    return "".join(pieces)


def _mapping_as_dict(value: object) -> dict[Any, Any]:
    """Convert mappings other than dictionaries for the JSON encoder."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be serialized to JSON")
