"""The text of drawn nodes: made a little at a time, kept while they are drawn, bounded in all."""

import logging
from collections.abc import Callable, Iterable, Sequence

from radixgen.core import Limits
from radixgen.serve.live.frames import Captured, Text

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]

MAX_TOKENS = 2_048
"""Of one node, that are turned into text"""
_MAX_CHARS = 8_192
"""Of one node"""
_TICK_TOKENS = 4_096
_TICK_NODES = 256
"""Turned into text at a time, at the most"""


class Texts:
    """Half of the characters that there may be are shared out evenly; the other half goes to those who come first."""

    def __init__(self, limits: Limits) -> None:
        self._base = limits.max_shown_chars // (2 * limits.max_shown_nodes)
        self._left = limits.max_shown_chars // 2
        self._texts: dict[int, str] = {}
        self._cut: set[int] = set()
        """Nodes whose text ends before they do, so that it does not grow with them"""
        self._due: dict[int, int] = {}
        """Nodes whose text is to be made, with how many tokens that takes"""

    def update(self, fresh: Iterable[tuple[int, int]], grown: Iterable[tuple[int, int]], gone: Iterable[int]) -> None:
        """Take note of nodes that are new or were split, of such that changed otherwise, both with how many tokens they
        have, and of such that went.
        """
        for node_id in gone:
            self._due.pop(node_id, None)
            self._set(node_id, "")
            self._texts.pop(node_id, None)
            self._cut.discard(node_id)
        for node_id, known in fresh:
            self._cut.discard(node_id)
            self._due[node_id] = min(known, MAX_TOKENS)
        for node_id, known in grown:
            if node_id not in self._cut:
                self._due[node_id] = min(known, MAX_TOKENS)

    def wanted(self) -> list[int]:
        """The nodes whose tokens are to be captured next; the longest due come first."""
        found: list[int] = []
        tokens = 0
        for node_id, known in self._due.items():
            tokens += known
            if found and (tokens > _TICK_TOKENS or len(found) == _TICK_NODES):
                break
            found.append(node_id)
        return found

    def learn(self, read: Iterable[tuple[Captured, str]]) -> list[Text]:
        """Take over what tokens were as text; what of it is news."""
        news = []
        for one, whole in read:
            self._due.pop(one.id, None)
            before = self._texts.get(one.id, "")
            text = whole[: self._room(before)]
            if not one.complete or len(text) < len(whole):
                self._cut.add(one.id)
            if text != before:
                self._set(one.id, text)
                append = bool(before) and text.startswith(before)
                news.append(Text(one.id, append, text[len(before) :] if append else text))
        return news

    def whole(self) -> list[Text]:
        """All that is known."""
        return [Text(node_id, False, text) for node_id, text in self._texts.items()]

    def _room(self, text: str) -> int:
        """Characters that a node may have which has `text`."""
        return min(_MAX_CHARS, self._base + self._left + max(0, len(text) - self._base))

    def _set(self, node_id: int, text: str) -> None:
        before = self._texts.get(node_id, "")
        self._left += max(0, len(before) - self._base) - max(0, len(text) - self._base)
        self._texts[node_id] = text


def plain(text: str) -> str:
    """`text` as every JSON reader takes it: without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_of(captured: Captured, decode: Decode) -> str:
    """The text of what was captured; none where the tokenizer fails."""
    try:
        return plain(decode(captured.tokens.tolist()))
    except Exception:
        logger.exception("the text of node %d could not be made", captured.id)
        return ""
