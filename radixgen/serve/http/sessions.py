"""Sessions: conversations kept by the server, so that resent answers keep the tokens that the model generated."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from radixgen.chat.history import ChatHistory, Draft, Superseded, superseded
from radixgen.core import CompletionOutput, Limits, SamplingParams
from radixgen.serve.http.session_sizes import bytes_of, new_bytes
from radixgen.text.chat_template import ChatTemplate, Message

_KEEP_SECONDS = 3600.0


class SessionKey(NamedTuple):
    """Identity of a session: API key, namespace, and the id that the caller chose."""

    key_id: str
    namespace: str
    session_id: str


@dataclass(slots=True)
class _SessionState:
    """A history, and its answers as the client received them: with tool calls extracted from their text."""

    history: ChatHistory
    answers: dict[int, Message] = field(default_factory=dict)
    """Answers by their index among the history's messages"""
    sizes: list[int] = field(default_factory=list)
    """Size of the history up to each of its turns, in bytes"""
    used: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.sizes[-1]

    def knows(self, turn: int, messages: tuple[Message, ...]) -> bool:
        """Whether `messages` start with those up to the end of a turn."""
        held = self.history.turns[turn].messages
        if len(held) > len(messages):
            return False
        own = (self.answers.get(index, message) for index, message in enumerate(held))
        return all(_same(known, sent) for known, sent in zip(own, messages, strict=False))


@dataclass(slots=True)
class SessionTurn:
    """A turn of a session in progress: its draft, and the history that it extends."""

    key: SessionKey
    draft: Draft
    session: _SessionState
    superseded: Superseded | None
    """What this turn leaves behind of the last one"""


class Sessions:
    """LRU cache of sessions, bounded by `Limits.max_sessions` and `max_session_bytes`. Thread-safe.

    If it is full, the API key with the most sessions loses its least recently used one. Sessions expire after an hour
    without use. Turns work on copies: of two concurrent turns of a session, the one that ends last is kept.
    """

    def __init__(self, limits: Limits, eos_token_ids: frozenset[int]) -> None:
        self._most = limits.max_sessions
        self._most_bytes = limits.max_session_bytes
        self._eos_token_ids = eos_token_ids
        self._sessions: OrderedDict[SessionKey, _SessionState] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """Size of all sessions in memory."""
        with self._lock:
            return sum(session.num_bytes for session in self._sessions.values())

    def begin(self, key: SessionKey, template: ChatTemplate, messages: tuple[Message, ...]) -> SessionTurn:
        """Begin a turn for a chat; it extends the latest known turn that the chat starts with.

        messages: the whole chat.

        Raises `InvalidRequest`.
        """
        held = self._sessions.get(key)
        if held is not None and held.used < time.monotonic() - _KEEP_SECONDS:
            held = None
        fresh = held is None or not _same_template(held.history.template, template)
        if held is None or fresh:
            held = _SessionState(ChatHistory(template), sizes=[bytes_of([template.tools, template.options])])
        last = held.history.state
        history = held.history.fork()
        session = _SessionState(history, dict(held.answers))
        turn = next(turn for turn in range(history.num_turns, -1, -1) if session.knows(turn, messages))
        history.rollback(turn)
        session.sizes = held.sizes[: len(history.turns)]
        draft = history.draft(messages[len(history.state.messages) :])
        return SessionTurn(key, draft, session, superseded(last, draft))

    def end(self, turn: SessionTurn, output: CompletionOutput, answer: Message, params: SamplingParams) -> None:
        """Save the answer of a turn.

        output: what the engine generated with `params`.
        answer: the message that the client received.
        """
        if output.finish_reason == "error" or not output.token_ids:
            return
        session, now = turn.session, time.monotonic()
        index = len(turn.draft.messages)
        session.answers = {earlier: known for earlier, known in session.answers.items() if earlier < index}
        session.answers[index] = answer
        before = session.history.turns[-1]
        session.history.answer(
            turn.draft,
            output,
            self._eos_token_ids,
            include_stop=params.include_stop_str_in_output,
            show_special=not params.skip_special_tokens,
        )
        session.sizes.append(session.num_bytes + new_bytes(before, session.history.state) + bytes_of(answer))
        del session.sizes[: -len(session.history.turns)]
        session.used = now
        with self._lock:
            self._sessions[turn.key] = session
            self._sessions.move_to_end(turn.key)
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Remove expired sessions, and sessions beyond the limits."""
        while next(iter(self._sessions.values())).used < now - _KEEP_SECONDS:
            self._sessions.popitem(last=False)
        while len(self._sessions) > self._most:
            self._forget_oldest(lambda _: 1)
        while sum(session.num_bytes for session in self._sessions.values()) > self._most_bytes:
            self._forget_oldest(lambda session: session.num_bytes)

    def _forget_oldest(self, weigh: Callable[[_SessionState], int]) -> None:
        """Remove the oldest session of the API key with the most."""
        weights: Counter[str] = Counter()
        for key, session in self._sessions.items():
            weights[key.key_id] += weigh(session)
        ((largest, _),) = weights.most_common(1)
        del self._sessions[next(key for key in self._sessions if key.key_id == largest)]


def _same_template(first: ChatTemplate, second: ChatTemplate) -> bool:
    return first.tools == second.tools and first.options == second.options


def _same(first: Message, second: Message) -> bool:
    return _identity(first) == _identity(second)


def _identity(message: Message) -> tuple[Any, ...]:
    """Parts by which messages are compared: not the ids of calls, nor fields that are null."""
    calls = [_call(call) for call in message.get("tool_calls") or []]
    return message.get("role"), message.get("content") or "", calls, message.get("tool_call_id")


def _call(call: Mapping[str, Any]) -> Any:
    return call.get("function", call)
