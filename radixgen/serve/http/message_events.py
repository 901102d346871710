"""Events of a streamed answer in Anthropic's format, from its blocks."""

import json
from collections.abc import Iterator

import msgspec

from radixgen.serve.http.answer_blocks import AnswerBlock, AnswerBlocks, BlockEvent
from radixgen.serve.http.messages_protocol import (
    ContentBlock,
    InputJSONDelta,
    MessageEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from radixgen.serve.http.tool_parsers import Piece

_DELTAS: dict[str, type[TextDelta | ThinkingDelta | InputJSONDelta]] = {
    "text": TextDelta,
    "reasoning": ThinkingDelta,
    "call": InputJSONDelta,
}


class MessageEvents:
    """Builds the content of an answer and the events of its stream."""

    def __init__(self) -> None:
        self._blocks = AnswerBlocks()

    @property
    def content(self) -> list[ContentBlock]:
        """Blocks so far."""
        return [_content_block(block) for block in self._blocks.blocks]

    @property
    def calls(self) -> bool:
        """Whether there are tool calls."""
        return any(block.kind == "call" for block in self._blocks.blocks)

    def push(self, piece: Piece) -> Iterator[MessageEvent]:
        """Add a piece of the answer."""
        return map(_event, self._blocks.push(piece))

    def finish(self) -> Iterator[MessageEvent]:
        """End the answer."""
        return map(_event, self._blocks.finish())


def _event(event: BlockEvent) -> MessageEvent:
    block = event.block
    if event.kind == "begin":
        empty = msgspec.structs.replace(_content_block(block))
        return MessageEvent(type="content_block_start", index=block.index, content_block=empty)
    if event.kind == "delta":
        return MessageEvent(type="content_block_delta", index=block.index, delta=_DELTAS[block.kind](event.text))
    return MessageEvent(type="content_block_stop", index=block.index)


def _content_block(block: AnswerBlock) -> ContentBlock:
    if block.kind == "text":
        return TextBlock(text=block.text)
    if block.kind == "reasoning":
        return ThinkingBlock(thinking=block.text)
    try:
        arguments = json.loads(block.text)
    except ValueError:
        arguments = None
    return ToolUseBlock(id=block.call_id, name=block.name, input=arguments if isinstance(arguments, dict) else {})
