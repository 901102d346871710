"""Parser and grammar of a request with `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import msgspec

from radixgen.core import InvalidRequest, Limits, SamplingParams
from radixgen.core.grammar import format_source
from radixgen.serve.http.call_grammar import answer_or_calls_grammar, call_grammar, parameters_of
from radixgen.serve.http.enforceable_schema import enforceable
from radixgen.serve.http.protocol import AllowedToolsChoice, ChatRequest, FunctionDefinition, NamedTool, Tool
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
    choice = _choice(body)
    if choice != "none" and not body.tools:
        raise InvalidRequest("tool_choice", choice, "requires tools")
    names = [tool.function.name for tool in _allowed(body)]
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
    choice = _choice(body)
    forced = choice not in ("none", "auto")
    answer = None if params.response_format is None else format_source(params.response_format, limits)
    if not forced and (answer is None or choice == "none" or not body.tools):
        return params
    if body.structured_outputs is not None and replace(params, response_format=None).structured:
        raise InvalidRequest("structured_outputs", "…", "cannot be combined with tool calls that need a grammar")
    functions = [_enforceable(tool.function, warn) for tool in _allowed(body)]
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


def _choice(body: ChatRequest) -> Literal["none", "auto", "required"] | NamedTool:
    """`tool_choice` without the names of allowed tools."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    return choice.allowed_tools.mode if isinstance(choice, AllowedToolsChoice) else choice


def _allowed(body: ChatRequest) -> list[Tool]:
    """Tools that may be called. Raises `InvalidRequest`."""
    tools, choice = body.tools or [], body.tool_choice
    if not isinstance(choice, AllowedToolsChoice):
        return tools
    by_name = {tool.function.name: tool for tool in tools}
    allowed = []
    for index, named in enumerate(choice.allowed_tools.tools):
        name = named.function.name
        if name not in by_name:
            field = f"tool_choice.allowed_tools.tools[{index}].function.name"
            raise InvalidRequest(field, name, "must be the name of one of tools")
        allowed.append(by_name[name])
    return allowed


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
