"""Admission of waiting requests: which fit, what they fetch from the host first, and how much of them was cached."""

from typing import get_args

from sortedcontainers import SortedKeyList

from radixgen.cache import FollowedMatch, HostTier, Match, RadixTree, blended_namespace, sharing_end
from radixgen.core import SharingReason
from radixgen.scheduler.pins import Pins
from radixgen.scheduler.queue import WaitingQueue
from radixgen.scheduler.reserves import FIRST_RESERVE
from radixgen.scheduler.run_reuse import RunTaker, TakenRuns
from radixgen.scheduler.sequence import Request, Sequence

_GROWTH_SHARE = 16
"""At most this fraction (1/n) of the pool is kept free for running sequences to grow."""
_MAX_ADMITTED = 256
"""Sequences admitted per step before no further request is considered, so that running ones do not wait long."""


class Admission:
    """Moves sequences from `waiting` to `running`, and counts how many tokens of their prompts were cached."""

    def __init__(
        self,
        tree: RadixTree,
        waiting: WaitingQueue,
        running: "SortedKeyList[Sequence]",
        pins: Pins,
        host: HostTier | None,
        max_num_seqs: int,
        runs: RunTaker | None = None,
    ) -> None:
        """`runs`: finds what requests with `reuse="segments"` take."""
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.sharing_ended: dict[SharingReason, int] = dict.fromkeys(get_args(SharingReason), 0)
        self._tree = tree
        self._waiting = waiting
        self._running = running
        self._pins = pins
        self._host = host
        self._max_num_seqs = max_num_seqs
        self._runs = runs

    def admit(self, now: float) -> bool:
        """Admit waiting requests while everything that they lack fits without preemption; siblings go together.

        `now`: seconds on the engine's clock. Returns False if more would fit than one step admits.
        """
        enough = len(self._running) + _MAX_ADMITTED
        while len(self._waiting):
            if len(self._running) >= enough:
                return False
            request = self._waiting.choose(self._follow)
            if request is None or len(request.waiting) > self._max_num_seqs - len(self._running):
                return True
            while request.waiting:
                sequence = request.waiting[0]
                if self._others_hold_slots and not self._fits(sequence, len(request.waiting)):
                    return True
                if self._fetch(sequence):
                    break
                self._enter(sequence, now)
        return True

    @property
    def _others_hold_slots(self) -> bool:
        return bool(self._running) or (self._host is not None and self._host.fetching)

    def _fetch(self, sequence: Sequence) -> bool:
        """Begin to fetch what the host has of the sequence. Returns whether the sequence must wait for that."""
        before = sequence.fetch
        if self._host is not None and (before is None or before.arrived):
            followed = self._follow(sequence)
            sequence.fetch = self._host.fetches.begin(
                followed.tokens, sequence.namespace, followed.computed, followed.length
            )
            if before is not None:
                self._host.fetches.leave(before)
        return sequence.request.fetching

    def withdraw(self, sequence: Sequence) -> None:
        """Remove a waiting sequence that ended or was cancelled."""
        self._waiting.remove(sequence)
        self._unfollow(sequence)
        if self._host is not None and sequence.fetch is not None:
            self._host.fetches.leave(sequence.fetch)
            sequence.fetch = None

    def _follow(self, sequence: Sequence) -> FollowedMatch:
        """Return the match of a waiting sequence, kept up to date by the tree until it is admitted or removed."""
        if sequence.followed is None:
            sequence.followed = self._tree.follow(sequence.tokens(), sequence.namespace)
        return sequence.followed

    def _unfollow(self, sequence: Sequence) -> None:
        if sequence.followed is not None:
            self._tree.unfollow(sequence.followed)
            sequence.followed = None

    def _fits(self, sequence: Sequence, seats: int) -> bool:
        """Return whether there is room for what the sequence lacks and for everyone to grow a little.

        Releases pins if needed, unless releasing all would not suffice. Reserves do not count as room: taking them for
        new sequences would fragment all leaves into single slots.
        """
        followed = self._follow(sequence)
        wanted, match = followed.tokens.size + self._growth(seats), followed.match()
        short = self._missing_slots(wanted, match)
        if short > 0 and short > self._pins.freed_by_release(match):
            return False
        while short > 0 and self._pins.release_weakest():
            short = self._missing_slots(wanted, followed.match())
        return short <= 0

    def _growth(self, seats: int) -> int:
        """Return the slots to keep free for all running sequences and `seats` more to grow a little."""
        growing = len(self._running) + seats
        return max(growing, min(FIRST_RESERVE * growing, self._tree.pool.capacity // _GROWTH_SHARE))

    def _missing_slots(self, wanted: int, match: Match | None) -> int:
        """Return how many slots are lacking to store `wanted` tokens, given that `match` is already in the tree and all
        unscheduled tokens still need slots.
        """
        tree = self._tree
        known, locked = (match.length, match.evictable_slots) if match else (0, 0)
        return tree.unscheduled_tokens + wanted - known - (tree.pool.free + tree.evictable_tokens - locked)

    def _take_runs(self, sequence: Sequence) -> None:
        """Let a sequence that is admitted take runs, if its request may, reads all keys, and they spare enough.

        From then on, all sequences of the request are in the namespace of inexact KV. One that was admitted as exact
        stays so.
        """
        request, runs = sequence.request, self._runs
        if runs is None or request.reuse != "segments" or sequence.namespace != request.namespace:
            return
        if request.mark or (not request.blended and request.num_cached_tokens is not None):
            return
        tokens = self._follow(sequence).tokens
        stop = min(tokens.size - 1, tokens.size if request.targets is None else request.next_scored)
        if not stop:
            return
        taken = runs.take(tokens, request.namespace, stop)
        if taken is None:
            return
        blended = request.namespace if request.blended else blended_namespace(request.namespace)
        wanted = tokens.size + self._growth(len(request.waiting))
        if self._missing_slots(wanted, self._tree.match_prefix(tokens, blended)) > 0:
            taken.release(self._tree)
            return
        sequence.runs = taken
        if not request.blended:
            self._move_request(request, blended, taken)

    def _move_request(self, request: Request, namespace: str, taken: TakenRuns) -> None:
        """Move a request to the namespace of inexact KV, before any of its sequences is admitted."""
        for sequence in request.sequences:
            self._unfollow(sequence)
            sequence.namespace = namespace
        request.namespace, request.blended = namespace, True
        request.num_moved_tokens = taken.num_moved

    def _enter(self, sequence: Sequence, now: float) -> None:
        self._take_runs(sequence)
        followed, request = self._follow(sequence), sequence.request
        tokens = followed.tokens
        if request.num_cached_tokens is None:
            match = followed.match()
            prefix = sequence.runs.prefix if sequence.runs else 0
            request.num_cached_tokens = min(max(match.computed if match else 0, prefix), request.prompt.size)
            request.queue_seconds = max(now - request.arrived, 0.0)
            request.num_shared_tokens = match.length - match.evictable if match else 0
            request.sharing_ended = end = sharing_end(self._tree, tokens, sequence.namespace, match)
            if end is not None:
                self.sharing_ended[end.reason] += 1
            self.prompt_tokens += request.prompt.size
            self.cached_prompt_tokens += request.num_cached_tokens
        sequence.cursor = self._tree.insert(tokens, sequence.namespace, priority=request.priority, followed=followed)
        self._waiting.admit(sequence)
        self._running.add(sequence)
        self._hand_match_to_sibling(sequence)

    def _hand_match_to_sibling(self, sequence: Sequence) -> None:
        """Give the match of an admitted sequence to a waiting sibling with the same tokens, or drop it."""
        request = sequence.request
        sibling = request.waiting[0] if request.waiting else None
        alike = sequence.namespace == request.namespace and not sequence.output
        if sibling is None or sibling.followed or sibling.output or not alike:
            self._unfollow(sequence)
        else:
            sequence.followed, sibling.followed = None, sequence.followed
