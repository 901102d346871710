"""What reading policies say, key by key, and a model that holds an engine to it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from oracle import ROOT, Reads, StampModel, all_reads, extend, key_scores, keys_seen, stamps_of

from radixgen.cache import marks, token_ids
from radixgen.cache.tokens import exact_len
from radixgen.core import Plan
from radixgen.core.plan import Int64Array
from radixgen.core.reading import EXACT, BigBird, Fading, Press, ReadingPolicy, Window
from radixgen.engine.core import EngineCore
from radixgen.scheduler.batch import Batch, StepInput


def reads(policy: ReadingPolicy, row: int, key: int) -> bool:
    """Whether a row at position `row` reads the key at position `key`."""
    if key > row:
        return False
    if isinstance(policy, Window):
        begin = row - row % policy.block
        return key < policy.sinks or key >= begin - policy.window
    if isinstance(policy, BigBird):
        own, block = row // policy.block, key // policy.block
        return (
            block < policy.global_blocks
            or own - block < policy.window_blocks
            or block in random_blocks(policy, own, policy.global_blocks, own - policy.window_blocks)
        )
    if isinstance(policy, Fading):
        distance = row - row % policy.block - key
        level = next((i for i in range(policy.levels + 1) if distance <= policy.window * policy.ratio**i), None)
        return key < policy.sinks or (level is not None and key % policy.ratio**level == 0)
    assert policy.exact, policy
    return True


def pressed(policy: Press, scores: Sequence[float], size: int) -> set[int]:
    """The keys of a prompt of `size` tokens that stay, given the scores of those before the window."""
    kept = {key for key in range(size) if key < policy.sinks or key >= size - policy.window}
    best = sorted((-score, key) for key, score in enumerate(scores) if key not in kept)
    return kept | {key for _, key in best[: max(math.ceil(policy.ratio * size) - len(kept), 0)]}


def random_blocks(policy: BigBird, own: int, first: int, last: int) -> set[int]:
    """The blocks from `first` to `last` that rows of the block `own` draw."""
    between = list(range(first, last + 1))
    count = min(policy.random_blocks, len(between))
    state = _mix(policy.seed ^ _mix(own))
    for place in range(count):
        state = _mix(state)
        other = place + state % (len(between) - place)
        between[place], between[other] = between[other], between[place]
    return set(between[:count])


def _mix(state: int) -> int:
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor & mask
    return state ^ (state >> 31)


class _Row(NamedTuple):
    policy: ReadingPolicy
    path: list[bytes]
    """Stamps of the positions before the row's own; only of one that is not exact."""
    kept: set[int] | None = None
    """The positions that it reads below a prompt that was pressed."""

    def reads(self, own: int, key: int) -> bool:
        if isinstance(self.policy, Press):
            return self.kept is None or key in self.kept
        return reads(self.policy, own, key)


class PolicyModel(StampModel):
    """A `StampModel` that fails where a row does not read exactly what its policy says. What is read inexactly has
    other stamps than what is read exactly, so an exact row that meets an inexact key fails.

    It cannot check policies by which rows do not read the position before their own.
    """

    def watch(self, core: EngineCore) -> None:
        """Learn from the batches of an engine how each row reads."""
        freeze, planner, tree = core.scheduler.freeze, core.planner, core.tree
        self._planned: list[tuple[Plan, list[_Row]]] = []
        self._rows: list[_Row] = []
        self.sparse_rows = 0

        def tell(batch: Batch) -> StepInput:
            step = freeze(batch)
            rows = []
            scoring = {row for part in batch.pressing.values() for row in part.rows}
            for row in step.plan.row_order.tolist():
                policy, position = planner.policies[batch.row_marks[row]], batch.row_positions[row]
                tokens, kept = np.empty(0, np.int32), None
                if not policy.exact:
                    tokens = tree.node(batch.row_nodes[row]).path_tokens()[:position]
                stamps = _stamps(tokens, planner.policies)
                if isinstance(policy, Press) and row not in scoring:
                    size = exact_len(tokens) + 1  # the last token of the prompt is marked
                    if position >= size or batch.row_slots[row] < 0:
                        scores = key_scores(stamps_of(stamps[: policy.num_scored(size)]))
                        kept = pressed(policy, scores.tolist(), size) | set(range(size, position + 1))
                rows.append(_Row(policy, stamps, kept))
            self._planned = [*self._planned[-1:], (step.plan, rows)]
            return step

        core.scheduler.freeze = tell

    def _reads(self, plan: Plan) -> Reads:
        self._rows = next(rows for planned, rows in reversed(self._planned) if planned is plan)
        if all(row.policy.exact for row in self._rows):
            return all_reads(plan, self._positions.size)
        rows, positions, slots = keys_seen(plan)
        order = np.lexsort((positions, rows))
        rows, positions, slots = rows[order], positions[order], slots[order]
        wanted = [
            (row, key)
            for row, own in enumerate(plan.row_positions.tolist())
            for key in range(own + 1)
            if self._rows[row].reads(own, key)
        ]
        found = list(zip(rows.tolist(), positions.tolist(), strict=True))
        assert found == wanted, f"{sorted(set(found) ^ set(wanted))[:4]} (row, position) are read or not, or twice"
        self.sparse_rows += sum(not row.policy.exact for row in self._rows)
        first = np.searchsorted(rows, np.arange(plan.num_rows))
        last = np.append(first[1:], rows.size) - 1
        follows = np.append(True, np.diff(positions) == 1)
        follows[first] = positions[first] == 0
        return Reads(positions, slots, first, last, follows)

    def _extend(self, row: int, parent: bytes, token: int) -> bytes:
        return extend(parent, token, self._rows[row].policy)

    def _check_chains(self, reads: Reads, stamps: list[bytes]) -> None:
        super()._check_chains(reads, stamps)
        for row, (policy, path, _) in enumerate(self._rows):
            for key in range(reads.first[row], reads.last[row] if not policy.exact else reads.first[row]):
                position, slot = int(reads.positions[key]), int(reads.slots[key])
                assert self._stamp_at(slot) == path[position], f"row {row} reads another key at {position}"


def _stamps(tokens: Int64Array, policies: Sequence[ReadingPolicy]) -> list[bytes]:
    """The stamps of each prefix of a path."""
    policy, stamp, found = EXACT, ROOT, []
    for token, own in zip(token_ids(tokens).tolist(), tokens, strict=True):
        if own < 0:
            policy = policies[int(marks(np.array([own]))[0])]
        stamp = extend(stamp, token, policy)
        found.append(stamp)
    return found


def stamp_under(prompt: Sequence[int], output: Sequence[int], policy: ReadingPolicy) -> bytes:
    """The stamp of a prompt and the output that followed it, read under a policy."""
    stamp = ROOT
    for position, token in enumerate(prompt):
        stamp = extend(stamp, token, policy if position >= policy.first_read(len(prompt)) else None)
    for token in output:
        stamp = extend(stamp, token, policy)
    return stamp
