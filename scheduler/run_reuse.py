"""Prompts that take runs of cached tokens from other positions, instead of computing them.

Of a run, the first tokens are computed anew, because they depend most on what stands before them (EPIC, arXiv
2410.15332, section 3); CacheBlend (arXiv 2405.16444) chooses them by how much their keys deviate. The rest is copied
when its span is scheduled: rows of the same step, and of later ones, read it as if it had been computed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import BLENDED, Lock, Match, RadixTree, Run, RunIndex, TokenArray, blended_namespace
from radixgen.core import SegmentReuse

_LEAST_SHARE = 4
"""Runs are taken if they spare at least this fraction (1/n) of the tokens that would be stored anew."""


@dataclass(eq=False, slots=True)
class TakenRuns:
    """Where a sequence's tokens are copied from. The sources stay locked until `release`."""

    slots: NDArray[np.int64]
    """`[tokens]`: slot to copy from, or -1 if the token is computed."""
    positions: NDArray[np.int64]
    """`[tokens]`: position of the copied token at its source."""
    locks: list[Lock]
    prefix: int
    """Number of tokens of the exact prefix."""

    @property
    def num_moved(self) -> int:
        """Number of copied tokens after the exact prefix."""
        return int(np.count_nonzero(self.slots[self.prefix :] >= 0))

    def span(self, first: int, stop: int, rows: int) -> int:
        """Return how many tokens from position `first` on, up to `stop`, need at most `rows` rows, of at least 1.

        The last token of the span is computed, so that every step has rows.
        """
        computed = np.flatnonzero(self.slots[first:stop] < 0)
        if computed.size > rows:
            return int(computed[rows - 1]) + 1
        if not computed.size:
            self.slots[stop - 1] = -1
        return stop - first

    def pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the parts `[begin, end)` of the positions `[first, stop)` and whether they are copied."""
        copied = self.slots[first:stop] >= 0
        bounds = np.flatnonzero(np.diff(copied)) + 1 + first
        for begin, end in pairwise([first, *bounds.tolist(), stop]):
            yield begin, end, bool(copied[begin - first])

    def release(self, tree: RadixTree) -> None:
        """Unlock the sources."""
        for lock in self.locks:
            tree.unlock(lock)
        self.locks.clear()


class RunTaker:
    """Finds the runs that prompts take, in the tree of the pool."""

    def __init__(self, tree: RadixTree, reuse: SegmentReuse) -> None:
        self._tree = tree
        self._recompute = reuse.recompute
        self._index = RunIndex(tree, reuse.min_run)

    def take(self, tokens: TokenArray, namespace: str, stop: int) -> TakenRuns | None:
        """Find and lock what `tokens[:stop]` can take; `namespace`: that of the request, blended or not.

        Returns None if what earlier prompts with runs have in common with it, and its own runs, spare little beside the
        exact prefix: then outputs stay exact.
        """
        exact = namespace.removesuffix(BLENDED)
        before, blended = (self._match(tokens, name) for name in (exact, blended_namespace(exact)))
        begin, known = blended.computed if blended else 0, before.computed if before else 0
        first = max(begin, known)
        runs = self._index.find(tokens, exact, first, stop) if first < stop else []
        spared = first - known + sum(run.length - self._num_computed(run) for run in runs)
        if _LEAST_SHARE * spared < tokens.size - begin or not spared:
            return None
        taken = TakenRuns(np.full(tokens.size, -1), np.zeros(tokens.size, np.int64), [], first)
        if before is not None and begin < first:
            self._copy(taken, Run(begin, begin, first - begin, before.node), 0)
        for run in runs:
            self._copy(taken, run, self._num_computed(run))
        return taken

    def _match(self, tokens: TokenArray, namespace: str) -> Match | None:
        return self._tree.match_prefix(tokens, namespace)

    def _num_computed(self, run: Run) -> int:
        return math.ceil(self._recompute * run.length)

    def _copy(self, taken: TakenRuns, run: Run, computed: int) -> None:
        """Let a run's tokens be copied, except for the first `computed`."""
        taken.slots[run.start + computed : run.stop] = run.slots()[computed:]
        taken.positions[run.start : run.stop] = np.arange(run.source, run.source + run.length)
        taken.locks.append(self._tree.lock(run.node))
