"""Conversations that the server keeps, so that what a model generated stays, token by token, when it is sent again."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from radixgen.chat_history import ChatHistory, Draft
from radixgen.chat_template import ChatTemplate, Message
from radixgen.core import CompletionOutput, Limits, SamplingParams
from radixgen.serve.http.session_sizes import bytes_of, new_bytes

_KEEP_SECONDS = 3600.0


class Key(NamedTuple):
    """Whose a session is, and the id that the caller chose for it in a namespace."""

    tenant: str
    namespace: str
    session_id: str


@dataclass(slots=True)
class _Session:
    """A history, and its answers as they were told: with tool calls taken out of their text."""

    history: ChatHistory
    told: dict[int, Message] = field(default_factory=dict)
    """By their place among the history's messages"""
    sizes: list[int] = field(default_factory=list)
    """Bytes that are held up to the end of each of the history's turns"""
    used: float = 0.0

    @property
    def num_bytes(self) -> int:
        return self.sizes[-1]

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
    """At most `Limits.max_sessions` of them, in `max_session_bytes`: beyond, the tenant that has the most loses the one
    that it used last longest ago. One that was not used for an hour is forgotten. May be used by several threads: a
    turn works on copies, and which of two at the same time ends last is kept.
    """

    def __init__(self, limits: Limits, eos_token_ids: frozenset[int]) -> None:
        self._most = limits.max_sessions
        self._most_bytes = limits.max_session_bytes
        self._eos_token_ids = eos_token_ids
        self._sessions: OrderedDict[Key, _Session] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """Of memory that they hold."""
        with self._lock:
            return sum(one.num_bytes for one in self._sessions.values())

    def begin(self, key: Key, template: ChatTemplate, messages: tuple[Message, ...]) -> Turn:
        """The turn that `messages`, the whole chat, ask for: it goes on from the latest turn that they begin with.
        Raises `InvalidRequest`.
        """
        held = self._sessions.get(key)
        if held is not None and held.used < time.monotonic() - _KEEP_SECONDS:
            held = None
        fresh = held is None or not _same_template(held.history.template, template)
        if held is None or fresh:
            held = _Session(ChatHistory(template), sizes=[bytes_of([template.tools, template.options])])
        history = held.history.fork()
        session = _Session(history, dict(held.told))
        turn = next(turn for turn in range(history.num_turns, -1, -1) if session.knows(turn, messages))
        history.rollback(turn)
        session.sizes = held.sizes[: len(history.turns)]
        return Turn(key, history.draft(messages[len(history.state.messages) :]), session)

    def end(self, turn: Turn, output: CompletionOutput, told: Message, params: SamplingParams) -> None:
        """Keep the answer: `output` as `params` asked for it, `told` as the caller was told of it."""
        if output.finish_reason == "error" or not output.token_ids:
            return
        session, now = turn.session, time.monotonic()
        session.told = {place: one for place, one in session.told.items() if place < len(turn.draft.messages)}
        session.told[len(turn.draft.messages)] = told
        before = session.history.turns[-1]
        session.history.answer(
            turn.draft,
            output,
            self._eos_token_ids,
            include_stop=params.include_stop_str_in_output,
            show_special=not params.skip_special_tokens,
        )
        session.sizes.append(session.num_bytes + new_bytes(before, session.history.state) + bytes_of(told))
        del session.sizes[: -len(session.history.turns)]
        session.used = now
        with self._lock:
            self._sessions[turn.key] = session
            self._sessions.move_to_end(turn.key)
            self._forget(now)

    def _forget(self, now: float) -> None:
        """What is too old, and what is too much."""
        while next(iter(self._sessions.values())).used < now - _KEEP_SECONDS:
            self._sessions.popitem(last=False)
        while len(self._sessions) > self._most:
            self._forget_one(lambda _: 1)
        while sum(one.num_bytes for one in self._sessions.values()) > self._most_bytes:
            self._forget_one(lambda one: one.num_bytes)

    def _forget_one(self, weigh: Callable[[_Session], int]) -> None:
        """The oldest of the tenant that has the most."""
        weights: Counter[str] = Counter()
        for key, one in self._sessions.items():
            weights[key.tenant] += weigh(one)
        ((largest, _),) = weights.most_common(1)
        del self._sessions[next(key for key in self._sessions if key.tenant == largest)]


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
