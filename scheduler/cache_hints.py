"""Applies cache hints to the tree, within bounds per owner, and answers each."""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import get_args

from radixgen.cache import PRIVATE, Fetch, HostTier, RadixTree, TokenArray, common_prefix_len, demote
from radixgen.core import CacheHint, HintResult, HintStatus, Limits
from radixgen.scheduler.pins import Pin, Pins, nodes_of
from radixgen.scheduler.sequence import Request

_DEFAULT_TTL = {"retain": 300.0, "prefetch": 60.0}
"""Seconds; other hints last for `Limits.max_hint_seconds` by default."""


@dataclass(eq=False, slots=True)
class _Prefetch:
    """A prefix on its way from the host, to be pinned when it has arrived."""

    tokens: TokenArray
    fetch: Fetch
    priority: int
    expires: float
    owner: str


class CacheHints:
    """Applies hints. Those of a request wait until its prompt is computed, and `demote` until the request has ended."""

    def __init__(self, tree: RadixTree, pins: Pins, host: HostTier | None, limits: Limits) -> None:
        self.counts: dict[HintStatus, int] = dict.fromkeys(get_args(HintStatus), 0)
        """Number of hints by answer"""
        self._tree = tree
        self._pins = pins
        self._host = host
        self._limits = limits
        self._waiting: dict[Request, None] = {}
        self._prefetches: list[_Prefetch] = []

    # -- with a request -----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Keep a new request's hints until its prompt is computed."""
        if request.hints:
            self._waiting[request] = None

    def answer(self, requests: Iterable[Request], now: float) -> None:
        """Apply the hints of those requests whose prompts are computed. Called when no step is in flight."""
        if not self._waiting:
            return
        for request in dict.fromkeys(requests):
            if request in self._waiting:
                del self._waiting[request]
                namespace, owner = request.sequences[0].namespace, request.hint_owner
                results = [self._apply(hint, request.path, namespace, owner, now, live=True) for hint in request.hints]
                request.hint_results = self._counted(results)

    def drop(self, request: Request) -> None:
        """Refuse the hints of a request that ends before its prompt is computed."""
        if request in self._waiting:
            del self._waiting[request]
            reason = "the request ended before its prompt was computed"
            request.hint_results = self._counted([_refused(hint, reason) for hint in request.hints])

    def end(self, request: Request) -> None:
        """Apply the `demote` hints of a request that has ended."""
        self.drop(request)
        answered = zip(request.hints, request.hint_results, strict=True)
        starts = [hint.num_tokens or 0 for hint, result in answered if _demotes(hint, result)]
        for sequence in request.sequences if starts else ():
            self._demote(sequence.tokens(), sequence.namespace, min(starts))

    # -- without a request --------------------------------------------------------------------------------

    def apply(
        self, hints: Seq[CacheHint], tokens: TokenArray, namespace: str, owner: str | None, now: float
    ) -> tuple[HintResult, ...]:
        """Apply hints to what is cached of `tokens` now."""
        return self._counted([self._apply(hint, tokens, namespace, owner, now) for hint in hints])

    def begin_step(self, now: float) -> None:
        """Pin the prefixes that were prefetched and have arrived."""
        for prefetch in [prefetch for prefetch in self._prefetches if prefetch.fetch.arrived]:
            self._prefetches.remove(prefetch)
            self._arrive(prefetch, now)

    def fetches(self) -> Iterator[Fetch]:
        """Iterate over the fetches that `prefetch` hints began or joined."""
        return (prefetch.fetch for prefetch in self._prefetches)

    def check(self) -> None:
        """Assert that pins of hints are within their bounds."""
        owners = [pin.owner for pin in self._pins if pin.owner is not None]
        assert all(owners.count(owner) <= self._limits.max_hint_pins for owner in owners)

    # -- inside -------------------------------------------------------------------------------------------

    def _apply(
        self, hint: CacheHint, tokens: TokenArray, namespace: str, owner: str | None, now: float, *, live: bool = False
    ) -> HintResult:
        """`live`: whether the hint belongs to a request that has not ended; then `end` demotes."""
        if hint.action == "share":
            return _share(hint, tokens.size, live)
        if PRIVATE in namespace:
            return _refused(hint, "the request shares nothing")
        if hint.action == "demote":
            return self._demote_suffix(hint, tokens, namespace, live)
        return self._retain(hint, tokens, namespace, namespace if owner is None else owner, now)

    def _demote_suffix(self, hint: CacheHint, tokens: TokenArray, namespace: str, live: bool) -> HintResult:
        start = hint.num_tokens or 0
        if start > tokens.size:
            return _refused(hint, _too_long(tokens))
        count = tokens.size - start if live else self._demote(tokens, namespace, start)
        if not count and not live:
            return _refused(hint, "nothing is cached there that no other path shares")
        return HintResult("demote", "accepted", count)

    def _retain(self, hint: CacheHint, tokens: TokenArray, namespace: str, owner: str, now: float) -> HintResult:
        """Pin a prefix, or fetch it from the host and pin it then."""
        longest, own = self._limits.max_hint_seconds, self._pins_of(owner)
        wanted = tokens.size if hint.num_tokens is None else min(hint.num_tokens, tokens.size)
        ttl = min(hint.ttl if hint.ttl is not None else _DEFAULT_TTL.get(hint.action, longest), longest)
        clips = []
        if hint.ttl is not None and hint.ttl > longest:
            clips.append(f"ttl: at most {longest:g} seconds")
        if hint.num_tokens is not None and hint.num_tokens > tokens.size:
            clips.append(f"num_tokens: {_too_long(tokens)}")
        prefix = tokens[: self._room(tokens[:wanted], namespace, owner, own)]
        if prefix.size < wanted:
            share = self._limits.max_hint_pool_share
            clips.append(f"num_tokens: one owner's hints retain at most {share:.0%} of the pool")
        if not prefix.size:
            return _refused(hint, "; ".join(clips) or "num_tokens: must be above 0")
        if hint.action == "prefetch" and (fetch := self._fetch(prefix, namespace, owner)) is not None:
            self._prefetches.append(_Prefetch(prefix, fetch, hint.priority, now + ttl, owner))
            held = common_prefix_len(prefix, fetch.tokens)
        else:
            pin = self._pins.add(prefix, namespace, hint.priority, now + ttl, owner)
            if pin is None:
                return _refused(hint, "nothing of it is cached")
            held = pin.num_tokens
            if (reason := self._merge(pin, own)) is not None:
                return _refused(hint, reason)
        if held < prefix.size:
            clips.append("num_tokens: no more is cached")
        return HintResult(hint.action, "clipped" if clips else "accepted", held, ttl, "; ".join(clips))

    def _room(self, tokens: TokenArray, namespace: str, owner: str, own: Seq[Pin]) -> int:
        """Return how many of `tokens` the owner may pin: those that its pins hold, and what its share leaves."""
        held = nodes_of(own)
        coming = sum(prefetch.tokens.size for prefetch in self._prefetches if prefetch.owner == owner)
        share = int(self._limits.max_hint_pool_share * self._tree.pool.capacity)
        left = max(share - coming - sum(node.known for node in held), 0)
        match = self._tree.match_prefix(tokens, namespace)
        path = match.node.path() if match is not None else []
        shared = sum(min(node.end, match.length) - node.start for node in path if match and node in held)
        return min(tokens.size, shared + left)

    def _merge(self, pin: Pin, own: Seq[Pin]) -> str | None:
        """Release the owner's pins that a new pin replaces. If too many would be left, release the new one instead, and
        return the reason.
        """
        path = set(pin.lock.held.path())
        covered = [old for old in own if old.lock.held in path and _outlasts(pin, old)]
        limits = self._limits
        if len(self._pins) - len(covered) > limits.max_pins:
            reason = f"at most {limits.max_pins} prefixes are pinned"
        elif len(own) + 1 + self._num_coming(pin.owner) - len(covered) > limits.max_hint_pins:
            reason = f"one owner's hints retain at most {limits.max_hint_pins} prefixes"
        else:
            for old in covered:
                self._pins.release(old.id)
            return None
        self._pins.release(pin.id)
        return reason

    def _pins_of(self, owner: str) -> list[Pin]:
        return [pin for pin in self._pins if pin.owner == owner]

    def _num_coming(self, owner: str | None) -> int:
        return sum(prefetch.owner == owner for prefetch in self._prefetches)

    def _fetch(self, tokens: TokenArray, namespace: str, owner: str) -> Fetch | None:
        """Begin to fetch from the host what the pool lacks of `tokens`. Returns None if nothing is fetched."""
        if self._host is None or self._num_coming(owner) >= self._limits.max_hint_pins:
            return None
        match = self._tree.match_prefix(tokens, namespace)
        computed = match.computed if match is not None else 0
        return self._host.fetch(tokens, namespace, computed) if computed < tokens.size else None

    def _arrive(self, prefetch: _Prefetch, now: float) -> None:
        assert self._host is not None
        fetch, owner = prefetch.fetch, prefetch.owner
        if fetch.locks_path and now < prefetch.expires:
            own = self._pins_of(owner)
            pin = self._pins.add(prefetch.tokens, fetch.namespace, prefetch.priority, prefetch.expires, owner)
            if pin is not None:
                self._merge(pin, own)
        self._host.leave(fetch)

    def _demote(self, tokens: TokenArray, namespace: str, start: int) -> int:
        copying = self._host.locks() if self._host is not None else ()
        return demote(self._tree, tokens, namespace, start, copying)

    def _counted(self, results: Seq[HintResult]) -> tuple[HintResult, ...]:
        for result in results:
            self.counts[result.status] += 1
        return tuple(results)


def _share(hint: CacheHint, size: int, live: bool) -> HintResult:
    if not live:
        return _refused(hint, "is only for a request")
    shared = size if hint.num_tokens is None else hint.num_tokens
    if 0 < shared < size:
        return HintResult("share", "clipped", size, reason="num_tokens: a prompt is shared as a whole or not at all")
    return HintResult("share", "accepted", min(shared, size))


def _outlasts(pin: Pin, other: Pin) -> bool:
    return pin.expires >= other.expires and pin.priority >= other.priority


def _demotes(hint: CacheHint, result: HintResult) -> bool:
    return hint.action == "demote" and result.status != "refused"


def _refused(hint: CacheHint, reason: str) -> HintResult:
    return HintResult(hint.action, "refused", reason=reason)


def _too_long(tokens: TokenArray) -> str:
    return f"the prompt has {tokens.size} tokens"
