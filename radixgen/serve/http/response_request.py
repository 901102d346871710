"""Requests of `/v1/responses` as requests of chats."""

from typing import Any

import msgspec
from msgspec import UNSET

from radixgen.core import InvalidRequest
from radixgen.serve.http.protocol import (
    AllowedTools,
    AllowedToolsChoice,
    ChatMessage,
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    Tool,
    ToolChoice,
)
from radixgen.serve.http.responses_protocol import ResponseRequest, TextFormatFields

LOGPROBS = "message.output_text.logprobs"
_INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
_SAME = (
    "model",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "structured_outputs",
    "priority",
    "cache_salt",
    "cache_hints",
    "reading",
    "skip_special_tokens",
    "chat_template_kwargs",
    "parallel_tool_calls",
)
"""Fields with the same name in `ChatRequest`"""

FIELD_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "json_schema": "text.format",
    "logprobs": "top_logprobs",
    "template_options": "chat_template_kwargs",
}
"""Names of fields in errors, by their names in chats"""


def check_supported(body: ResponseRequest) -> None:
    """Raise `InvalidRequest` for what `/v1/responses` has at OpenAI, and not here."""
    if body.background:
        raise InvalidRequest("background", True, "is not supported: wait for the response, or stream it")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "…", "requires stream=true")
    for index, name in enumerate(body.include or []):
        if name not in _INCLUDES:
            raise InvalidRequest(f"include[{index}]", name, f"must be one of {', '.join(_INCLUDES)}")


def chat_request(body: ResponseRequest, messages: list[ChatMessage]) -> ChatRequest:
    """Request of a chat with these messages after the instructions. Raises `InvalidRequest`."""
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    text_format = None if body.text is None else body.text.format
    includes_logprobs = LOGPROBS in (body.include or ())
    return ChatRequest(
        **{name: getattr(body, name) for name in _SAME},
        messages=[*system, *messages],
        max_completion_tokens=body.max_output_tokens,
        tools=_tools(body),
        tool_choice=_tool_choice(body),
        response_format=None if text_format is None else response_format(text_format),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        logprobs=includes_logprobs or None,
        top_logprobs=body.top_logprobs if includes_logprobs else None,
    )


def response_format(given: TextFormatFields) -> dict[str, Any]:
    """`response_format` of a chat. Raises `InvalidRequest`."""
    if given.type != "json_schema":
        return {"type": given.type}
    if given.schema is UNSET:
        raise InvalidRequest("text.format.schema", None, "is required")
    schema = {name: value for name, value in msgspec.to_builtins(given).items() if name != "type"}
    return {"type": "json_schema", "json_schema": {"name": "answer", **schema}}


def _tools(body: ResponseRequest) -> list[Tool] | None:
    tools = [FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict) for tool in body.tools or []]
    return [Tool(function) for function in tools] or None


def _tool_choice(body: ResponseRequest) -> ToolChoice | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type == "function":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name", None, "is required")
        return NamedTool(FunctionName(choice.name))
    tools = [NamedTool(FunctionName(tool.name)) for tool in choice.tools or []]
    return AllowedToolsChoice(AllowedTools(mode=choice.mode or "auto", tools=tools))
