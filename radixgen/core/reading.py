"""Reading policies: which keys the rows of a request read.

`Exact` reads all, and is the default. Every other policy is inexact: it changes what the model computes, by as much as
the keys that it leaves out would have changed it. The KV of tokens that were read inexactly is never found by other
policies; the documentation of inexact reading says what is shared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from radixgen.core.errors import InvalidRequest, check_integer
from radixgen.core.plan import Int64Array

_MOST = 2**31 - 1
_MAX_RANDOM_BLOCKS = 256


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
        if not isinstance(self.prompt, bool):
            raise InvalidRequest("reading.prompt", self.prompt, "must be true or false")


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
        starts, stops = starts[starts < stops], stops[starts < stops]
        apart = starts[1:] > stops[:-1]
        return np.stack([starts[np.append(True, apart)], stops[np.append(apart, True)]], axis=1) * self.block

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


POLICIES: dict[str, type[ReadingPolicy]] = {kind.policy: kind for kind in (Exact, Window, BigBird)}
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
    if not isinstance(value, ReadingPolicy):
        raise InvalidRequest(field, value, f"must be a policy of radixgen.reading: {', '.join(POLICIES)}")


def _mix(value: int) -> int:
    """Scramble 64 bits: SplitMix64 (Steele et al. 2014, section 5)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
