"""Parser and grammar of a request with `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from radixgen.core import InvalidRequest, Limits, SamplingParams
from radixgen.core.grammar import format_source
from radixgen.serve.http.call_grammar import answer_or_calls_grammar, call_grammar, parameters_of
from radixgen.serve.http.enforceable_schema import enforceable
from radixgen.serve.http.protocol import ChatRequest, FunctionDefinition, NamedTool, Tool
from radixgen.serve.http.tool_parsers import (
    HermesParser,
    NamedCallParser,
    PlainTextParser,
    RequiredCallParser,
    ToolCallParser,
)

Warn = Callable[[str], None]


def parser_for(body: ChatRequest) -> ToolCallParser:
    """Create the parser of a choice's text. Raises `InvalidRequest`."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice != "none" and not body.tools:
        raise InvalidRequest("tool_choice", choice, "requires tools")
    names = [tool.function.name for tool in body.tools or []]
    if isinstance(choice, NamedTool):
        return NamedCallParser(choice.function.name)
    if choice == "required":
        return RequiredCallParser(names)
    return HermesParser(names, parallel=_parallel(body)) if choice == "auto" else PlainTextParser()


def constrain(params: SamplingParams, body: ChatRequest, limits: Limits, warn: Warn) -> SamplingParams:
    """Add the grammar of tool calls to `params`: for calls that are required, or allowed besides `response_format`.

    warn: called with a warning that names removed schema keywords.

    Raises `InvalidRequest`.
    """
    choice, forced = body.tool_choice, body.tool_choice not in (None, "none", "auto")
    answer = None if params.response_format is None else format_source(params.response_format, limits)
    if not forced and (answer is None or choice == "none" or not body.tools):
        return params
    if body.structured_outputs is not None and replace(params, response_format=None).structured:
        raise InvalidRequest("structured_outputs", "…", "cannot be combined with tool calls that need a grammar")
    functions = [_enforceable(tool.function, warn) for tool in body.tools or []]
    params = replace(params, response_format=None)
    try:
        if isinstance(choice, NamedTool):
            return replace(params, json_schema=_named(functions, choice.function.name))
        if forced:
            return replace(params, grammar=call_grammar(functions))
        assert answer is not None
        return replace(params, grammar=answer_or_calls_grammar(answer.text, functions, parallel=_parallel(body)))
    except RecursionError:
        raise InvalidRequest("tools", "…", "are nested too deeply") from None


def _parallel(body: ChatRequest) -> bool:
    return body.parallel_tool_calls is not False


def _named(functions: Sequence[FunctionDefinition], name: str) -> dict[str, Any]:
    for function in functions:
        if function.name == name:
            return parameters_of(function)
    raise InvalidRequest("tool_choice.function.name", name, "must be the name of one of tools")


def _enforceable(function: FunctionDefinition, warn: Warn) -> FunctionDefinition:
    """`function` without schema keywords that a grammar can't enforce; unchanged if it is `strict`."""
    if function.strict or function.parameters is None:
        return function
    try:
        parameters, left_out = enforceable(function.parameters)
    except RecursionError:
        raise InvalidRequest("tools", "…", "are nested too deeply") from None
    if left_out:
        warn(f"not enforced in the parameters of {function.name}: {', '.join(sorted(left_out))}")
    return msgspec.structs.replace(function, parameters=parameters)


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools in the form that chat templates expect."""
    if not tools:
        return None
    return [{"type": "function", "function": _definition(tool)} for tool in tools]


def _definition(tool: Tool) -> dict[str, Any]:
    function = tool.function
    fields = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {name: value for name, value in fields.items() if value is not None}
