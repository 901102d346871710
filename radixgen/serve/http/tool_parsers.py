"""Parsers of tool calls in generated text.

Models write Hermes's format, `<tool_call>{"name": …, "arguments": …}</tool_call>`, or follow a grammar.
Arguments are streamed as they arrive. Calls of unknown functions are not tool calls.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4

from msgspec import UNSET

from radixgen.serve.http.protocol import FunctionCall, ToolCall

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, which must be an object"""
_BRACKET = re.compile(r'["{}\[\]\\]')


@dataclass(slots=True)
class Piece:
    """Content, tool calls and reasoning of some new text. If a call comes in parts, only the first part has a name."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    reasoning: str = ""


class ToolCallParser(Protocol):
    """Parser of the streamed text of one choice."""

    @property
    def calls(self) -> bool:
        """Whether the choice's finish reason becomes `tool_calls`."""

    def push(self, text: str) -> Piece:
        """Parse new text."""

    def finish(self, *, cut: bool = False) -> Piece:
        """Parse text that was held back, at the end. `cut`: whether `max_tokens` ended the text."""


class PlainTextParser:
    """Parser for requests without tools: all text is content."""

    calls = False

    def push(self, text: str) -> Piece:
        return Piece(text)

    def finish(self, *, cut: bool = False) -> Piece:
        return Piece()


class HermesParser:
    """Parser of content and of calls between Hermes's tags.

    Text between tags that is not a call to one of `names` is content, tags included. A call that is cut off before its
    arguments is dropped. Unless `parallel`, so is every call after the first.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._inside = False
        self._arguments: _Object | None = None
        self._count = 0
        self._blank: str | None = None
        """White space since the last call, if there was nothing else"""

    @property
    def calls(self) -> bool:
        return self._count > 0

    def push(self, text: str) -> Piece:
        piece = Piece()
        self._held += text
        while self._advance(piece):
            pass
        return piece

    def finish(self, *, cut: bool = False) -> Piece:
        """Parse the rest; the closing tag may be missing, as some models stop before it."""
        piece, held = Piece(), self._held
        self._held = ""
        if self._arguments is not None:
            return piece
        if not self._inside:
            self._say(held, piece)
        elif not (cut and _may_be_call(held, self._names)):
            self._close(held, OPEN_TAG + held, piece)
        return piece

    def _advance(self, piece: Piece) -> bool:
        """Parse the unambiguous part of the held text. Returns whether there may be more."""
        if self._arguments is not None:
            return self._pass_on(self._arguments, piece)
        return self._read_inside(piece) if self._inside else self._read_outside(piece)

    def _read_outside(self, piece: Piece) -> bool:
        before, tag, rest = self._held.partition(OPEN_TAG)
        if not tag:
            certain = len(self._held) - _overlap(self._held, OPEN_TAG)
            before, rest = self._held[:certain], self._held[certain:]
        self._say(before, piece)
        self._held, self._inside = rest, bool(tag)
        return bool(tag)

    def _read_inside(self, piece: Piece) -> bool:
        before, tag, rest = self._held.partition(CLOSE_TAG)
        head = _HEAD.match(before)
        name = _name(head, self._names)
        if head is not None and name is not None:
            self._held = self._held[head.end() :]
            self._arguments = _Object()
            self._begin(call_of(self._count, name, ""), piece)
            return True
        if tag:
            self._held, self._inside = rest, False
            self._close(before, OPEN_TAG + before + CLOSE_TAG, piece)
        return bool(tag)

    def _pass_on(self, arguments: "_Object", piece: Piece) -> bool:
        """Stream the arguments; text between them and the next tag is dropped."""
        part, self._held = arguments.take(self._held)
        if part and self._wanted:
            piece.calls.append(_more(self._count - 1, part))
        if not arguments.ended:
            return False
        ends = {tag: index for tag in (OPEN_TAG, CLOSE_TAG) if (index := self._held.find(tag)) >= 0}
        if not ends:
            kept = max(_overlap(self._held, OPEN_TAG), _overlap(self._held, CLOSE_TAG))
            self._held = self._held[len(self._held) - kept :]
            return False
        tag = min(ends, key=ends.__getitem__)
        self._held = self._held[ends[tag] + len(tag) :]
        self._arguments, self._inside = None, tag == OPEN_TAG
        return True

    @property
    def _wanted(self) -> bool:
        """Whether the latest call is reported."""
        return self._parallel or self._count == 1

    def _begin(self, call: ToolCall, piece: Piece) -> None:
        self._count += 1
        self._blank = ""
        if self._wanted:
            piece.calls.append(call)

    def _say(self, text: str, piece: Piece) -> None:
        """Add content, but no white space between calls or after the last call."""
        if self._blank is None:
            piece.content += text
            return
        self._blank += text
        if self._blank.strip():
            piece.content += self._blank
            self._blank = None

    def _close(self, text: str, whole: str, piece: Piece) -> None:
        call = as_call(text, self._count, self._names)
        if call is None:
            self._say(whole, piece)
        else:
            self._begin(call, piece)


class RequiredCallParser:
    """Parser of text that is one call to one of `names`, as JSON. None of it is content, even if it is cut off."""

    def __init__(self, names: Collection[str]) -> None:
        self.calls = False
        self._names = names
        self._held = ""
        self._arguments = _Object()

    def push(self, text: str) -> Piece:
        if self.calls:
            return self._pass_on(text)
        self._held += text
        head = _HEAD.match(self._held)
        name = _name(head, self._names)
        if head is None or name is None:
            return Piece()
        self.calls = True
        first = self._pass_on(self._held[head.end() :])
        return Piece(calls=[call_of(0, name, ""), *first.calls])

    def finish(self, *, cut: bool = False) -> Piece:
        """Parse a call whose arguments are not an object."""
        call = None if self.calls else as_call(self._held, 0, self._names)
        self.calls = self.calls or call is not None
        return Piece(calls=[call] if call else [])

    def _pass_on(self, text: str) -> Piece:
        part, _ = self._arguments.take(text)
        return Piece(calls=[_more(0, part)] if part else [])


class NamedCallParser:
    """Parser for a forced call: the whole text is the function's JSON arguments."""

    calls = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> Piece:
        if self._begun:
            return Piece(calls=[_more(0, text)] if text else [])
        self._begun = True
        return Piece(calls=[call_of(0, self._name, text)])

    def finish(self, *, cut: bool = False) -> Piece:
        return Piece() if self._begun else self.push("")


class _Object:
    """Finds the end of a JSON object in streamed text."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = -1
        """Index of an escaped character, relative to the next text"""

    def take(self, text: str) -> tuple[str, str]:
        """Split `text` into the part that belongs to the object, and the rest."""
        if self.ended:
            return "", text
        for mark in _BRACKET.finditer(text):
            if mark.start() == self._escaped:
                continue
            if self._ends(mark[0], mark.start()):
                return text[: mark.end()], text[mark.end() :]
        self._escaped -= len(text)
        return text, ""

    def _ends(self, mark: str, index: int) -> bool:
        if mark == "\\":
            self._escaped = index + 1
        elif mark == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += 1 if mark in "{[" else -1
            self.ended = self._depth <= 0
        return self.ended


def as_call(text: str, index: int, names: Collection[str]) -> ToolCall | None:
    """Parse a call to one of `names`; None if `text` is not such a call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call_of(index, call["name"], _encodable(arguments))


def call_of(index: int, name: str, arguments: str) -> ToolCall:
    """Create a tool call, or its first part, with a new id."""
    function = FunctionCall(_encodable(name), arguments)
    return ToolCall(index=index, id=f"call_{uuid4().hex[:24]}", type="function", function=function)


def _more(index: int, arguments: str) -> ToolCall:
    return ToolCall(index=index, function=FunctionCall(UNSET, arguments))


def _name(head: re.Match[str] | None, names: Collection[str]) -> str | None:
    """Function name in the head of a call, if it is among `names`."""
    if head is None:
        return None
    try:
        name = json.loads(head[1])
    except ValueError:
        return None
    return str(name) if name in names else None


def _may_be_call(text: str, names: Collection[str]) -> bool:
    """Whether `text` may be the beginning of a call, but not a whole one."""
    head = _HEAD.match(text)
    return as_call(text, 0, names) is None and (head is None or _name(head, names) is not None) and _opens(text)


def _opens(text: str) -> bool:
    return text.lstrip()[:1] in ("", "{")


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which JSON can contain but UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


def _overlap(text: str, tag: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `tag`."""
    return next((count for count in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-count:])), 0)
