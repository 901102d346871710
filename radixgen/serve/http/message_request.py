"""Requests of `/v1/messages` as requests of chats."""

import json
from collections.abc import Mapping
from typing import Any

from radixgen.core import InvalidRequest
from radixgen.serve.http.messages_protocol import MessagesRequest, MessageTool
from radixgen.serve.http.protocol import ChatMessage, ChatRequest, FunctionDefinition, FunctionName, NamedTool, Tool

_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "min_p",
    "seed",
    "ignore_eos",
    "structured_outputs",
    "priority",
    "cache_salt",
    "cache_hints",
    "reading",
)
"""Fields with the same name in `ChatRequest`"""

FIELD_NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "json_schema": "output_config.format",
    "template_options": "chat_template_kwargs",
}
"""Names of fields in errors, by their names in chats"""


def chat_request(body: MessagesRequest, variables: frozenset[str]) -> ChatRequest:
    """Request of a chat. `variables`: those of the chat template. Raises `InvalidRequest`."""
    messages = _messages(body)
    choice = body.tool_choice
    options = dict(body.chat_template_kwargs or {})
    if body.thinking is not None and "enable_thinking" in variables:
        options.setdefault("enable_thinking", body.thinking.type != "disabled")
    config = body.output_config
    return ChatRequest(
        **{name: getattr(body, name) for name in _SAME},
        messages=messages,
        continue_final_message=(messages[-1]["role"] == "assistant" if messages else None),
        stop=body.stop_sequences,
        tools=[Tool(_function(tool)) for tool in body.tools or []] or None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=None if choice is None else not choice.disable_parallel_tool_use,
        response_format=None if config is None or config.format is None else _format(config.format),
        reasoning_effort=None if config is None else config.effort,
        chat_template_kwargs=options or None,
    )


def content_messages(role: str, content: object, field: str) -> list[ChatMessage]:
    """Messages of a chat for one message. Raises `InvalidRequest` for content that is not supported."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InvalidRequest(field, content, "must be text, or a list of blocks")
    messages: list[ChatMessage] = []
    for index, block in enumerate(content):
        _add(messages, role, block, f"{field}[{index}]")
    return messages


def _messages(body: MessagesRequest) -> list[ChatMessage]:
    messages = [] if body.system is None else content_messages("system", body.system, "system")
    for index, message in enumerate(body.messages):
        role = message.get("role")
        if role not in ("user", "assistant"):
            raise InvalidRequest(f"messages[{index}].role", role, "must be user or assistant")
        messages += content_messages(role, message.get("content"), f"messages[{index}].content")
    if messages:
        _retain(messages[-1], body.cache_control)
        for tool in body.tools or []:  # templates show tools at the beginning
            _retain(messages[0], tool.cache_control)
    return messages


def _retain(message: ChatMessage, control: Mapping[str, Any] | None) -> None:
    if control is not None:
        message.setdefault("cache_control", control)


def _add(messages: list[ChatMessage], role: str, block: object, field: str) -> None:
    """Add a block to the last message, or a message for it."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(block, Mapping) or not isinstance(kind, str):
        raise InvalidRequest(field, block, 'must be {"type": …}')
    if kind == "tool_result" and role == "user":
        messages.append(_tool_result(block, field))
        return
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": []})
    message = messages[-1]
    if kind == "text":
        message["content"].append(_text_part(block, field))
    elif kind == "thinking" and role == "assistant":
        message["reasoning_content"] = message.get("reasoning_content", "") + _string(block, "thinking", field)
    elif kind == "tool_use" and role == "assistant":
        message["tool_calls"] = [*message.get("tool_calls", []), _call(block, field)]
        _retain(message, block.get("cache_control"))
    elif kind != "redacted_thinking" or role != "assistant":
        raise InvalidRequest(f"{field}.type", kind, f"is not supported in messages of the {role}")


def _tool_result(block: Mapping[str, Any], field: str) -> ChatMessage:
    content = block.get("content", "")
    if isinstance(content, list):
        content = [_text_part(part, f"{field}.content[{index}]") for index, part in enumerate(content)]
    elif not isinstance(content, str):
        raise InvalidRequest(f"{field}.content", content, "must be text, or a list of text blocks")
    message: ChatMessage = {
        "role": "tool",
        "tool_call_id": _string(block, "tool_use_id", field),
        "content": content,
    }
    _retain(message, block.get("cache_control"))
    return message


def _text_part(block: object, field: str) -> dict[str, Any]:
    if not isinstance(block, Mapping) or block.get("type") != "text":
        kind = block.get("type") if isinstance(block, Mapping) else block
        raise InvalidRequest(f"{field}.type", kind, "is not supported: must be text")
    part = {"type": "text", "text": _string(block, "text", field)}
    return part | ({"cache_control": block["cache_control"]} if block.get("cache_control") is not None else {})


def _call(block: Mapping[str, Any], field: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(f"{field}.input", arguments, "must be an object")
    function = {"name": _string(block, "name", field), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _string(block, "id", field), "type": "function", "function": function}


def _string(block: Mapping[str, Any], name: str, field: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}.{name}", value, "must be text")
    return value


def _function(tool: MessageTool) -> FunctionDefinition:
    return FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict)


def _tool_choice(body: MessagesRequest) -> Any:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name", None, "is required")
        return NamedTool(FunctionName(choice.name))
    return "required" if choice.type == "any" else choice.type


def _format(given: Mapping[str, Any]) -> dict[str, Any]:
    schema = given.get("schema")
    if given.get("type") != "json_schema" or not isinstance(schema, Mapping):
        raise InvalidRequest("output_config.format", given, 'must be {"type": "json_schema", "schema": …}')
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
