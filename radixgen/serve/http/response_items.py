"""Items of `/v1/responses` as messages of a chat, and blocks of an answer as items."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any
from uuid import uuid4

from radixgen.core import InvalidRequest
from radixgen.serve.http.answer_blocks import AnswerBlock
from radixgen.serve.http.protocol import ChatMessage, TokenLogprob
from radixgen.serve.http.responses_protocol import (
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseStatus,
)

Item = dict[str, Any]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "summary_text": "text", "refusal": "refusal"}
"""Parts with text, and the field that holds it"""


def input_items(given: str | Seq[Item]) -> list[Item]:
    """Input as a list of items, each with an id. Raises `InvalidRequest` for an item of an unknown type."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise InvalidRequest("input", given, "must be text, or hold at least one item")
    return [_with_id(item, f"input[{index}]") for index, item in enumerate(given)]


def messages_of(items: Seq[Item], field: str = "input") -> list[ChatMessage]:
    """Messages of a chat. Reasoning, text and calls of the assistant in a row become one message.

    Raises `InvalidRequest` for content other than text.
    """
    messages: list[ChatMessage] = []
    for index, item in enumerate(items):
        part = _message(item, f"{field}[{index}]")
        if messages and messages[-1]["role"] == part["role"] == "assistant":
            _append(messages[-1], part)
        else:
            messages.append(part)
    return messages


def item_of(block: AnswerBlock, item_id: str, status: ResponseStatus, logprobs: Seq[TokenLogprob] = ()) -> OutputItem:
    """Item of a block."""
    if block.kind == "text":
        text = OutputText(text=block.text, logprobs=list(logprobs))
        return MessageItem(id=item_id, status=status, content=[] if status == "in_progress" else [text])
    if block.kind == "reasoning":
        content = [] if status == "in_progress" else [ReasoningText(text=block.text)]
        return ReasoningItem(id=item_id, status=status, content=content)
    return FunctionCallItem(id=item_id, status=status, call_id=block.call_id, name=block.name, arguments=block.text)


def new_item_id(kind: str) -> str:
    """Id of a new item of this type."""
    return f"{_PREFIXES[kind]}_{uuid4().hex}"


def _with_id(item: Item, field: str) -> Item:
    kind = item.get("type", "message")
    if kind == "item_reference":
        return item
    if kind not in _PREFIXES:
        limit = f"is not supported: must be one of {', '.join(_PREFIXES)}, item_reference"
        raise InvalidRequest(f"{field}.type", kind, limit)
    return {**item, "type": kind, "id": item.get("id") or new_item_id(kind)}


def _message(item: Item, field: str) -> ChatMessage:
    kind = item["type"]
    if kind == "message":
        if not isinstance(item.get("role"), str):
            raise InvalidRequest(f"{field}.role", item.get("role"), "must be text")
        return {"role": item["role"], "content": _content(item.get("content"), f"{field}.content")}
    if kind == "function_call":
        function = {name: _text(item, name, field) for name in ("name", "arguments")}
        call = {"id": _text(item, "call_id", field), "type": "function", "function": function}
        return {"role": "assistant", "content": [], "tool_calls": [call]}
    if kind == "function_call_output":
        output = _content(item.get("output"), f"{field}.output")
        return {"role": "tool", "tool_call_id": _text(item, "call_id", field), "content": output}
    parts = item.get("content") or []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return {"role": "assistant", "content": [], "reasoning_content": "".join(text for text in texts if text)}


def _append(message: ChatMessage, part: ChatMessage) -> None:
    """Append a part of the assistant's message."""
    message["content"] = [*message["content"], *part["content"]]
    if part.get("tool_calls"):
        message["tool_calls"] = [*message.get("tool_calls", []), *part["tool_calls"]]
    if part.get("reasoning_content"):
        message["reasoning_content"] = message.get("reasoning_content", "") + part["reasoning_content"]


def _content(content: object, field: str) -> list[dict[str, Any]]:
    """Text parts of a content."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(field, content, "must be text, or a list of parts")
    return [_part(part, f"{field}[{index}]") for index, part in enumerate(content)]


def _part(part: object, field: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    name = _TEXTS.get(str(kind))
    if not isinstance(part, Mapping) or name is None:
        raise InvalidRequest(f"{field}.type", kind, f"is not supported: must be one of {', '.join(_TEXTS)}")
    own = {"type": "text", "text": _text(part, name, field)}
    return own | {key: part[key] for key in ("cache_control",) if part.get(key) is not None}


def _text(holder: Mapping[str, Any], name: str, field: str) -> str:
    value = holder.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}.{name}", value, "must be text")
    return value
