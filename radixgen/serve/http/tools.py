"""Tool calls in what a model writes: Hermes's `<tool_call>{"name": …, "arguments": …}</tool_call>`, or by grammar."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from msgspec import UNSET

from radixgen.core import InvalidRequest
from radixgen.serve.http.protocol import ChatRequest, FunctionCall, NamedTool, Tool, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class Piece:
    """What some new text comes to. Of a call that is told in parts, only the first has a name."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Reader(Protocol):
    """Reads one choice's text as it comes."""

    calls: bool
    """Whether there was a call that ends the choice with `tool_calls`"""

    def push(self, text: str) -> Piece: ...

    def finish(self) -> Piece:
        """What was held back, at the end of the text."""


class PlainReader:
    """All is content."""

    calls = False

    def push(self, text: str) -> Piece:
        return Piece(text)

    def finish(self) -> Piece:
        return Piece()


class HermesReader:
    """Content, and between tags calls, each told when it is whole. What is no call stays content, tags and all."""

    def __init__(self) -> None:
        self.calls = False
        self._held = ""
        self._inside = False
        self._count = 0
        self._blank: str | None = None
        """White space since the last call, where there was nothing else"""

    def push(self, text: str) -> Piece:
        piece = Piece()
        self._held += text
        while self._advance(piece):
            pass
        return piece

    def finish(self) -> Piece:
        """The closing tag may be missing: some models end instead."""
        piece, held = Piece(), self._held
        self._held = ""
        if self._inside:
            self._close(held, _OPEN + held, piece)
        else:
            self._say(held, piece)
        return piece

    def _advance(self, piece: Piece) -> bool:
        """Take what is certain of the text that is held. Whether there may be more."""
        tag = _CLOSE if self._inside else _OPEN
        before, found, rest = self._held.partition(tag)
        if found and self._inside:
            self._close(before, _OPEN + before + _CLOSE, piece)
        elif found:
            self._say(before, piece)
            self._inside = True
        elif not self._inside:
            certain = len(self._held) - _overlap(self._held, tag)
            self._say(self._held[:certain], piece)
            rest = self._held[certain:]
        else:
            rest = self._held
        self._held = rest
        return bool(found)

    def _say(self, text: str, piece: Piece) -> None:
        """White space between calls, and after the last, is layout."""
        if self._blank is None:
            piece.content += text
            return
        self._blank += text
        if self._blank.strip():
            piece.content += self._blank
            self._blank = None

    def _close(self, text: str, whole: str, piece: Piece) -> None:
        self._inside = False
        call = as_call(text, self._count)
        if call is None:
            self._say(whole, piece)
            return
        self._count += 1
        self.calls = True
        self._blank = ""
        piece.calls.append(call)


class RequiredReader:
    """The whole text is one call, as JSON."""

    def __init__(self) -> None:
        self.calls = False
        self._text = ""

    def push(self, text: str) -> Piece:
        self._text += text
        return Piece()

    def finish(self) -> Piece:
        call = as_call(self._text, 0)
        self.calls = call is not None
        return Piece(calls=[call]) if call else Piece(self._text)


class NamedReader:
    """The whole text is the arguments of the function that was named."""

    calls = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> Piece:
        if self._begun:
            return Piece(calls=[ToolCall(index=0, function=FunctionCall(UNSET, text))]) if text else Piece()
        self._begun = True
        return Piece(calls=[_call(0, self._name, text)])

    def finish(self) -> Piece:
        return Piece() if self._begun else self.push("")


def as_call(text: str, index: int) -> ToolCall | None:
    """A call as models write it; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return _call(index, _whole(found["name"]), _whole(arguments))


def _whole(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can write and UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


def _call(index: int, name: str, arguments: str) -> ToolCall:
    return ToolCall(index=index, id=f"call_{uuid4().hex[:24]}", type="function", function=FunctionCall(name, arguments))


def _overlap(text: str, tag: str) -> int:
    """How many of the last characters of `text` may be the beginning of `tag`."""
    return next((count for count in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-count:])), 0)


def reader_of(asked: ChatRequest) -> Reader:
    """How the text of a choice is read. Raises `InvalidRequest`."""
    choice = asked.tool_choice or ("auto" if asked.tools else "none")
    if choice != "none" and not asked.tools:
        raise InvalidRequest("tool_choice", choice, "is for a request with tools")
    if isinstance(choice, NamedTool):
        return NamedReader(choice.function.name)
    if choice == "required":
        return RequiredReader()
    return HermesReader() if choice == "auto" else PlainReader()


def schema_of(asked: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema that makes the text a call, where one must be made. Raises `InvalidRequest`."""
    tools, choice = asked.tools or [], asked.tool_choice
    if choice == "required":
        return {"anyOf": [_call_schema(tool) for tool in tools]}
    if not isinstance(choice, NamedTool):
        return None
    for tool in tools:
        if tool.function.name == choice.function.name:
            return _parameters(tool)
    raise InvalidRequest("tool_choice.function.name", choice.function.name, "must be the name of one of tools")


def _call_schema(tool: Tool) -> dict[str, Any]:
    properties = {"name": {"const": tool.function.name}, "arguments": _parameters(tool)}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it: parts of text as one, arguments of calls as objects. Raises
    `InvalidRequest`.
    """
    found = {name: value for name, value in message.items() if value is not None}
    found["content"] = _text(found.get("content"))
    calls = found.pop("tool_calls", [])  # templates ask whether it is there, and clients send an empty list
    if calls != []:
        if not isinstance(calls, list):
            raise InvalidRequest("messages.tool_calls", calls, "must be a list")
        found["tool_calls"] = [_template_call(call) for call in calls]
    return found


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest("messages.content", content, "must be text, null, or a list of parts")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest("messages.content", part, 'must hold parts {"type": "text", "text": …} alone')
        parts.append(part["text"])
    return "".join(parts)


def _template_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("messages.tool_calls", call, 'must hold {"function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments") or {}  # clients send "" for none
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


def template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as chat templates take them."""
    if not tools:
        return None
    return [{"type": "function", "function": _definition(tool)} for tool in tools]


def _definition(tool: Tool) -> dict[str, Any]:
    function = tool.function
    found = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {name: value for name, value in found.items() if value is not None}
