"""Kinds of differences between similar texts: timestamps, ids, numbers, order, white space."""

import re
from collections.abc import Collection
from itertools import takewhile
from typing import Literal, NamedTuple, cast

Kind = Literal["timestamp", "id", "number", "white space", "order", "text"]

_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_DATE = (
    r"\d{4}-\d{1,2}-\d{1,2}|\d{4}/\d{1,2}/\d{1,2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}(?:,? \d{{4}})?|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?"
)
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[AaPp][Mm]\b)?(?: ?(?:Z|UTC|GMT)\b)?(?:[+-]\d{2}:?\d{2})?"
_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b"
_VARYING = re.compile(
    rf"(?P<timestamp>\b(?:(?:{_DAY}),? )?(?:{_DATE})(?:(?:T|,? (?:at )?)(?:{_CLOCK})|(?!\w))"
    rf"|\b(?:{_CLOCK})(?!\w)|\b(?:{_DAY})\b|\b1[4-9]\d{{8}}(?:\d{{3}})?(?:\.\d+)?\b)"
    r"|(?P<id>\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"
    r"|\b(?=[A-Za-z_-]*\d)(?=[\d_-]*[A-Za-z])[A-Za-z0-9_-]{8,}\b)"
    r"|(?P<number>\d+(?:[.,]\d+)*)"
)
_REACH = 64
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\w+|[^\w\s]")


class Difference(NamedTuple):
    """Difference of one kind between texts that all start with `head` and end with `tail`."""

    kind: Kind
    head: str
    tail: str

    def covers(self, text: str) -> bool:
        """Whether `text` has this head and tail."""
        long = len(text) >= len(self.head) + len(self.tail)
        return long and text.startswith(self.head) and text.endswith(self.tail)

    def varying(self, text: str) -> str:
        """Part of `text` between head and tail."""
        return text[len(self.head) : len(text) - len(self.tail)]


def common_len(texts: Collection[str]) -> int:
    """Number of leading characters that all texts have in common."""
    first, last = min(texts), max(texts)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def without_spaces(text: str) -> str:
    """`text` without white space."""
    return _SPACE.sub("", text)


def in_order(text: str) -> str:
    """Sorted words of `text` without commas, since the last item of a list has none."""
    return " ".join(sorted(word for word in _WORD.findall(text) if word != ","))


def masked(text: str) -> str:
    """`text` with placeholders for timestamps, ids and numbers."""
    return _VARYING.sub(lambda match: f"<{match.lastgroup}>", text)


def difference(texts: Collection[str]) -> Difference:
    """Difference between at least two texts: from the first to the last varying character, extended to whole words."""
    first = min(texts)
    head = common_len(texts)
    tail = common_len([text[head:][::-1] for text in texts])
    kinds = [_around(text, head) for text in texts]
    if all(kinds):
        spans = cast("list[re.Match[str]]", kinds)
        names = {span.lastgroup for span in spans}
        start = min(span.start() for span in spans)
        tail = min(tail, *(len(text) - span.end() for text, span in zip(texts, spans, strict=True)))
        name = next((kind for kind in ("timestamp", "id", "number") if kind in names), "text")
        return Difference(cast("Kind", name), first[:start], first[len(first) - tail :])
    head = _word_start(first, head)
    tail = _word_start(first[::-1], tail)
    return Difference("text", first[:head], first[len(first) - tail :])


def _around(text: str, offset: int) -> re.Match[str] | None:
    """Match of a timestamp, id or number that contains the character at `offset`, or ends there."""
    matches = takewhile(lambda match: match.start() <= offset, _VARYING.finditer(text, max(0, offset - _REACH)))
    return next((match for match in matches if offset <= match.end()), None)


def _word_start(text: str, offset: int) -> int:
    while offset and not text[offset - 1].isspace():
        offset -= 1
    return offset
