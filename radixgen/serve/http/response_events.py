"""Events of a streamed response, from the blocks of its answer."""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

from msgspec import UNSET, structs

from radixgen.serve.http.answer_blocks import AnswerBlock, AnswerBlocks, BlockEvent
from radixgen.serve.http.protocol import TokenLogprob
from radixgen.serve.http.response_items import item_of, new_item_id
from radixgen.serve.http.responses_protocol import (
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseBody,
    ResponseEvent,
    ResponseStatus,
)
from radixgen.serve.http.tool_parsers import Piece

_ITEM_TYPES = {"text": "message", "reasoning": "reasoning", "call": "function_call"}
_TEXT_EVENTS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_LAST_EVENTS = {"completed": "response.completed", "failed": "response.failed"}
"""Types of the last event by status; of all others `response.incomplete`"""


class ResponseEvents:
    """Builds a response and the events of its stream."""

    def __init__(self, body: ResponseBody) -> None:
        self.body = body
        self._blocks = AnswerBlocks()
        self._ids: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        """Of the open text block"""
        self._held: list[TokenLogprob] = []
        """Of tokens whose text has not come yet"""
        self._number = -1

    def begin(self) -> Iterator[ResponseEvent]:
        """First events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=structs.replace(self.body))

    def push(self, piece: Piece, logprobs: Seq[TokenLogprob] = ()) -> Iterator[ResponseEvent]:
        """Add a piece of the answer, with the log-probabilities of its tokens."""
        self._held += logprobs
        for event in self._blocks.push(piece):
            yield from self._on(event)

    def finish(self, status: ResponseStatus) -> Iterator[ResponseEvent]:
        """End the answer: set the status of the response, and the items of its output."""
        ended: ResponseStatus = "completed" if status == "completed" else "incomplete"
        for event in self._blocks.finish():
            yield from self._on(event, ended)
        self.body.status = status
        if status == "completed":
            self.body.completed_at = int(time.time())

    def last(self) -> ResponseEvent:
        """Last event, with the whole response."""
        return self._event(_LAST_EVENTS.get(self.body.status, "response.incomplete"), response=self.body)

    def _on(self, event: BlockEvent, status: ResponseStatus = "completed") -> Iterator[ResponseEvent]:
        block = event.block
        if event.kind == "begin":
            self._ids.append(new_item_id(_ITEM_TYPES[block.kind]))
            self._logprobs = []
            yield self._item_event("response.output_item.added", block, item_of(block, self._ids[-1], "in_progress"))
            if block.kind != "call":
                yield self._text_event("response.content_part.added", block, part=_part(block, "", ()))
        elif event.kind == "delta":
            logprobs, self._held = self._held, []
            self._logprobs += logprobs
            own = {"logprobs": logprobs} if block.kind == "text" else {}
            yield self._text_event(f"{_TEXT_EVENTS[block.kind]}.delta", block, delta=event.text, **own)
        else:
            self._logprobs, self._held = self._logprobs + self._held, []
            item = item_of(block, self._ids[block.index], status, self._logprobs)
            self.body.output = [*self.body.output, item]
            yield from self._end(block)
            yield self._item_event("response.output_item.done", block, item)

    def _end(self, block: AnswerBlock) -> Iterator[ResponseEvent]:
        kind = f"{_TEXT_EVENTS[block.kind]}.done"
        if block.kind == "call":
            yield self._text_event(kind, block, name=block.name, arguments=block.text)
            return
        own = {"logprobs": self._logprobs} if block.kind == "text" else {}
        yield self._text_event(kind, block, text=block.text, **own)
        part = _part(block, block.text, self._logprobs)
        yield self._text_event("response.content_part.done", block, part=part)

    def _item_event(self, kind: str, block: AnswerBlock, item: OutputItem) -> ResponseEvent:
        return self._event(kind, output_index=block.index, item=item)

    def _text_event(self, kind: str, block: AnswerBlock, **fields: Any) -> ResponseEvent:
        content_index = UNSET if block.kind == "call" else 0
        place = {"item_id": self._ids[block.index], "output_index": block.index, "content_index": content_index}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number, **fields)


def _part(block: AnswerBlock, text: str, logprobs: Seq[TokenLogprob]) -> OutputText | ReasoningText:
    return OutputText(text=text, logprobs=list(logprobs)) if block.kind == "text" else ReasoningText(text=text)
