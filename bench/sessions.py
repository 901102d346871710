"""Sessions of requests, each going on from the ones before: read from traces, or made up from a seed.

A prompt is a sequence of *units*, the trace's own blocks (`Workload.unit` tokens); equal ids at the same place after
equal ids are equal tokens. Ids below `SHARED` mean the same in all sessions, others are a session's own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import Lock

SHARED = 1 << 22
LONGEST_PAUSE = 3_600.0
"""Seconds: a longer pause between two requests of a trace is cut to this."""
SYSTEM_PROMPT = 16_384
"""Tokens that all coding-agent sessions are given in common; the trace does not say what they have in common."""

Units = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. `pause`: seconds since the one before it was sent, 0 for the first of a session."""

    pause: float
    runs: tuple[tuple[int, int], ...]
    """The prompt's units as (first id, how many that follow it)"""
    prompt_tokens: int
    output_tokens: int

    def prompt(self, copy: int) -> Units:
        """Unit ids, int32, with the session's own shifted by `copy`."""
        pieces = [np.arange(first, first + count) + (copy if first >= SHARED else 0) for first, count in self.runs]
        return np.concatenate(pieces).astype(np.int32)


Session = Sequence[Turn]


@dataclass(slots=True, eq=False)
class Player:
    """One of the sessions that are alive, at its request `turn`. `copy` makes its tokens differ from all others'."""

    slot: int
    session: Session
    turn: int
    copy: int


@dataclass(slots=True, eq=False)
class Request:
    """One that was sent. `number` counts them in order of arrival."""

    number: int
    player: Player
    turn: Turn
    prompt: Units
    hashes: list[int]
    arrived: float
    replica: int = -1
    attempts: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    lock: Lock | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions of one kind, and how many tokens a unit has."""

    name: str
    unit: int
    sessions: Sequence[Session]

    @property
    def turns(self) -> int:
        return sum(len(session) for session in self.sessions)


def own_ids(session: Session) -> int:
    """How many ids a session's own take up: the ids of two copies differ by this much."""
    return max(1, *(first + count - SHARED for turn in session for first, count in turn.runs))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_agents(path: Path) -> Workload:
    """Coding-agent sessions: `session`, `t` (s), `in`, `out` (tokens), `runs` of ids of blocks of 64 tokens a line."""
    unit = 64
    sessions: dict[str, list[Turn]] = {}
    before: dict[str, float] = {}
    for record in _records(path):
        name, time = record["session"], float(record["t"])
        pause = min(time - before.get(name, time), LONGEST_PAUSE)
        before[name] = time
        runs = _with_system_prompt([(SHARED + first, count) for first, count in record["runs"]], SYSTEM_PROMPT // unit)
        sessions.setdefault(name, []).append(Turn(max(pause, 0.0), runs, record["in"], max(record["out"], 1)))
    return Workload("coding agents", unit, list(sessions.values()))


def _with_system_prompt(runs: Sequence[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """The first `count` units are those that all sessions share."""
    total = sum(length for _, length in runs)
    kept = [(0, min(count, total))]
    place = 0
    for first, length in runs:
        skip = min(max(count - place, 0), length)
        if skip < length:
            kept.append((first + skip, length - skip))
        place += length
    return tuple(kept)


def read_conversations(path: Path) -> Workload:
    """Mooncake's trace: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens a line.

    It does not name sessions. A request goes on with the session that has the second block of its prompt, else it
    begins one; the first block is every session's.
    """
    sessions: list[list[Turn]] = []
    session_of: dict[int, int] = {}
    ids: list[dict[int, int]] = []
    before: dict[int, float] = {}
    for record in _records(path):
        blocks, time = record["hash_ids"], record["timestamp"] / 1e3
        number = session_of.get(blocks[1], len(sessions)) if len(blocks) > 1 else len(sessions)
        if number == len(sessions):
            sessions.append([])
            ids.append({})
        pause = min(time - before.get(number, time), LONGEST_PAUSE)
        before[number] = time
        session_of.update(dict.fromkeys(blocks[1:], number))
        own = ids[number]
        runs = ((0, 1), *_runs([SHARED + own.setdefault(block, len(own)) for block in blocks[1:]]))
        sessions[number].append(Turn(pause, runs, record["input_length"], max(record["output_length"], 1)))
    return Workload("conversations", 512, sessions)


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ids as (first id, how many)."""
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or ids[place] != ids[place - 1] + 1:
            yield ids[start], place - start
            start = place


def make_sessions(name: str, *, unit: int, turns: float, first: int, later: int, count: int = 200) -> Workload:
    """Sessions made up from a fixed seed: `turns` requests on average, a first prompt of `first` tokens in the middle,
    `later` more with each turn; one in ten turns rewrites the last half of the prompt. A quarter of the first prompt is
    all sessions' own beginning.
    """
    rng = np.random.default_rng(0)
    shared = max(first // (4 * unit), 1)
    sessions = []
    for _ in range(count):
        length = max(int(first * rng.lognormal(0, 0.5)) // unit, shared + 1)
        runs = [(0, shared), (SHARED, length - shared)]
        fresh = SHARED + length
        session = []
        for turn in range(int(rng.geometric(1 / turns))):
            added = max(int(later * rng.lognormal(-0.5, 1)) // unit, 1) if turn else 0
            if turn and rng.random() < 0.1:
                kept = max(length // 2, shared + 1)
                runs, added = [(0, shared), (SHARED, kept - shared)], added + length - kept
                length = kept
            if added:
                runs = [*runs, (fresh, added)]
            fresh, length = fresh + added, length + added
            pause = float(min(20 * rng.lognormal(0, 1), LONGEST_PAUSE)) if turn else 0.0
            session.append(Turn(pause, tuple(runs), length * unit, int(rng.geometric(1 / 350))))
        sessions.append(session)
    return Workload(f"{name}, made up", unit, sessions)


def agents_and_conversations(agents: Path | None, conversations: Path | None) -> tuple[Workload, Workload]:
    """Read both workloads from traces; without a trace, sessions of the same form are made up."""
    return (
        read_agents(agents) if agents else make_sessions("coding agents", unit=64, turns=40, first=24_000, later=2_000),
        read_conversations(conversations)
        if conversations
        else make_sessions("conversations", unit=512, turns=1.6, first=8_000, later=4_000),
    )
