"""Removal of the JSON schema keywords that a grammar can't enforce."""

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
"""Keywords that only restrict a schema further"""
_MAPS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""Keywords whose values map names to schemas"""
_DATA = frozenset({"const", "default", "enum", "examples", "x-guidance"})
"""Keywords whose values are not schemas"""


def enforceable(schema: Any) -> tuple[Any, set[str]]:
    """Copy of `schema` without keywords that a grammar can't enforce, and the set of these keywords."""
    left_out: set[str] = set()
    return _kept(schema, left_out), left_out


def enforceable_format(
    response_format: Mapping[str, Any] | None, warn: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """`response_format` without schema keywords that a grammar can't enforce; unchanged if it is `strict`.

    warn: called with a warning that names the removed keywords.

    Raises `InvalidRequest`.
    """
    described = None if response_format is None else response_format.get("json_schema")
    if response_format is None or not isinstance(described, Mapping) or described.get("strict"):
        return response_format
    try:
        schema, left_out = enforceable(described.get("schema"))
    except RecursionError:
        raise InvalidRequest("response_format", "…", "is nested too deeply") from None
    if not left_out:
        return response_format
    warn(f"not enforced in response_format: {', '.join(sorted(left_out))}")
    return {**response_format, "json_schema": {**described, "schema": schema}}


def _kept(schema: Any, left_out: set[str]) -> Any:
    if isinstance(schema, list):
        return [_kept(item, left_out) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in UNENFORCED:
            if value is not False:  # `"uniqueItems": false` has no effect
                left_out.add(key)
        elif key in _MAPS and isinstance(value, Mapping):
            kept[key] = {name: _kept(item, left_out) for name, item in value.items()}
        else:
            kept[key] = value if key in _DATA else _kept(value, left_out)
    return kept
