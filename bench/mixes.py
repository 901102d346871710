"""Mixes of requests for `bench.simulate`, which serves them with a pool smaller than their working set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from radixgen.cache import ExtentPool, RadixTree, TokenArray

VOCAB = 1 << 17
OPEN_STREAMS = 128
"""Default number of streams that are open at a time"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `tokens` after the turns before and their answers. `pause`: seconds since the last answer."""

    tokens: TokenArray
    output_length: int
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests that follow one another. `start`: when the first one is sent at the earliest, in seconds."""

    turns: Sequence[Turn]
    start: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the last turn's prompt and answer."""
        return sum(turn.tokens.size + turn.output_length for turn in self.turns)

    def middle(self) -> "Stream":
        """The first half of the turns, at least one."""
        return Stream(self.turns[: (len(self.turns) + 1) // 2], self.start)

    def path(self) -> TokenArray:
        """The last turn's prompt and answer, int32, with zeros for what is generated."""
        pieces = [(turn.tokens, np.zeros(turn.output_length, np.int32)) for turn in self.turns]
        return np.concatenate([tokens for pair in pieces for tokens in pair])


@dataclass(frozen=True, slots=True)
class Mix:
    """Streams in the order in which they begin; the next begins when fewer than `open_streams` are open."""

    name: str
    streams: Sequence[Stream]
    open_streams: int = OPEN_STREAMS

    @property
    def num_requests(self) -> int:
        return sum(len(stream.turns) for stream in self.streams)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(stream.num_tokens for stream in self.streams)

    def working_set(self) -> int:
        """Return the most distinct tokens of streams that are open together, each in the middle of its turns."""
        step, count = self.open_streams, len(self.streams)
        return max(_distinct_tokens(self.streams[at : at + step]) for at in range(0, max(count - step, 0) + 1, step))


def make_agents(agents: int = 48, turns: int = 6) -> Mix:
    """Agents below one system prompt of 8,192 tokens, 32 at a time. Each has 20,000 of its own at first and 4,000 more
    with each turn, which follows the last answer at once.
    """
    rng = np.random.default_rng(0)
    system = _tokens(rng, 8_192)
    streams = []
    for _ in range(agents):
        first = Turn(np.concatenate([system, _tokens(rng, _around(rng, 20_000))]), _around(rng, 100))
        later = [Turn(_tokens(rng, _around(rng, 4_000)), _around(rng, 100)) for _ in range(turns - 1)]
        streams.append(Stream([first, *later]))
    return Mix("agents", streams, open_streams=32)


def make_groups(groups: int = 32, samples: int = 16) -> Mix:
    """Samples of prompts of 4,000 tokens, each a request of its own; those of 8 prompts arrive in any order."""
    rng = np.random.default_rng(1)
    streams: list[Stream] = []
    for _ in range(groups // 8):
        prompts = [_tokens(rng, _around(rng, 4_000)) for _ in range(8)]
        burst = [Stream([Turn(prompt, _around(rng, 100))]) for prompt in prompts for _ in range(samples)]
        streams += [burst[place] for place in rng.permutation(len(burst))]
    return Mix("groups of samples", streams)


def make_documents(documents: int = 16, questions: int = 512) -> Mix:
    """Questions of 60 tokens on documents of 8,000, in any order."""
    rng = np.random.default_rng(2)
    texts = [_tokens(rng, _around(rng, 8_000)) for _ in range(documents)]
    streams = []
    for document in rng.integers(documents, size=questions).tolist():
        question = np.concatenate([texts[document], _tokens(rng, _around(rng, 60))])
        streams.append(Stream([Turn(question, _around(rng, 50))]))
    return Mix("questions on documents", streams)


def mix_of_trace(streams: Sequence[Stream]) -> Mix:
    """The requests of a trace in their order, as fast as they are answered."""
    return Mix("trace", [Stream(stream.turns) for stream in streams])


def _distinct_tokens(streams: Sequence[Stream]) -> int:
    """Return the distinct tokens of the streams, each in the middle of its turns. No two answers are equal."""
    halves = [stream.middle() for stream in streams]
    tree = RadixTree(ExtentPool(sum(half.num_tokens for half in halves)))
    outputs = 0
    for half in halves:
        last = half.turns[-1].output_length
        tree.insert(half.path()[:-last])
        outputs += last
    return tree.unscheduled_tokens + outputs


def _tokens(rng: np.random.Generator, count: int) -> TokenArray:
    return rng.integers(0, VOCAB, count, dtype=np.int32)


def _around(rng: np.random.Generator, middle: int) -> int:
    return max(int(middle * rng.lognormal(0, 0.4)), 1)


MADE: dict[str, Callable[[], Mix]] = {"agents": make_agents, "groups": make_groups, "documents": make_documents}
"""Mixes that are made up from a fixed seed"""
