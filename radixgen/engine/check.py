"""Invariants of an engine's scheduler, tree and requests between two steps."""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from radixgen.core import Limits
from radixgen.scheduler.cache_hints import CacheHints
from radixgen.scheduler.scheduler import Scheduler
from radixgen.scheduler.sequence import Request, Sequence


def check_engine(scheduler: Scheduler, hints: CacheHints, requests: Mapping[str, Request], limits: Limits) -> None:
    """Assert every invariant: slots have one owner, locks belong to live cursors and pins, counts add up, limits hold,
    and each request is in exactly one valid state.
    """
    scheduler.tree.check()
    if scheduler.host is not None:
        scheduler.host.check()
    _check_locks(scheduler)
    _check_queue(scheduler, hints)
    hints.check()
    _check_bounds(scheduler, limits)
    _check_states(scheduler, requests)


def _check_locks(scheduler: Scheduler) -> None:
    locks: dict[int, int] = {}
    for holder in (*scheduler.running, *scheduler.pins):
        lock = holder.cursor if isinstance(holder, Sequence) else holder.lock
        assert lock is not None
        locks[lock.held.id] = locks.get(lock.held.id, 0) + 1
    for lock in (lock for sequence in scheduler.running if sequence.runs for lock in sequence.runs.locks):
        locks[lock.held.id] = locks.get(lock.held.id, 0) + 1
    for lock in scheduler.host.locks() if scheduler.host else ():
        locks[lock.held.id] = locks.get(lock.held.id, 0) + 1
    for node in scheduler.tree.nodes():
        assert node.lock_count == locks.get(node.id, 0), f"{node} has a lock without a cursor or pin"
    for sequence in scheduler.running:
        assert sequence.cursor is not None and sequence.finish_reason is None
        node = sequence.cursor.held
        assert np.array_equal(node.path_tokens(), sequence.tokens()), "a cursor left its tokens"
        assert node.namespace == sequence.namespace
    for pin in scheduler.pins:
        assert pin.lock.held.end == pin.num_tokens and pin.lock.held.complete, "a pin left its tokens"


def _check_queue(scheduler: Scheduler, hints: CacheHints) -> None:
    scheduler.waiting.check()
    assert all(s.cursor is None and s.finish_reason is None for s in scheduler.waiting)
    followed = {s.followed: s for s in scheduler.waiting if s.followed is not None}
    assert followed.keys() == set(scheduler.tree.followed()), "a match is followed that nobody waits for"
    fetches = Counter(s.fetch for s in scheduler.waiting if s.fetch is not None)
    fetches.update(hints.fetches())
    assert all(fetch.waiters == count for fetch, count in fetches.items()), "a fetch counts its waiters wrongly"
    assert all(s.fetch is None for s in scheduler.running)
    for match, sequence in followed.items():
        assert match.namespace == sequence.namespace and np.array_equal(match.tokens, sequence.tokens())


def _check_bounds(scheduler: Scheduler, limits: Limits) -> None:
    new = sum(s.request.num_cached_tokens is None and s.index == 0 for s in scheduler.waiting)
    assert new <= limits.max_waiting and len(scheduler.running) <= limits.max_num_seqs
    assert len(scheduler.pins) <= limits.max_pins


def _check_states(scheduler: Scheduler, requests: Mapping[str, Request]) -> None:
    waiting, running = list(scheduler.waiting), list(scheduler.running)
    live = [s for request in requests.values() for s in request.sequences if s.finish_reason is None]
    parked = [s for s in live if s.choices is not None]
    assert len(waiting) + len(running) + len(parked) == len(live)
    assert {*waiting, *running, *parked} == {*live}
    for name, request in requests.items():
        assert request.id == name
        assert request.unfinished == sum(s.finish_reason is None for s in request.sequences)
        for sequence in request.sequences:
            assert len(sequence.output) <= request.max_output
            assert sequence.finish_reason is None or sequence.cursor is None
            assert sequence.choices is None or sequence.cursor is None
        if request.search is not None and not request.finished:
            assert [s.output for s in request.sequences] == [beam.token_ids for beam in request.search.beams]
            assert any(s.choices is None for s in request.sequences), "beams wait for nobody"
