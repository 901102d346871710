"""Cache hints of HTTP requests: the field `cache_hints`, and Anthropic's `cache_control` in messages."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from msgspec import structs

from radixgen.chat.history import num_common
from radixgen.core import CacheHint, HintResult, InvalidRequest
from radixgen.serve.http.auth import Caller
from radixgen.serve.http.context import Context
from radixgen.serve.http.protocol import CacheHintAnswer, CacheHintFields
from radixgen.text.chat_template import ChatTemplate, Message

_TTLS = {"5m": 300.0, "1h": 3_600.0}
_MAX_BREAKPOINTS = 4
_MARK = "radixgen-breakpoint"


class Breakpoint(NamedTuple):
    """A message, or one of its text parts, with `cache_control`: the prefix up to its end is retained."""

    message: int
    part: int | None
    ttl: float
    """Seconds"""


def hints_of(context: Context, caller: Caller, given: Seq[CacheHintFields] | None) -> list[CacheHint]:
    """Hints of the field `cache_hints`. If there are several keys, only operators may use priorities above 0.

    Raises `InvalidRequest`.
    """
    most = 0 if context.keys.several and not caller.operator else 2**31 - 1
    for index, hint in enumerate(given or ()):
        if hint.priority > most:
            raise InvalidRequest(f"cache_hints[{index}].priority", hint.priority, f"must be at most {most}")
    hints = [CacheHint(**structs.asdict(hint)) for hint in given or ()]
    context.engine.inputs.check_hints(hints)
    return hints


def breakpoints_of(messages: Iterable[Mapping[str, Any]]) -> list[Breakpoint]:
    """Find `cache_control` in the messages of a chat, in their order. Raises `InvalidRequest` if one is malformed."""
    breakpoints = []
    for at, message in enumerate(messages):
        parts = message.get("content")
        blocks = list(enumerate(parts)) if isinstance(parts, list) else []
        for part, block in [*blocks, (None, message)]:
            control = block.get("cache_control") if isinstance(block, Mapping) else None
            if control is not None:
                field = f"messages[{at}]" + ("" if part is None else f".content[{part}]")
                breakpoints.append(Breakpoint(at, part, _ttl(control, f"{field}.cache_control")))
    if len(breakpoints) > _MAX_BREAKPOINTS:
        raise InvalidRequest("len(cache_control)", len(breakpoints), f"must be at most {_MAX_BREAKPOINTS}")
    return breakpoints


def breakpoint_hints(
    breakpoints: Seq[Breakpoint], template: ChatTemplate, marked: Seq[Message], text: str, token_ids: Seq[int]
) -> list[CacheHint]:
    """Hints that retain the prompt up to each breakpoint; 0 tokens of it where the template does not show the message.

    marked: the messages, converted for the template, with the marks of `with_marks`.
    text: render of the messages themselves, whose tokens are `token_ids`.
    """
    if not breakpoints:
        return []
    try:
        rest = template.render(marked)
    except InvalidRequest:
        rest = ""
    lengths, head = [], ""
    for at in range(len(breakpoints)):
        before, found, rest = rest.partition(_mark(at))
        head += before
        lengths.append(num_common(head, text) if found else 0)
    counts = template.count_tokens(token_ids, lengths)
    return [CacheHint("retain", count, point.ttl) for count, point in zip(counts, breakpoints, strict=True)]


def with_marks(messages: Seq[Mapping[str, Any]], breakpoints: Seq[Breakpoint]) -> list[dict[str, Any]]:
    """Copy messages, with a mark in the text at each breakpoint."""
    marked = [dict(message) for message in messages]
    for at, (index, part, _) in enumerate(breakpoints):
        message = marked[index]
        content = message.get("content")
        if isinstance(content, list):
            blocks = message["content"] = list(content)
            part = len(blocks) if part is None else part + 1 + sum(b.message == index for b in breakpoints[:at])
            blocks.insert(part, {"type": "text", "text": _mark(at)})
        else:
            message["content"] = f"{content or ''}{_mark(at)}"
    return marked


def without_cache_control(messages: Seq[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages without `cache_control`, which templates must not see; of parts they see only the text."""
    return [{name: value for name, value in message.items() if name != "cache_control"} for message in messages]


def answers_of(results: Seq[HintResult]) -> list[CacheHintAnswer]:
    """Answers to hints, as the client receives them."""
    return [
        CacheHintAnswer(result.action, result.status, result.num_tokens, result.ttl, result.reason or None)
        for result in results
    ]


def _ttl(control: object, field: str) -> float:
    ttl = control.get("ttl", "5m") if isinstance(control, Mapping) else None
    if (
        not isinstance(control, Mapping)
        or control.get("type") != "ephemeral"
        or control.keys() - {"type", "ttl"}
        or not isinstance(ttl, str)
        or ttl not in _TTLS
    ):
        raise InvalidRequest(field, control, 'must be {"type": "ephemeral"}, with an optional "ttl" of "5m" or "1h"')
    return _TTLS[ttl]


def _mark(index: int) -> str:
    return f"{_MARK}{index}-"
