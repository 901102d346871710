"""Sessions: conversations kept by the server, so that resent answers keep the tokens that the model generated.

A session has an id that its caller chose, or it is found by its text: by a digest of all messages up to the end of one
of its turns, as the client received and resends them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from sys import getsizeof
from typing import Any, NamedTuple
from uuid import uuid4

from radixgen.chat.history import ChatHistory, Draft, Superseded, superseded
from radixgen.core import CompletionOutput, Limits, SamplingParams
from radixgen.serve.http.fair_cache import FairCache
from radixgen.serve.http.session_sizes import bytes_of, new_bytes
from radixgen.text.chat_template import ChatTemplate, Message

_KEEP_SECONDS = 3600.0


class SessionOwner(NamedTuple):
    """API key and namespace of a session."""

    key_id: str
    namespace: str


class SessionKey(NamedTuple):
    """Identity of a session: API key, namespace, and its id, which the caller chose unless it is found by its text."""

    key_id: str
    namespace: str
    session_id: str


class _TurnName(NamedTuple):
    """Name by which a turn of a session is found: a digest, or what `Sessions.end` got."""

    key_id: str
    namespace: str
    name: str


@dataclass(slots=True, eq=False)
class _SessionState:
    """A history, and its answers as the client received them: with tool calls extracted from their text."""

    history: ChatHistory
    answers: dict[int, Message] = field(default_factory=dict)
    """Answers by their index among the history's messages"""
    sizes: list[int] = field(default_factory=list)
    """Size of the history up to each of its turns, in bytes"""
    names: list[tuple[_TurnName, ...]] = field(default_factory=lambda: [()])
    """Names of each of its turns"""

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
    digest: "_Digest | None" = None
    """Digest of the messages of a session that is found by its text"""
    extended: _SessionState | None = None
    """The session as it was, if it is found by its text and this turn follows its last one"""


class Sessions:
    """LRU cache of sessions, bounded by `Limits.max_sessions` and `max_session_bytes`. Thread-safe.

    If it is full, the API key with the most sessions loses its least recently used one. Sessions expire after an hour
    without use. Turns work on copies: of two concurrent turns of a session with an id, the one that ends last is kept.
    A session that is found by its text parts into two there.
    """

    def __init__(self, limits: Limits, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._sessions: FairCache[SessionKey, _SessionState] = FairCache(
            limits.max_sessions, limits.max_session_bytes, _KEEP_SECONDS, self._forget_names
        )
        self._keys: dict[_TurnName, SessionKey] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_bytes(self) -> int:
        """Size of all sessions in memory."""
        return self._sessions.num_bytes

    def begin(self, key: SessionKey, template: ChatTemplate, messages: tuple[Message, ...]) -> SessionTurn:
        """Begin a turn for a chat; it extends the latest known turn that the chat starts with.

        messages: the whole chat.

        Raises `InvalidRequest`.
        """
        turn, _ = _begin(key, self._sessions.get(key), template, messages)
        return turn

    def resume(
        self, owner: SessionOwner, template: ChatTemplate, messages: tuple[Message, ...], after: str | None = None
    ) -> SessionTurn:
        """Begin a turn for a chat without a session id; it extends the known turn with the longest common beginning.

        messages: the whole chat.
        after: name of the turn that the chat continues, as `end` got it, which counts more than the text.

        Raises `InvalidRequest`.
        """
        digest = _Digest(template)
        names = [_TurnName(*owner, name) for name in reversed(list(digest.names(messages)))]
        if after is not None:
            names.insert(0, _TurnName(*owner, after))
        key = next((key for name in names if (key := self._keys.get(name)) is not None), None)
        held = None if key is None else self._sessions.get(key)
        new = SessionKey(*owner, uuid4().hex)
        turn, follows = _begin(key or new, held, template, messages)
        turn.digest = digest
        if follows:
            turn.extended = held
        else:
            turn.key, turn.superseded = new, None
        return turn

    def end(
        self,
        turn: SessionTurn,
        output: CompletionOutput,
        answer: Message,
        params: SamplingParams,
        name: str | None = None,
    ) -> None:
        """Save the answer of a turn.

        output: what the engine generated with `params`.
        answer: the message that the client received.
        name: further name of the turn, for `resume`.
        """
        if output.finish_reason == "error" or not output.token_ids:
            return
        session = turn.session
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
        names = self._names_of(turn, answer, name)
        num_bytes = session.num_bytes + new_bytes(before, session.history.state) + bytes_of(answer)
        session.sizes.append(num_bytes + sum(getsizeof(each.name) for each in names))
        session.names.append(names)
        del session.sizes[: -len(session.history.turns)], session.names[: -len(session.history.turns)]
        self._save(turn)

    def _names_of(self, turn: SessionTurn, answer: Message, name: str | None) -> tuple[_TurnName, ...]:
        if turn.digest is None:
            return ()
        digests = [turn.digest.add(answer)]
        owner = turn.key.key_id, turn.key.namespace
        return tuple(_TurnName(*owner, each) for each in (digests if name is None else [*digests, name]))

    def _save(self, turn: SessionTurn) -> None:
        key, session = turn.key, turn.session
        with self._sessions.locked():
            if turn.digest is not None and self._sessions.get(key) is not turn.extended:
                key = SessionKey(key.key_id, key.namespace, uuid4().hex)
            self._sessions.put(key, session, session.num_bytes)
            if self._sessions.get(key) is session:
                self._keys.update((name, key) for names in session.names for name in names)

    def _forget_names(self, key: SessionKey, session: _SessionState) -> None:
        """Remove the names of a session, except those that meanwhile belong to another."""
        for names in session.names:
            for name in names:
                if self._keys.get(name) == key:
                    del self._keys[name]


def _begin(
    key: SessionKey, held: _SessionState | None, template: ChatTemplate, messages: tuple[Message, ...]
) -> tuple[SessionTurn, bool]:
    """Begin a turn of a session. Returns also whether it follows the last turn of a session that was held."""
    fresh = held is None or not _same_template(held.history.template, template)
    if held is None or fresh:
        held = _SessionState(ChatHistory(template), sizes=[bytes_of([template.tools, template.options])])
    last = held.history.state
    history = held.history.fork()
    session = _SessionState(history, dict(held.answers))
    turn = next(turn for turn in range(history.num_turns, -1, -1) if session.knows(turn, messages))
    follows = not fresh and turn == history.num_turns
    history.rollback(turn)
    session.sizes, session.names = held.sizes[: len(history.turns)], held.names[: len(history.turns)]
    draft = history.draft(messages[len(history.state.messages) :])
    return SessionTurn(key, draft, session, superseded(last, draft)), follows


class _Digest:
    """Running digest of the messages of a chat, with its tools and variables."""

    def __init__(self, template: ChatTemplate) -> None:
        self._hash = blake2b(digest_size=16)
        self._add([template.tools, template.options])

    def names(self, messages: tuple[Message, ...]) -> Iterator[str]:
        """Add messages; yield the digest up to each that may end a turn."""
        for message in messages:
            digest = self.add(message)
            if message.get("role") == "assistant":
                yield digest

    def add(self, message: Message) -> str:
        """Add a message, and return the digest."""
        self._add(_identity(message))
        return self._hash.hexdigest()

    def _add(self, value: object) -> None:
        self._hash.update(json.dumps(value, sort_keys=True, default=str).encode())


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
