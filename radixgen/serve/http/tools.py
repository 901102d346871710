"""What `tools`, `tool_choice`, `parallel_tool_calls` and `response_format` come to together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from radixgen.core import InvalidRequest, Limits, SamplingParams
from radixgen.core.grammar import format_source
from radixgen.serve.http.call_grammar import answer_or_calls_grammar, call_grammar, parameters_of
from radixgen.serve.http.call_readers import HermesReader, NamedReader, PlainReader, Reader, RequiredReader
from radixgen.serve.http.protocol import ChatRequest, FunctionDefinition, NamedTool, Tool
from radixgen.serve.http.schemas import enforceable

Warn = Callable[[str], None]


def reader_of(asked: ChatRequest) -> Reader:
    """How the text of a choice is read. Raises `InvalidRequest`."""
    choice = asked.tool_choice or ("auto" if asked.tools else "none")
    if choice != "none" and not asked.tools:
        raise InvalidRequest("tool_choice", choice, "is for a request with tools")
    names = [tool.function.name for tool in asked.tools or []]
    if isinstance(choice, NamedTool):
        return NamedReader(choice.function.name)
    if choice == "required":
        return RequiredReader(names)
    return HermesReader(names, parallel=_parallel(asked)) if choice == "auto" else PlainReader()


def constrain(params: SamplingParams, asked: ChatRequest, limits: Limits, warn: Warn) -> SamplingParams:
    """`params` with the grammar that makes the text a call where one must be made, and leaves calls possible where
    `response_format` binds the answer. `warn` gets what was left out of schemas. Raises `InvalidRequest`.
    """
    choice, forced = asked.tool_choice, asked.tool_choice not in (None, "none", "auto")
    answer = None if params.response_format is None else format_source(params.response_format, limits)
    if not forced and (answer is None or choice == "none" or not asked.tools):
        return params
    if asked.structured_outputs is not None and replace(params, response_format=None).structured:
        raise InvalidRequest("structured_outputs", "…", "a request has one grammar, and its tools need another")
    functions = [_enforceable(tool.function, warn) for tool in asked.tools or []]
    params = replace(params, response_format=None)
    try:
        if isinstance(choice, NamedTool):
            return replace(params, json_schema=_named(functions, choice.function.name))
        if forced:
            return replace(params, grammar=call_grammar(functions))
        assert answer is not None
        return replace(params, grammar=answer_or_calls_grammar(answer.text, functions, parallel=_parallel(asked)))
    except RecursionError:
        raise InvalidRequest("tools", "…", "are nested too deeply") from None


def _parallel(asked: ChatRequest) -> bool:
    return asked.parallel_tool_calls is not False


def _named(functions: Sequence[FunctionDefinition], name: str) -> dict[str, Any]:
    for function in functions:
        if function.name == name:
            return parameters_of(function)
    raise InvalidRequest("tool_choice.function.name", name, "must be the name of one of tools")


def _enforceable(function: FunctionDefinition, warn: Warn) -> FunctionDefinition:
    """A function without what no grammar can hold of its parameters; with `strict` they stay as they are."""
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
    """Tools as chat templates take them."""
    if not tools:
        return None
    return [{"type": "function", "function": _definition(tool)} for tool in tools]


def _definition(tool: Tool) -> dict[str, Any]:
    function = tool.function
    found = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {name: value for name, value in found.items() if value is not None}
