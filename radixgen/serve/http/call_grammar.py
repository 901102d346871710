"""Grammars for tool calls.

Each schema is a separate `%json` in a Lark grammar, so that `$ref`, `$defs` and `definitions` resolve within it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from radixgen.core import InvalidRequest
from radixgen.sampling.structured import WHITE_SPACE
from radixgen.serve.http.protocol import FunctionDefinition
from radixgen.serve.http.tool_parsers import CLOSE_TAG, OPEN_TAG


def call_grammar(functions: Sequence[FunctionDefinition]) -> str:
    """Grammar of one call to one of `functions`, as JSON."""
    return "\n".join(["start: call", *_call_rules(functions)])


def answer_or_calls_grammar(schema: str, functions: Sequence[FunctionDefinition], *, parallel: bool) -> str:
    """Grammar of JSON that follows `schema`, or calls to `functions` in Hermes's tags; one call unless `parallel`."""
    return "\n".join(
        [
            "start: answer | tagged" + (' ("\\n"? tagged)*' if parallel else ""),
            f"answer: {_json_rule(json.loads(schema))}",
            f'tagged: "{OPEN_TAG}" "\\n"? call "\\n"? "{CLOSE_TAG}"',
            *_call_rules(functions),
        ]
    )


def parameters_of(function: FunctionDefinition) -> dict[str, Any]:
    """JSON schema of a function's arguments."""
    return function.parameters or {"type": "object"}


def _call_rules(functions: Sequence[FunctionDefinition]) -> list[str]:
    if not functions:
        raise InvalidRequest("tools", [], "must hold at least one tool")
    names = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [f"call: {names}"]
    for index, function in enumerate(functions):
        head = '{"name": ' + json.dumps(function.name) + ', "arguments": '
        rules.append(f'call_{index}: {_text(head)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {_json_rule(parameters_of(function))}")
    return rules


def _json_rule(schema: Mapping[str, Any]) -> str:
    """`%json` rule of `schema`, with bounded white space unless the schema sets its own options."""
    own = schema.get("x-guidance")
    options = {"whitespace_pattern": WHITE_SPACE} if own is None else own
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _text(text: str) -> str:
    """Lark literal, which has JSON's escapes."""
    return json.dumps(text)
