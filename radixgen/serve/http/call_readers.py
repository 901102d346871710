"""Tool calls in what a model writes: Hermes's `<tool_call>{"name": …, "arguments": …}</tool_call>`, or by grammar.

Arguments are passed on as they come. A name that was not offered makes no call.
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
"""A call up to its arguments, where these are an object"""
_BRACKET = re.compile(r'["{}\[\]\\]')


@dataclass(slots=True)
class Piece:
    """What some new text comes to. Of a call that is sent in parts, only the first has a name."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Reader(Protocol):
    """Reads the streamed text of one choice."""

    @property
    def calls(self) -> bool:
        """Whether there was a call that ends the choice with `tool_calls`."""

    def push(self, text: str) -> Piece: ...

    def finish(self, *, cut: bool = False) -> Piece:
        """What was held back, at the end of the text; `cut` where `max_tokens` ended it."""


class PlainReader:
    """All is content."""

    calls = False

    def push(self, text: str) -> Piece:
        return Piece(text)

    def finish(self, *, cut: bool = False) -> Piece:
        return Piece()


class HermesReader:
    """Content, and between tags calls. What is no call to one of `names` stays content, tags and all; the beginning of
    a call that was cut before its arguments is dropped. Where not `parallel`, so is every call after the first.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self._names = names
        self._parallel = parallel
        self._held = ""
        self._inside = False
        self._arguments: _Object | None = None
        self._count = 0
        self._blank: str | None = None
        """White space since the last call, where there was nothing else"""

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
        """The closing tag may be missing: some models end instead."""
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
        """Take what is certain of the text that is held. Whether there may be more."""
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
        """Arguments as they come; behind them all up to a tag is layout."""
        part, self._held = arguments.take(self._held)
        if part and self._wanted:
            piece.calls.append(_more(self._count - 1, part))
        if not arguments.ended:
            return False
        ends = {tag: place for tag in (OPEN_TAG, CLOSE_TAG) if (place := self._held.find(tag)) >= 0}
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
        """Whether the call that was begun last is sent."""
        return self._parallel or self._count == 1

    def _begin(self, call: ToolCall, piece: Piece) -> None:
        self._count += 1
        self._blank = ""
        if self._wanted:
            piece.calls.append(call)

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
        call = as_call(text, self._count, self._names)
        if call is None:
            self._say(whole, piece)
        else:
            self._begin(call, piece)


class RequiredReader:
    """The whole text is one call, as JSON, to one of `names`. None of it is content, cut or not."""

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
        """Arguments that are no object come at the end."""
        call = None if self.calls else as_call(self._held, 0, self._names)
        self.calls = self.calls or call is not None
        return Piece(calls=[call] if call else [])

    def _pass_on(self, text: str) -> Piece:
        part, _ = self._arguments.take(text)
        return Piece(calls=[_more(0, part)] if part else [])


class NamedReader:
    """The whole text is the arguments of the function that was named."""

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
    """The end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = -1
        """Place of a character behind a backslash, from the beginning of the next text"""

    def take(self, text: str) -> tuple[str, str]:
        """What of `text` belongs to the object, and the rest."""
        if self.ended:
            return "", text
        for mark in _BRACKET.finditer(text):
            if mark.start() == self._escaped:
                continue
            if self._ends(mark[0], mark.start()):
                return text[: mark.end()], text[mark.end() :]
        self._escaped -= len(text)
        return text, ""

    def _ends(self, mark: str, place: int) -> bool:
        if mark == "\\":
            self._escaped = place + 1
        elif mark == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += 1 if mark in "{[" else -1
            self.ended = self._depth <= 0
        return self.ended


def as_call(text: str, index: int, names: Collection[str]) -> ToolCall | None:
    """A call to one of `names` as models write it; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or found["name"] not in names:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call_of(index, found["name"], _encodable(arguments))


def call_of(index: int, name: str, arguments: str) -> ToolCall:
    """The first part of a call, or all of it."""
    function = FunctionCall(_encodable(name), arguments)
    return ToolCall(index=index, id=f"call_{uuid4().hex[:24]}", type="function", function=function)


def _more(index: int, arguments: str) -> ToolCall:
    return ToolCall(index=index, function=FunctionCall(UNSET, arguments))


def _name(head: re.Match[str] | None, names: Collection[str]) -> str | None:
    """The name in a call's head, if it was offered."""
    if head is None:
        return None
    try:
        name = json.loads(head[1])
    except ValueError:
        return None
    return str(name) if name in names else None


def _may_be_call(text: str, names: Collection[str]) -> bool:
    """Whether `text`, which is no whole call, may be the beginning of one."""
    head = _HEAD.match(text)
    return as_call(text, 0, names) is None and (head is None or _name(head, names) is not None) and _opens(text)


def _opens(text: str) -> bool:
    return text.lstrip()[:1] in ("", "{")


def _encodable(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can write and UTF-8 can't."""
    return text.encode("utf-8", "replace").decode()


def _overlap(text: str, tag: str) -> int:
    """How many of the last characters of `text` may be the beginning of `tag`."""
    return next((count for count in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-count:])), 0)
