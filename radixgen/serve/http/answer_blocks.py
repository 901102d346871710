"""Blocks of an answer, for the routes that stream them: reasoning, texts and tool calls, one after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from msgspec import UNSET

from radixgen.serve.http.protocol import ToolCall
from radixgen.serve.http.tool_parsers import Piece

BlockKind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class AnswerBlock:
    """Part of an answer. `text`: text or reasoning so far; of a tool call, its arguments as JSON."""

    kind: BlockKind
    index: int
    text: str = ""
    call_id: str = ""
    name: str = ""


class BlockEvent(NamedTuple):
    """A block begins, gets more text, or ends."""

    kind: Literal["begin", "delta", "end"]
    block: AnswerBlock
    text: str = ""
    """New text"""


class AnswerBlocks:
    """Blocks of one answer, built from pieces of its text. One block is open at a time.

    White space between blocks is dropped, so that no text block is blank, unless the answer has nothing else.
    """

    def __init__(self) -> None:
        self.blocks: list[AnswerBlock] = []
        self._open: AnswerBlock | None = None
        self._blank = ""

    def push(self, piece: Piece) -> Iterator[BlockEvent]:
        """Add a piece; yield what changes."""
        if piece.reasoning:
            yield from self._extend("reasoning", piece.reasoning)
        if piece.content:
            yield from self._add_text(piece.content)
        for call in piece.calls:
            yield from self._add_call(call)

    def finish(self) -> Iterator[BlockEvent]:
        """End the answer; yield what changes."""
        if not any(block.kind != "reasoning" for block in self.blocks):
            yield from self._begin(AnswerBlock("text", len(self.blocks)))
            yield from self._delta(self._blank)
        yield from self._end()

    def _add_text(self, text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind != "text":
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, ""
        yield from self._extend("text", text)

    def _add_call(self, call: ToolCall) -> Iterator[BlockEvent]:
        if call.id is not UNSET:
            name = "" if call.function.name is UNSET else call.function.name
            yield from self._begin(AnswerBlock("call", len(self.blocks), call_id=call.id, name=name))
        yield from self._delta(call.function.arguments)

    def _extend(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(AnswerBlock(kind, len(self.blocks)))
        yield from self._delta(text)

    def _begin(self, block: AnswerBlock) -> Iterator[BlockEvent]:
        yield from self._end()
        self.blocks.append(block)
        self._open = block
        if block.kind == "call":
            self._blank = ""
        yield BlockEvent("begin", block)

    def _delta(self, text: str) -> Iterator[BlockEvent]:
        if self._open is not None and text:
            self._open.text += text
            yield BlockEvent("delta", self._open, text)

    def _end(self) -> Iterator[BlockEvent]:
        if self._open is not None:
            block, self._open = self._open, None
            yield BlockEvent("end", block)
