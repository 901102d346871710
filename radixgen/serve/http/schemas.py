"""JSON schemas that OpenAI accepts and no grammar can hold: what they say beyond a grammar is left out."""

from collections.abc import Callable, Mapping
from typing import Any

from radixgen.core import InvalidRequest

UNENFORCED = frozenset(
    {
        "contains",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
"""Keywords that only narrow what a schema allows"""
_MAPS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""Keywords whose values hold schemas by names of their own"""
_DATA = frozenset({"const", "default", "enum", "examples", "x-guidance"})
"""Keywords whose values are no schemas"""


def enforceable(schema: Any) -> tuple[Any, set[str]]:
    """A copy of `schema` without what no grammar can hold, and the keywords left out."""
    left_out: set[str] = set()
    return _kept(schema, left_out), left_out


def enforceable_format(asked: Mapping[str, Any] | None, warn: Callable[[str], None]) -> Mapping[str, Any] | None:
    """A `response_format` without what no grammar can hold of its schema; with `strict` it stays as it is. `warn` gets
    what was left out. Raises `InvalidRequest`.
    """
    described = None if asked is None else asked.get("json_schema")
    if asked is None or not isinstance(described, Mapping) or described.get("strict"):
        return asked
    try:
        schema, left_out = enforceable(described.get("schema"))
    except RecursionError:
        raise InvalidRequest("response_format", "…", "is nested too deeply") from None
    if not left_out:
        return asked
    warn(f"not enforced in response_format: {', '.join(sorted(left_out))}")
    return {**asked, "json_schema": {**described, "schema": schema}}


def _kept(schema: Any, left_out: set[str]) -> Any:
    if isinstance(schema, list):
        return [_kept(one, left_out) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for key, value in schema.items():
        if key in UNENFORCED:
            if value is not False:  # `"uniqueItems": false` says nothing
                left_out.add(key)
        elif key in _MAPS and isinstance(value, Mapping):
            found[key] = {name: _kept(one, left_out) for name, one in value.items()}
        else:
            found[key] = value if key in _DATA else _kept(value, left_out)
    return found
