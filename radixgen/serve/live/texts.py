"""Text of drawn nodes: decoded a few nodes at a time, cached while they are drawn, bounded in total."""

import logging
from collections.abc import Callable, Iterable, Sequence

from radixgen.core import Limits
from radixgen.serve.live.frames import NodeTokens, Text

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]

MAX_TOKENS = 2_048
"""Maximum number of tokens of a node that are decoded"""
_MAX_CHARS = 8_192
"""Maximum length of a node's text, in characters"""
_TICK_TOKENS = 4_096
_TICK_NODES = 256
"""Maximum numbers of tokens and nodes that are decoded at a time"""


class Texts:
    """Texts of nodes. Half of the allowed characters is divided evenly among nodes, the rest goes to the first."""

    def __init__(self, limits: Limits) -> None:
        self._base = limits.max_shown_chars // (2 * limits.max_shown_nodes)
        self._left = limits.max_shown_chars // 2
        self._texts: dict[int, str] = {}
        self._cut: set[int] = set()
        """Nodes whose text is cut off, so that it does not grow any more"""
        self._due: dict[int, int] = {}
        """Nodes to decode, with their numbers of tokens"""

    def update(self, fresh: Iterable[tuple[int, int]], grown: Iterable[tuple[int, int]], gone: Iterable[int]) -> None:
        """Update the set of nodes to decode.

        fresh: nodes that are new or were split, with their numbers of tokens.
        grown: nodes that changed otherwise, with their numbers of tokens.
        gone: nodes that are no longer drawn.
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
        """Nodes to decode next, oldest first."""
        wanted: list[int] = []
        tokens = 0
        for node_id, known in self._due.items():
            tokens += known
            if wanted and (tokens > _TICK_TOKENS or len(wanted) == _TICK_NODES):
                break
            wanted.append(node_id)
        return wanted

    def learn(self, read: Iterable[tuple[NodeTokens, str]]) -> list[Text]:
        """Store decoded texts. Returns those that changed."""
        changed = []
        for node, whole in read:
            self._due.pop(node.id, None)
            before = self._texts.get(node.id, "")
            text = whole[: self._room(before)]
            if not node.complete or len(text) < len(whole):
                self._cut.add(node.id)
            if text != before:
                self._set(node.id, text)
                append = bool(before) and text.startswith(before)
                changed.append(Text(node.id, append, text[len(before) :] if append else text))
        return changed

    def whole(self) -> list[Text]:
        """All texts."""
        return [Text(node_id, False, text) for node_id, text in self._texts.items()]

    def _room(self, text: str) -> int:
        """Maximum length of the text of a node that currently has `text`, in characters."""
        return min(_MAX_CHARS, self._base + self._left + max(0, len(text) - self._base))

    def _set(self, node_id: int, text: str) -> None:
        before = self._texts.get(node_id, "")
        self._left += max(0, len(before) - self._base) - max(0, len(text) - self._base)
        self._texts[node_id] = text


def plain(text: str) -> str:
    """`text` without lone surrogates, which JSON parsers reject."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_of(captured: NodeTokens, decode: Decode) -> str:
    """Decode the tokens of a node; empty if the tokenizer fails."""
    try:
        return plain(decode(captured.tokens.tolist()))
    except Exception:
        logger.exception("could not decode the text of node %d", captured.id)
        return ""
