"""Reading policies: which keys the rows of a request read.

`Exact` reads all, and is the default. Every other policy is inexact: it changes what the model computes, by as much as
the keys that it leaves out would have changed it. The KV of tokens that were read inexactly is never found by other
policies; the documentation of inexact reading says what is shared.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from radixgen.core.errors import InvalidRequest, check_boolean, check_integer
from radixgen.core.plan import BLOCK, Int64Array

_MOST = 2**31 - 1
_MAX_RANDOM_BLOCKS = 256
_MAX_LEVELS = 31
_MAX_PRESS_WINDOW, _MAX_KERNEL = 1_024, 1_023


@dataclass(frozen=True)
class ReadingPolicy:
    """Base class of all policies. Policies are values: equal ones share what they compute."""

    policy: ClassVar[str]
    """Name in JSON."""

    @property
    def exact(self) -> bool:
        """Whether outputs are those of the model itself."""
        return False

    @property
    def reads_prompt(self) -> bool:
        """Whether prompts are read under the policy, too. Otherwise they are computed exactly, and shared with exact
        requests; only output tokens are read under the policy.
        """
        return False

    def first_read(self, prompt_len: int) -> int:
        """Return the first position of a path that is read under the policy, after a prompt of so many tokens."""
        return 0 if self.reads_prompt else prompt_len

    @property
    def frees(self) -> bool:
        """Whether keys give up their slots once no later row reads them. Requests then share nothing."""
        return False


@dataclass(frozen=True)
class Exact(ReadingPolicy):
    """Every row reads every key of its path."""

    policy: ClassVar[str] = "exact"

    @property
    def exact(self) -> bool:
        return True


EXACT = Exact()


@dataclass(frozen=True)
class PositionPolicy(ReadingPolicy):
    """Base class of policies by which a row's position alone says which keys it reads.

    All rows in the same block of positions read the same keys, up to their own. Every row reads its own block.
    """

    block: int
    prompt: bool

    @property
    def reads_prompt(self) -> bool:
        return self.prompt

    def visible(self, block: int) -> Int64Array:
        """Return the key positions that rows of the block with this index read, `[ranges, 2]`: half-open, ascending,
        disjoint, the last one up to the end of the block.
        """
        raise NotImplementedError

    def _check(self) -> None:
        check_integer("reading.block", self.block, 1, _MOST)
        check_boolean("reading.prompt", self.prompt)


@dataclass(frozen=True, kw_only=True)
class Window(PositionPolicy):
    """The first `sinks` tokens, the `window` tokens before the row's own block, and that block up to the row.

    So a row reads its last `window + 1` to `window + block` tokens. The attention sinks of StreamingLLM (Xiao et al.
    2023, section 3), and the local and global tokens of Longformer (Beltagy et al. 2020, section 3.1) as far as a
    causal model has them.

    sinks, window: tokens. block: number of positions that read the same keys; a new plan is made when a row enters the
    next block. prompt: whether prompts are read like this, too.

    Raises `InvalidRequest`.
    """

    policy: ClassVar[str] = "window"
    sinks: int = 4
    window: int = 1_024
    block: int = 64
    prompt: bool = False

    def __post_init__(self) -> None:
        self._check()
        check_integer("reading.sinks", self.sinks, 0, _MOST)
        check_integer("reading.window", self.window, 0, _MOST)

    def visible(self, block: int) -> Int64Array:
        first, stop = max(block * self.block - self.window, 0), (block + 1) * self.block
        ranges = [(0, stop)] if self.sinks >= first else [(0, self.sinks), (first, stop)]
        return np.array([r for r in ranges if r[1] > 0], np.int64)


@dataclass(frozen=True, kw_only=True)
class BigBird(PositionPolicy):
    """The first `global_blocks`, the last `window_blocks`, and `random_blocks` of those between.

    The row's own block is one of the window. The random blocks of a row depend only on `seed` and the row's block, and
    are the same in every layer and head. BigBird (Zaheer et al. 2020, section 2), as far as a causal model has it.

    block: tokens of a block. prompt: whether prompts are read like this, too.

    Raises `InvalidRequest`.
    """

    policy: ClassVar[str] = "bigbird"
    block: int = 64
    window_blocks: int = 3
    global_blocks: int = 2
    random_blocks: int = 3
    seed: int = 0
    prompt: bool = False

    def __post_init__(self) -> None:
        self._check()
        check_integer("reading.window_blocks", self.window_blocks, 1, _MOST)
        check_integer("reading.global_blocks", self.global_blocks, 0, _MOST)
        check_integer("reading.random_blocks", self.random_blocks, 0, _MAX_RANDOM_BLOCKS)
        check_integer("reading.seed", self.seed, 0, 2**64 - 1)

    def visible(self, block: int) -> Int64Array:
        last = max(block - self.window_blocks + 1, 0)
        first = min(self.global_blocks, last)
        drawn = np.sort(self._random(block, first, last))
        starts = np.concatenate([[0], drawn, [last]]).astype(np.int64)
        stops = np.concatenate([[first], drawn + 1, [block + 1]]).astype(np.int64)
        return _joined(starts, stops) * self.block

    def _random(self, block: int, first: int, last: int) -> Int64Array:
        """Draw blocks in `[first, last)` for the rows of `block`, by the first steps of a shuffle."""
        size = last - first
        count = min(self.random_blocks, size)
        state, moved = _mix(self.seed ^ _mix(block)), dict[int, int]()
        drawn = np.empty(count, np.int64)
        for place in range(count):
            state = _mix(state)
            other = place + state % (size - place)
            drawn[place] = first + moved.get(other, other)
            moved[other] = moved.get(place, place)
        return drawn


@dataclass(frozen=True, kw_only=True)
class Fading(PositionPolicy):
    """As `Window`, and of the tokens before the window one in `ratio`, further away one in `ratio**2`, and so on.

    Level `i` of `levels` reaches from `window * ratio**(i - 1)` to `window * ratio**i` tokens before the row's own
    block, and has the positions in it that `ratio**i` divides. So each level has `window * (ratio - 1) / ratio` tokens,
    the levels together O(log n) of a path of n, and what a row no longer reads is not read by later ones either. The
    cascading KV cache (Willette et al. 2024, section 3.1), with tokens chosen by position alone, at their own
    positions.

    sinks, window: tokens. block: number of positions that read the same keys. prompt: whether prompts are read like
    this, too. free: whether tokens that are not read any more give up their slots; such a request shares nothing, and
    computes its whole path again if it is preempted.

    Raises `InvalidRequest`.
    """

    policy: ClassVar[str] = "fading"
    sinks: int = 4
    window: int = 512
    levels: int = 4
    ratio: int = 2
    block: int = 64
    prompt: bool = False
    free: bool = False

    @property
    def frees(self) -> bool:
        return self.free

    def __post_init__(self) -> None:
        self._check()
        check_boolean("reading.free", self.free)
        check_integer("reading.sinks", self.sinks, 0, _MOST)
        check_integer("reading.window", self.window, 1, _MOST)
        check_integer("reading.levels", self.levels, 1, _MAX_LEVELS)
        check_integer("reading.ratio", self.ratio, 2, _MOST)

    def visible(self, block: int) -> Int64Array:
        own, stop = block * self.block, (block + 1) * self.block
        end = window = own - self.window
        if window <= self.sinks:
            return np.array([(0, stop)], np.int64)
        levels, step = list[Int64Array](), 1
        while end > self.sinks and len(levels) < self.levels:
            step *= self.ratio
            begin = max(own - self.window * step, self.sinks)
            levels.append(np.arange(-(-begin // step) * step, end, step))
            end = begin
        tokens = np.concatenate(levels[::-1])
        starts, stops = np.concatenate([[0], tokens, [window]]), np.concatenate([[self.sinks], tokens + 1, [stop]])
        return _joined(starts.astype(np.int64), stops.astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class TopBlocks(ReadingPolicy):
    """The first `sinks` tokens, the `recent` last ones, and a part of all blocks of keys between, chosen by queries.

    In each layer, every KV head reads the blocks whose keys are likely to get most attention from the rows of the step
    (Quest, Tang et al. 2024, arXiv 2406.10774). Rows that share a prefix choose together. Prompts are read exactly.

    block: slots of a block, 64. budget: fraction of the blocks that is read, on average over the KV heads, more than 0
    and at most 1. recent, sinks: tokens that are always read.

    Raises `InvalidRequest`.
    """

    policy: ClassVar[str] = "top_blocks"
    block: int = BLOCK
    budget: float = 0.125
    recent: int = 128
    sinks: int = 64

    def __post_init__(self) -> None:
        check_integer("reading.block", self.block, BLOCK, BLOCK)
        check_integer("reading.recent", self.recent, 1, _MOST)
        check_integer("reading.sinks", self.sinks, 0, _MOST)
        _check_share("reading.budget", self.budget)


@dataclass(frozen=True, kw_only=True)
class Press(ReadingPolicy):
    """Once a prompt is computed, only those of its keys stay that its end attends to most, and all others are dropped.

    The last `window` tokens stay, the first `sinks`, and those in between with the highest scores. A score is the
    largest attention that any row of the window pays, in any layer and query head, to the token or its neighbours.
    After SnapKV (Li et al. 2024, arXiv 2404.14469, section 4), where each head keeps keys of its own; here all layers
    and heads keep the same ones, because a token has one slot.

    Prompts are computed exactly. Then their last token is read once more, and from it on rows read what stays.
    Requests share it with those that have an equal prompt and an equal policy, and with no others.

    ratio: fraction of the prompt's tokens that stay, more than 0 and at most 1; window and sinks stay in any case.
    window, sinks: tokens. kernel: a token and its neighbours, an odd number of tokens.

    Raises `InvalidRequest`.
    """

    policy: ClassVar[str] = "press"
    ratio: float = 0.25
    window: int = 32
    sinks: int = 4
    kernel: int = 13

    def __post_init__(self) -> None:
        _check_share("reading.ratio", self.ratio)
        check_integer("reading.window", self.window, 1, _MAX_PRESS_WINDOW)
        check_integer("reading.sinks", self.sinks, 0, _MOST)
        check_integer("reading.kernel", self.kernel, 1, _MAX_KERNEL)
        if not self.kernel % 2:
            raise InvalidRequest("reading.kernel", self.kernel, "must be odd")

    def first_read(self, prompt_len: int) -> int:
        return max(prompt_len - 1, 0)

    def num_scored(self, prompt_len: int) -> int:
        """Return the number of a prompt's tokens before the window, which get scores."""
        return max(prompt_len - self.window, 0)

    def kept(self, scores: NDArray[np.floating], prompt_len: int) -> Int64Array:
        """Return the positions of a prompt whose keys stay, `[ranges, 2]`: half-open, ascending, disjoint.

        scores `[num_scored]`: those of the tokens before the window. Of equal scores, the first ones stay.
        """
        recent, sinks = scores.size, min(self.sinks, scores.size)
        most = max(math.ceil(self.ratio * prompt_len) - (prompt_len - recent) - sinks, 0)
        tokens = np.sort(np.argsort(-scores[sinks:], kind="stable")[:most] + sinks)
        starts, stops = np.concatenate([[0], tokens, [recent]]), np.concatenate([[sinks], tokens + 1, [prompt_len]])
        return _joined(starts.astype(np.int64), stops.astype(np.int64))


POLICIES: dict[str, type[ReadingPolicy]] = {
    kind.policy: kind for kind in (Exact, Window, BigBird, Fading, TopBlocks, Press)
}
"""Policies by name."""


def reading_to_json(reading: ReadingPolicy) -> dict[str, Any]:
    """Return a policy as JSON: `{"policy": name, field: value, …}`."""
    return {"policy": reading.policy, **asdict(reading)}


def reading_from_json(value: object) -> ReadingPolicy:
    """Return the policy that `reading_to_json` gave as `value`. Fields may be left out. Raises `InvalidRequest`."""
    if not isinstance(value, Mapping):
        raise InvalidRequest("reading", value, 'must be an object with "policy"')
    name = value.get("policy")
    kind = POLICIES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise InvalidRequest("reading.policy", name, f"must be one of {', '.join(POLICIES)}")
    known = {field.name for field in fields(kind)}
    for field in value:
        if field != "policy" and field not in known:
            raise InvalidRequest(f"reading.{field}", value[field], f"the policy {name} has no such field")
    return kind(**{field: item for field, item in value.items() if field != "policy"})


def check_reading(field: str, value: object) -> None:
    """Raise `InvalidRequest` unless `value` is a policy."""
    if not isinstance(value, tuple(POLICIES.values())):
        raise InvalidRequest(field, value, f"must be a policy of radixgen.reading: {', '.join(POLICIES)}")


def _check_share(field: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InvalidRequest(field, value, "must be more than 0 and at most 1")


def _joined(starts: Int64Array, stops: Int64Array) -> Int64Array:
    """Return ascending half-open ranges as `[ranges, 2]`, without empty ones, those that touch joined."""
    starts, stops = starts[starts < stops], stops[starts < stops]
    apart = starts[1:] > stops[:-1]
    return np.stack([starts[np.append(True, apart)], stops[np.append(apart, True)]], axis=1)


def _mix(value: int) -> int:
    """Scramble 64 bits: SplitMix64 (Steele et al. 2014, section 5)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
