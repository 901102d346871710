"""What structured output is asked for, and what the sampler asks of a grammar. The library behind it is elsewhere."""

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
    """A grammar as text, and the parameter that it came from."""

    field: str
    kind: GrammarKind
    text: str


class Allowed(NamedTuple):
    """What a grammar lets follow. Equal states give the same object."""

    mask: NDArray[np.int32]
    """`[ceil(vocab / 32)]`: bit `t % 32` of word `t // 32` says whether token `t` goes on within the grammar."""
    accepts: bool
    """Whether what was generated is a whole text of the grammar: then, and only then, it may end."""


class GrammarState(Protocol):
    """Where one sequence stands in its grammar."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""

    def allowed(self) -> Allowed:
        """Raises `GrammarFailed` where no token of the model goes on and the text is not whole."""

    def allows(self, token: int) -> bool:
        """Whether `token` goes on within the grammar."""

    def accept(self, token: int) -> None:
        """Move on by `token`. Raises `GrammarFailed` where the grammar does not allow it."""

    def fork(self) -> "GrammarState":
        """An independent copy that goes on from here."""


class Grammar(Protocol):
    """A compiled grammar. Any number of sequences may be in it at the same time."""

    def start(self) -> GrammarState:
        """The state of a sequence that has generated nothing."""


def schema_source(schema: object, limits: Limits, field: str = "json_schema") -> GrammarSource:
    """A JSON schema, as text or as an object. Raises `InvalidRequest`."""
    if isinstance(schema, str):
        return text_source(field, "json_schema", schema, limits)
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, schema, "must be a JSON schema, an object or its text")
    return GrammarSource(field, "json_schema", _dumped(schema, limits, field))


def text_source(field: str, kind: GrammarKind, text: object, limits: Limits) -> GrammarSource:
    """A grammar that is text already. Raises `InvalidRequest`."""
    most = limits.max_grammar_chars
    if not isinstance(text, str) or not 0 < len(text) <= most:
        raise InvalidRequest(field, text, f"must be text of 1 to {most} characters")
    check_text(field, text)
    return GrammarSource(field, kind, text)


def choice_source(choice: Any, limits: Limits) -> GrammarSource:
    """One of some texts, as a Lark grammar. Raises `InvalidRequest`."""
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
    """OpenAI's `response_format`; None where it asks for plain text. Raises `InvalidRequest`."""
    field = "response_format"
    asked = response_format.get("type") if isinstance(response_format, Mapping) else None
    if asked == "text":
        return None
    if asked == "json_object":
        return GrammarSource(field, "json_schema", '{"type": "object"}')
    if asked != "json_schema":
        raise InvalidRequest(field, response_format, 'must have the type "text", "json_object" or "json_schema"')
    described = response_format.get("json_schema") if isinstance(response_format, Mapping) else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidRequest(field, response_format, 'must hold an object at ["json_schema"]["schema"]')
    check_texts(field, response_format)
    return schema_source(schema, limits, field)


def only_one(asked: Sequence[GrammarSource]) -> GrammarSource | None:
    """The one that was asked for. Raises `InvalidRequest` where there are more."""
    if len(asked) > 1:
        raise InvalidRequest(asked[1].field, "…", f"{asked[0].field} is given too; a request has one grammar")
    return asked[0] if asked else None


def _dumped(schema: Mapping[str, Any], limits: Limits, field: str) -> str:
    """`schema` as JSON, written no further than it may be long: shared parts can make a small object endless."""
    pieces: list[str] = []
    length = 0
    try:
        for piece in json.JSONEncoder(allow_nan=False, default=_plain).iterencode(schema):
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


def _plain(value: object) -> dict[Any, Any]:
    """Mappings that are no dictionaries."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")
