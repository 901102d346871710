"""A model without weights that proves, step by step, that every row reads its own prefix and nothing else.

The 'KV' of a slot is a stamp: a 128-bit hash of the exact prefix that ends with its token. 'Attention' looks
at every slot that the plan tells a row to read, and any that does not hold the row's own prefix raises
`AssertionError`. Logits are a pure function of the stamp, so that a shadow model needs nothing but tokens.

A slot whose KV was moved keeps the stamp of its source, and is marked: it need not continue what stands before it. So
whoever reads it gets other logits than the exact prefix has.

Two things it cannot see by itself. A row of this step that reads the whole prefix of a sibling gets that
sibling's logits: compare them, with `expected_logits`. And it knows no namespaces: equal tokens are equal.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from hashlib import blake2b
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache import DiskTier, KVMoves
from radixgen.core import Plan
from radixgen.core.plan import Int64Array, ScoredPrompt
from radixgen.core.reading import ReadingPolicy

ROOT = bytes(16)
"""The stamp of the empty prefix."""
UNWRITTEN, POISONED = -1, -2
"""Positions of a slot that holds nothing."""
_BLOCK = 16


def extend(stamp: bytes, token: int, policy: ReadingPolicy | None = None) -> bytes:
    """The stamp of a prefix and one more token, which is read under a policy if it is not exact."""
    how = b"" if policy is None or policy.exact else repr(policy).encode()
    return blake2b(stamp + token.to_bytes(8, "little") + how, digest_size=16).digest()


def stamp_of(tokens: Iterable[int]) -> bytes:
    """The stamp of a whole prefix."""
    return reduce(extend, tokens, ROOT)


def logits_of(stamp: bytes, vocab: int) -> NDArray[np.float32]:
    """The logits `[vocab]` that follow a stamp: multiples of 2^-21 in [-4, 4)."""
    return _logits([stamp], vocab)[0]


def expected_logits(tokens: Iterable[int], vocab: int) -> NDArray[np.float32]:
    """The logits `[vocab]` that follow a whole prefix."""
    return logits_of(stamp_of(tokens), vocab)


def stamps_of(stamps: Sequence[bytes]) -> NDArray[np.uint64]:
    """Stamps as numbers, `[stamps, 2]`."""
    return np.frombuffer(b"".join(stamps), np.uint64).reshape(-1, 2)


def key_scores(stamps: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The scores of keys with these stamps, `[keys, 2]`: some of them equal."""
    return (stamps[:, 0] % np.uint64(11)).astype(np.float32)


def _logits(stamps: Sequence[bytes], vocab: int) -> NDArray[np.float32]:
    blocks = [block.to_bytes(4, "little") for block in range(-(-vocab // _BLOCK))]
    noise = b"".join(blake2b(stamp, digest_size=4 * _BLOCK, salt=salt).digest() for stamp in stamps for salt in blocks)
    values = np.frombuffer(noise, "<u4").reshape(len(stamps), len(blocks) * _BLOCK)[:, :vocab] >> 8
    return values.astype(np.float32) * np.float32(2**-21) - np.float32(4)


class StampModel:
    """An ordinary `Model` that fails on the first wrong slot. Storage per slot: position, stamp, parent's stamp."""

    name = "stamp"
    kv_bytes_per_token = 64

    def __init__(
        self, vocab_size: int = 3, max_model_len: int = 64, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self.steps = 0
        self.rows = 0
        self.fail_next: Exception | None = None
        """Raised by the next `run`, once, when some of its writes are made: all its write slots hold garbage."""
        self.fingerprint = bytes(32)
        self.moved = 0
        """Tokens whose KV was moved"""
        self.scored_prompts = 0
        """Prompts whose keys were scored"""
        self.rows_ahead = 0
        """Rows that were computed before their step was asked for"""
        self.allocate(0)

    def allocate(self, slots: int) -> None:
        """Make storage for `slots` slots, none written."""
        self._positions = np.full(slots, UNWRITTEN, np.int64)
        self._stamps = np.zeros((slots, 2), np.uint64)
        self._parents = np.zeros((slots, 2), np.uint64)
        self._moved = np.zeros(slots, np.bool_)
        self._stamp_bytes = memoryview(self._stamps.reshape(-1).view(np.uint8))
        self._parent_bytes = memoryview(self._parents.reshape(-1).view(np.uint8))

    def release(self) -> None:
        self.allocate(0)

    def poison(self, slots: Iterable[int] | Int64Array) -> None:
        """Forget what `slots` hold: whoever reads one before it is written again, fails."""
        poisoned = np.fromiter(slots, np.int64)
        self._positions[poisoned] = POISONED
        self._moved[poisoned] = False

    def content(self, slots: Int64Array) -> tuple[Int64Array, NDArray[np.uint64], NDArray[np.uint64]]:
        """What slots hold."""
        return self._positions[slots], self._stamps[slots], self._parents[slots]

    def fill(self, slots: Int64Array, content: tuple[Int64Array, NDArray[np.uint64], NDArray[np.uint64]]) -> None:
        """Make slots hold what others did."""
        self._positions[slots], self._stamps[slots], self._parents[slots] = content
        self._moved[slots] = False

    def kv_mover(self) -> "StampModel":
        return self

    def move(self, moves: KVMoves) -> None:
        """Copy what slots hold, to other positions."""
        assert np.unique(moves.targets).size == moves.targets.size == moves.sources.size > 0
        assert not np.isin(moves.sources, moves.targets).any(), "a source of a copy is a target"
        positions, stamps, parents = self.content(moves.sources)
        assert np.array_equal(positions, moves.positions), f"positions {positions} are moved as {moves.positions}"
        self.fill(moves.targets, (moves.new_positions, stamps, parents))
        self._moved[moves.targets] = True
        self.moved += moves.targets.size

    def tokens_at(self, slots: Int64Array) -> list[int]:
        """Return the token whose KV each slot holds, -1 if it holds none."""
        stamps, parents = ([part.tobytes() for part in held[slots]] for held in (self._stamps, self._parents))
        return [
            next((token for token in range(self.vocab_size) if extend(parent, token) == stamp), -1)
            for stamp, parent in zip(stamps, parents, strict=True)
        ]

    def is_exact(self, slots: Int64Array) -> bool:
        """Whether slots hold the KV of one prefix, from its beginning on, each on top of the one before it."""
        wanted = np.concatenate([np.zeros((1, 2), np.uint64), self._stamps[slots[:-1]]])
        return np.array_equal(self._positions[slots], np.arange(slots.size)) and np.array_equal(
            self._parents[slots], wanted[: slots.size]
        )

    def host_kv(self, slots: int) -> "StampHostKV":
        return StampHostKV(self, slots)

    def kv_fingerprint(self) -> bytes:
        return self.fingerprint

    def run(self, plan: Plan, token_ids: Int64Array, slots: Int64Array, logit_rows: Int64Array) -> Tensor:
        """Check and write the rows, in the plan's order. Returns float32 logits `[n, vocab]`."""
        if refusal := self._refusal(plan, token_ids, slots, logit_rows):
            raise AssertionError(refusal)
        if self.fail_next is not None:
            failure, self.fail_next = self.fail_next, None
            self.poison(slots[slots >= 0])
            raise failure
        return self._compute(plan, token_ids, slots, logit_rows)

    def run_scored(
        self,
        plan: Plan,
        token_ids: Int64Array,
        slots: Int64Array,
        logit_rows: Int64Array,
        prompts: Sequence[ScoredPrompt],
    ) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """As `run`, with scores that are a pure function of the stamps. The rows must be the last ones of a prompt, and
        its slots hold all of it.
        """
        logits = self.run(plan, token_ids, slots, logit_rows)
        self.scored_prompts += len(prompts)
        for prompt in prompts:
            size = prompt.slots.size
            assert prompt.rows.size > 0 and 0 <= prompt.num_scored < size
            assert plan.row_positions[prompt.rows].tolist() == list(range(size - prompt.rows.size, size))
            assert self.is_exact(prompt.slots), "the keys of a prompt are scored when some are gone"
        return logits, [key_scores(self._stamps[prompt.slots[: prompt.num_scored]]) for prompt in prompts]

    runs_ahead = True

    def run_ahead(self, plan: Plan, tokens: Tensor, slots: Int64Array, logit_rows: Int64Array) -> Tensor:
        """As `run`, of rows that all give logits, whose tokens come in the order of `logit_rows`."""
        token_ids = np.full(plan.num_rows, -1)
        token_ids[logit_rows] = tokens.numpy()
        if refusal := self._refusal(plan, token_ids, slots, logit_rows):
            raise AssertionError(refusal)
        self.rows_ahead += plan.num_rows
        self.rows -= plan.num_rows
        lost = self._not_cached(plan, token_ids, slots)
        logits = self._compute(plan, token_ids, slots, logit_rows, lost)
        logits[np.isin(logit_rows, lost)] = torch.nan
        return logits

    def _not_cached(self, plan: Plan, token_ids: Int64Array, slots: Int64Array) -> list[int]:
        """The rows that only read, and do not find their tokens in their slots: nobody may use their logits."""
        reads = self._reads(plan)
        own, before = reads.slots[reads.last].tolist(), reads.slots[reads.last - 1].tolist()
        return [
            row
            for row in np.flatnonzero(slots < 0).tolist()
            if not self._moved[own[row]]
            and self._stamp_at(own[row]) != self._extend(row, self._stamp_at(before[row]), int(token_ids[row]))
        ]

    def _compute(
        self, plan: Plan, token_ids: Int64Array, slots: Int64Array, logit_rows: Int64Array, lost: Sequence[int] = ()
    ) -> Tensor:
        """lost: the rows that may find another token in their slots than their own."""
        reads = self._reads(plan)
        stamps = self._write(token_ids.tolist(), slots.tolist(), reads, lost)
        self._check_chains(reads, stamps)
        self.steps += 1
        self.rows += plan.num_rows
        self.kv_bytes_read += plan.kv_tokens_read * self.kv_bytes_per_token
        self.kv_bytes_unshared += plan.kv_tokens_unshared * self.kv_bytes_per_token
        return torch.from_numpy(_logits([stamps[row] for row in logit_rows.tolist()], self.vocab_size))

    def _refusal(self, plan: Plan, token_ids: Int64Array, slots: Int64Array, logit_rows: Int64Array) -> str:
        """What is wrong with the call whatever the slots hold; empty where nothing is."""
        rows, tokens, positions = plan.num_rows, token_ids.tolist(), plan.row_positions.tolist()
        if not rows or not token_ids.shape == slots.shape == (rows,):
            return f"{rows} rows with {token_ids.shape} tokens and {slots.shape} slots"
        if plan.window is not None:
            return f"a plan trimmed to a window of {plan.window}"
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            return f"tokens {tokens} in a vocabulary of {self.vocab_size}"
        if min(positions) < 0 or max(positions) >= self.max_model_len:
            return f"positions {positions} in a context of {self.max_model_len}"
        if not all(0 <= row < rows for row in logit_rows.tolist()):
            return f"logits of rows {logit_rows} of {rows}"
        return ""

    def _reads(self, plan: Plan) -> "Reads":
        """What the rows of a plan see. Fails unless it is what they are to see."""
        return all_reads(plan, self._positions.size)

    def _extend(self, row: int, parent: bytes, token: int) -> bytes:
        """The stamp of a row of this step, on top of that of the row's prefix."""
        return extend(parent, token)

    def _write(self, tokens: list[int], slots: list[int], reads: "Reads", lost: Sequence[int]) -> list[bytes]:
        """Write the rows that have a slot. Returns the stamp of every row, of those that are lost what is there.

        Rows are written by position, so a row's predecessor is written before it or stands in its slot already; that it
        is the right one, `_check_chains` tells.
        """
        own = reads.slots[reads.last].tolist()
        before = reads.slots[reads.last - 1].tolist()
        writers: dict[int, int] = {}
        stamps = [b""] * len(tokens)
        positions = reads.positions[reads.last].tolist()
        for row in sorted(range(len(tokens)), key=positions.__getitem__):
            position, token, slot = positions[row], tokens[row], slots[row]
            parent = self._stamp_at(before[row]) if position else ROOT
            kept = row in lost or (slot < 0 and self._moved[own[row]])
            stamp = self._stamp_at(own[row]) if kept else self._extend(row, parent, token)
            stamps[row] = stamp
            if slot < 0:
                if self._positions[own[row]] != position or self._stamp_at(own[row]) != stamp:
                    _fail(row, position, own[row], f"KV of {stamp.hex()} before the step", self._held(own[row]))
                continue
            if slot != own[row]:
                _fail(row, position, slot, f"a write to slot {own[row]}, which the plan reads there", "another")
            if writers.setdefault(slot, row) != row:
                _fail(row, position, slot, "a slot of its own", f"row {writers[slot]} writes it too")
            self._positions[slot] = position
            self._moved[slot] = False
            self._stamp_bytes[16 * slot : 16 * slot + 16] = stamp
            self._parent_bytes[16 * slot : 16 * slot + 16] = parent
        return stamps

    def _check_chains(self, reads: "Reads", stamps: list[bytes]) -> None:
        """All writes made, every slot holds its position, on top of what the slot read before it holds; the
        last of each row holds the row's own stamp.
        """
        held = self._stamps[reads.slots]
        wanted = np.empty_like(held)
        wanted[1:] = held[:-1]
        wanted[reads.first] = 0
        wrong = self._positions[reads.slots] != reads.positions
        follows = reads.follows & ~self._moved[reads.slots]
        parted = (self._parents[reads.slots] != wanted) & follows[:, None]
        own = b"".join(stamps)
        if wrong.any() or parted.any() or held[reads.last].tobytes() != own:
            wrong |= parted.any(axis=1)
            wrong[reads.last] |= (held[reads.last] != np.frombuffer(own, np.uint64).reshape(-1, 2)).any(axis=1)
            self._report(int(np.flatnonzero(wrong)[0]), reads, stamps, wanted)

    def _report(self, key: int, reads: "Reads", stamps: list[bytes], wanted: NDArray[np.uint64]) -> NoReturn:
        row = int(np.searchsorted(reads.first, key, side="right")) - 1
        position, slot = int(reads.positions[key]), int(reads.slots[key])
        expected = f"position {position} on top of {wanted[key].tobytes().hex()}"
        if key == reads.last[row]:
            expected += f", stamp {stamps[row].hex()}"
        _fail(row, position, slot, expected, self._held(slot))

    def _stamp_at(self, slot: int) -> bytes:
        return bytes(self._stamp_bytes[16 * slot : 16 * slot + 16])

    def _held(self, slot: int) -> str:
        """What a slot holds, in words."""
        position = int(self._positions[slot])
        if position < 0:
            return {UNWRITTEN: "never written", POISONED: "poisoned"}[position]
        parent, stamp = self._parents[slot].tobytes().hex(), self._stamp_at(slot).hex()
        return f"position {position} on top of {parent}, stamp {stamp}"


class StampHostKV:
    """KV of a `StampModel` in the host. A copy finishes when it was looked at `delay` times, and fails if its source
    was written before that.
    """

    def __init__(self, model: StampModel, slots: int) -> None:
        self.num_slots = slots
        self.record_bytes = 40
        self._device = model
        self._host = StampModel()
        self._host.allocate(slots)
        self.delay = 0
        self._last_save: StampCopy | None = None

    def save(self, slots: Int64Array, host_slots: Int64Array) -> "StampCopy":
        self._last_save = StampCopy(self._device, slots, self._host, host_slots, self.delay, self._last_save)
        return self._last_save

    def load(self, host_slots: Int64Array, slots: Int64Array) -> "StampCopy":
        return StampCopy(self._host, host_slots, self._device, slots, self.delay)

    def read_records(self, host_slots: Int64Array) -> NDArray[np.uint8]:
        positions, stamps, parents = self._host.content(host_slots)
        assert (positions >= 0).all(), "KV that was not written is read from the host"
        return np.hstack([positions[:, None].view(np.uint8), stamps.view(np.uint8), parents.view(np.uint8)])

    def write_records(self, host_slots: Int64Array, records: NDArray[np.uint8]) -> None:
        positions, stamps, parents = np.split(np.ascontiguousarray(records), [8, 24], 1)
        content = positions.copy().view(np.int64)[:, 0], stamps.copy().view(np.uint64), parents.copy().view(np.uint64)
        self._host.fill(host_slots, content)

    def release(self) -> None:
        self._host.release()


class StampCopy:
    """One copy, whose target holds garbage until it has finished."""

    seconds = 0.0

    def __init__(
        self,
        source: StampModel,
        read: Int64Array,
        target: StampModel,
        written: Int64Array,
        delay: int,
        before: "StampCopy | None" = None,
    ) -> None:
        """`before`: a copy that finishes earlier."""
        self._before = before
        assert np.unique(written).size == written.size == read.size > 0
        self._source, self._read, self._target, self._written = source, read, target, written
        self._content = source.content(read)
        self._left: int | None = delay
        assert (self._content[0] >= 0).all(), "a copy of KV that was not written"
        target.poison(written)

    def done(self) -> bool:
        if self._left:
            self._left -= 1
            return False
        self.wait()
        return True

    def wait(self) -> None:
        if self._left is None:
            return
        if self._before is not None:
            self._before.wait()
            self._before = None
        self._left = None
        same = zip(self._content, self._source.content(self._read), strict=True)
        assert all(np.array_equal(before, now) for before, now in same), "a slot was written while it was copied"
        assert (self._target.content(self._written)[0] == POISONED).all(), "a slot was written while it was filled"
        self._target.fill(self._written, self._content)


class LateThread:
    """In place of an executor with one thread: runs its calls in order in the caller's thread, each when it was looked
    at `delay` times or somebody waits for it.
    """

    def __init__(self) -> None:
        self.delay = 0
        self._calls: list[LateCall] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "LateCall":
        self._calls.append(LateCall(self, partial(function, *arguments), self.delay))
        return self._calls[-1]

    def run_until(self, last: "LateCall") -> None:
        while last in self._calls:
            self._calls.pop(0).run()

    def shutdown(self, cancel_futures: bool = False) -> None:
        if self._calls and not cancel_futures:
            self.run_until(self._calls[-1])
        self._calls.clear()


def run_late(disk: DiskTier) -> None:
    """Replace the threads of a disk tier that has not begun anything."""
    for name in ("_reader", "_writer"):
        getattr(disk, name).shutdown()
        setattr(disk, name, LateThread())


class LateCall:
    """A call of a `LateThread`; as a future of its result."""

    def __init__(self, thread: LateThread, call: Callable[[], Any], delay: int) -> None:
        self._thread, self._call, self._left = thread, call, delay
        self._error: Exception | None = None
        self._finished = False
        self._result: Any = None

    def run(self) -> None:
        self._finished = True
        try:
            self._result = self._call()
        except Exception as error:
            if isinstance(error, AssertionError):
                raise
            self._error = error

    def done(self) -> bool:
        if self._left:
            self._left -= 1
            return self._finished
        self._thread.run_until(self)
        return True

    def exception(self, timeout: float | None = None) -> Exception | None:
        self._thread.run_until(self)
        return self._error

    def result(self) -> Any:
        self._thread.run_until(self)
        assert self._error is None
        return self._result


class Reads(NamedTuple):
    """Every key that the rows of a step see: row by row, in each by position, up to the row's own."""

    positions: Int64Array
    """`[keys]`"""
    slots: Int64Array
    """`[keys]`"""
    first: Int64Array
    """`[rows]`: the row's first key."""
    last: Int64Array
    """`[rows]`: the row's own key."""
    follows: NDArray[np.bool_]
    """`[keys]`: whether the row's key before it, if any, is at the position before it."""


def all_reads(plan: Plan, capacity: int) -> Reads:
    """The keys of a plan. Fails where a row does not see each position of its path exactly once."""
    rows, positions, slots = keys_seen(plan)
    sizes = plan.row_positions.astype(np.int64) + 1
    first = np.cumsum(sizes) - sizes
    places = first[rows] + positions
    path = np.repeat(first, sizes)
    keys = np.arange(path.size)
    keys -= path
    if slots.size and (slots.min() < 0 or slots.max() >= capacity):
        raise AssertionError(f"slots {slots.min()} to {slots.max()} are read in a pool of {capacity}")
    if places.size != keys.size or positions.min() < 0 or (np.bincount(places, minlength=keys.size) != 1).any():
        _fail_coverage(plan, rows, positions, slots)
    read = np.empty(keys.size, np.int64)
    read[places] = slots
    return Reads(keys, read, first, first + sizes - 1, np.ones(keys.size, np.bool_))


def keys_seen(plan: Plan) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The row, position and slot of every key that a row sees: of each segment of each unit that covers it,
    the keys up to the row's position.
    """
    unit_first = plan.unit_segments[:, 0]
    counts = plan.unit_segments[:, 1] - unit_first
    segments = _ranges(unit_first, counts)
    shown, covered = plan.segment_rows[segments], np.repeat(plan.unit_rows, counts, axis=0)
    begin = np.maximum(shown[:, 0], covered[:, 0])
    heights = np.maximum(np.minimum(shown[:, 1], covered[:, 1]) - begin, 0)
    rows = _ranges(begin, heights)
    segments = np.repeat(segments, heights)
    starts = plan.segment_positions[segments]
    seen = np.minimum(plan.row_positions[rows] + 1 - starts, plan.segment_lengths[segments])
    seen = np.maximum(seen, 0)
    positions = _ranges(starts, seen)
    slots = positions + np.repeat(plan.segment_starts[segments] - starts, seen)
    return np.repeat(rows, seen), positions, slots


def _ranges(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> Int64Array:
    """The ranges `[start, start + count)`, one after the other."""
    ends = np.cumsum(counts)
    ranges: Int64Array = np.repeat(starts - (ends - counts), counts)
    ranges += np.arange(ranges.size)
    return ranges


def _fail_coverage(plan: Plan, rows: Int64Array, positions: Int64Array, slots: Int64Array) -> NoReturn:
    """Name the first row and position that is not read exactly once."""
    for row, own in enumerate(plan.row_positions.tolist()):
        seen: dict[int, list[int]] = {position: [] for position in range(own + 1)}
        for key in np.flatnonzero(rows == row).tolist():
            seen.setdefault(int(positions[key]), []).append(int(slots[key]))
        for position, found in sorted(seen.items()):
            if position < 0 or len(found) != 1:
                _fail(row, position, found, "one read of each position of the path", f"{len(found)} reads here")
    raise AssertionError("a plan reads keys for rows that it does not have")


def _fail(row: int, position: int, slot: int | list[int], expected: str, found: str) -> NoReturn:
    raise AssertionError(f"row {row}, position {position}, slot {slot}: expected {expected}; found {found}")
