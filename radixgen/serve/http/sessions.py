"""Conversations that the server keeps, so that what a model generated stays, token by token, when it is sent again."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from radixgen.chat_history import ChatHistory, Draft
from radixgen.chat_template import ChatTemplate, Message
from radixgen.core import CompletionOutput, Limits

_KEEP_SECONDS = 3600.0

Key = tuple[str, str]
"""A namespace and the id that a caller chose in it"""


@dataclass(slots=True)
class _Session:
    """A history, and its answers as they were told: with tool calls taken out of their text."""

    history: ChatHistory
    told: dict[int, Message] = field(default_factory=dict)
    """By their place among the history's messages"""
    used: float = 0.0

    def knows(self, turn: int, messages: tuple[Message, ...]) -> bool:
        """Whether `messages` begin with those up to the end of a turn."""
        held = self.history.turns[turn].messages
        if len(held) > len(messages):
            return False
        own = (self.told.get(place, message) for place, message in enumerate(held))
        return all(_same(one, other) for one, other in zip(own, messages, strict=False))


@dataclass(slots=True)
class Turn:
    """A turn of a session under way: its draft, and the history that it goes on from."""

    key: Key
    draft: Draft
    session: _Session


class Sessions:
    """At most `Limits.max_sessions` of them; one that was not used for an hour is forgotten. May be used by several
    threads: a turn works on copies, and which of two at the same time ends last is kept.
    """

    def __init__(self, limits: Limits, eos_token_ids: frozenset[int]) -> None:
        self._most = limits.max_sessions
        self._eos_token_ids = eos_token_ids
        self._sessions: OrderedDict[Key, _Session] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, key: Key, template: ChatTemplate, messages: tuple[Message, ...]) -> Turn:
        """The turn that `messages`, the whole chat, ask for: it goes on from the latest turn that they begin with.
        Raises `InvalidRequest`.
        """
        held = self._sessions.get(key)
        if held is not None and held.used < time.monotonic() - _KEEP_SECONDS:
            held = None
        fresh = held is None or not _same_template(held.history.template, template)
        if held is None or fresh:
            held = _Session(ChatHistory(template))
        history = held.history.fork()
        session = _Session(history, dict(held.told))
        turn = next(turn for turn in range(history.num_turns, -1, -1) if session.knows(turn, messages))
        history.rollback(turn)
        return Turn(key, history.draft(messages[len(history.state.messages) :]), session)

    def end(self, turn: Turn, output: CompletionOutput, told: Message, *, include_stop: bool = False) -> None:
        """Keep the answer: `output` as it was generated, `told` as the caller was told of it."""
        if output.finish_reason == "error" or not output.token_ids:
            return
        session, now = turn.session, time.monotonic()
        session.told = {place: one for place, one in session.told.items() if place < len(turn.draft.messages)}
        session.told[len(turn.draft.messages)] = told
        session.history.answer(turn.draft, output, self._eos_token_ids, include_stop=include_stop)
        session.used = now
        with self._lock:
            self._sessions[turn.key] = session
            self._sessions.move_to_end(turn.key)
            while len(self._sessions) > self._most or next(iter(self._sessions.values())).used < now - _KEEP_SECONDS:
                self._sessions.popitem(last=False)


def _same_template(one: ChatTemplate, other: ChatTemplate) -> bool:
    return one.tools == other.tools and one.options == other.options


def _same(one: Message, other: Message) -> bool:
    return _said(one) == _said(other)


def _said(message: Message) -> tuple[Any, ...]:
    """What makes two messages the same one: not the ids of calls, nor fields that are null."""
    calls = message.get("tool_calls") or []
    return message.get("role"), message.get("content") or "", [_call(one) for one in calls], message.get("tool_call_id")


def _call(call: Mapping[str, Any]) -> Any:
    return call.get("function", call)
