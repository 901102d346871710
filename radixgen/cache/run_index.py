"""Runs of a prompt's tokens that are cached elsewhere, at other positions: an index of hashed token windows.

As in LZ77 (Ziv and Lempel, 1977) and rsync, the cached side is indexed at multiples of the window, and the prompt is
looked up at every offset, so that any run of almost two windows is found. Tokens are compared before a run is believed.
"""

from bisect import bisect, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.node import BLENDED, PRIVATE, Node
from radixgen.cache.tokens import TokenArray, common_prefix_len, exact_len
from radixgen.cache.tree import RadixTree

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MAX_PLACES = 8
"""Places that are remembered of one window."""
_MAX_COMPARED = 1024
"""Runs that one search compares at most."""


class KVMoves(NamedTuple):
    """Tokens whose KV is copied between slots, and the positions that their keys move from and to: int64 `[tokens]`."""

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64]
    new_positions: NDArray[np.int64]


class KVMover(Protocol):
    """Copies KV between slots of the device, and turns keys to their new positions."""

    def move(self, moves: KVMoves) -> None:
        """Begin the copies, before all work that is submitted to the device later. No target is a source."""


@dataclass(frozen=True, slots=True)
class Run:
    """`length` tokens of a prompt, from position `start` on, that are cached from position `source` on of a path."""

    start: int
    source: int
    length: int
    node: Node
    """The node in which the run ends."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    def slots(self) -> NDArray[np.int64]:
        """The slots of the cached tokens, `[length]`."""
        return self.node.path_slots(self.source, self.source + self.length)


def blended_namespace(namespace: str) -> str:
    """Return the namespace of inexact KV that belongs to `namespace`."""
    return namespace + BLENDED


class RunIndex:
    """Listens to a tree, and finds runs in its computed tokens: of a namespace itself and of its inexact KV.

    Memory is bounded by the tree: an entry per window of computed tokens. Nodes are indexed when a search needs them,
    each token once, unless it is evicted or moves to another node.
    """

    def __init__(self, tree: RadixTree, min_run: int) -> None:
        """`min_run`: shortest run that is found, in tokens."""
        self._min_run = min_run
        self._window = (min_run + 1) // 2
        self._places: defaultdict[str, dict[int, dict[tuple[Node, int], None]]] = defaultdict(dict)
        """Of each namespace and each hash of a window: the nodes in which such windows end, and where these begin."""
        self._hashes: dict[Node, list[int]] = {}
        """Hashes of the windows that end in each node, in order."""
        self._exact_ends: dict[Node, int] = {}
        """Position before which the tokens of the path to a node are known not to be marked."""
        self._changed: dict[Node, None] = {}
        """Nodes that may have tokens to index."""
        for node in tree.nodes():
            self.changed(node)
        tree.listeners.append(self)

    # -- Listener ------------------------------------------------------------------------------------------

    def changed(self, node: Node) -> None:
        """As `Listener.changed`."""
        if not node.known:
            self._forget(node)
        elif _owner(node) is not None:
            end = node.start + node.computed
            self._cut(node, end // self._window - self._first_window(node))
            if self._exact_ends.get(node, 0) > end:
                self._exact_ends[node] = end
            self._changed[node] = None

    def moved(self, lower: Node, upper: Node, count: int) -> None:
        """As `Listener.moved`."""
        namespace = _owner(lower)
        if namespace is None:
            return
        begin = lower.start - count
        self._pass_up(namespace, lower, upper, begin // self._window)
        exact = self._exact_ends.get(lower, 0)
        if exact >= begin == self._exact_ends.get(upper, begin):
            self._exact_ends[upper] = min(exact, lower.start)
        if exact < lower.start:
            self._exact_ends.pop(lower, None)
        self._changed[upper] = self._changed[lower] = None
        if not lower.known:
            self._forget(lower)

    # -- searching -----------------------------------------------------------------------------------------

    def find(self, tokens: TokenArray, namespace: str, first: int, stop: int) -> list[Run]:
        """Return runs of `tokens[first:stop]`, longest first and without overlap.

        Each is the longest that is cached of the tokens that the runs before it have left. Of equal ones, exact KV
        comes first.
        """
        self._update()
        found: list[tuple[int, bool, int, int, Run]] = [
            (-run.length, BLENDED in run.node.namespace, run.start, order, run)
            for order, run in enumerate(self._candidates(tokens, namespace, first, stop))
        ]
        heapify(found)
        taken: list[tuple[int, int]] = []
        runs: list[Run] = []
        while found:
            _, inexact, _, order, run = heappop(found)
            left = list(_parts_between(run, taken))
            if left == [run]:
                insort(taken, (run.start, run.stop))
                runs.append(run)
                continue
            for part in left:
                if part.length >= self._min_run:
                    heappush(found, (-part.length, inexact, part.start, order, part))
        return runs

    def check(self) -> None:
        """Assert that exactly the windows of computed tokens are indexed, except for those of common content."""
        self._update()
        places = {(node, at) for table in self._places.values() for holders in table.values() for node, at in holders}
        for node, hashes in self._hashes.items():
            exact = exact_len(node.path_tokens(0, node.start + node.computed))
            begin, end = self._first_window(node), max(node.start, exact) // self._window
            assert len(hashes) == end - begin, f"{node} has {len(hashes)} windows"
            tokens = node.path_tokens(0, end * self._window)
            assert hashes == window_hashes(tokens, self._window)[:: self._window][begin:].tolist()
            assert all(number // self._window - begin < len(hashes) for held, number in places if held is node)
        assert {node for node, _ in places} <= self._hashes.keys()

    def _candidates(self, tokens: TokenArray, namespace: str, first: int, stop: int) -> Iterator[Run]:
        """Yield the longest run around each window that is indexed, each once."""
        table = self._places.get(namespace, {})
        seen: defaultdict[int, list[Run]] = defaultdict(list)
        compared = 0
        for at, window in enumerate(window_hashes(tokens[first:stop], self._window).tolist(), first):
            for node, position in table.get(window, ()):
                near = seen[position - at]
                if any(run.start <= at < run.stop and _is_above(node, run.node) for run in near):
                    continue
                if compared == _MAX_COMPARED:
                    return
                compared += 1
                run = _extend(tokens, first, stop, at, node, position)
                near.append(run)
                if run.length >= self._min_run:
                    yield run

    # -- indexing ------------------------------------------------------------------------------------------

    def _first_window(self, node: Node) -> int:
        """Return the number of the first window that ends in the node's tokens."""
        return node.start // self._window

    def _update(self) -> None:
        """Index what has changed since the last search."""
        for node in self._changed:
            if node.computed:
                begin = self._first_window(node) + len(self._hashes.get(node, ()))
                self._add(node, begin, max(node.start, self._exact_end(node)) // self._window)
        self._changed.clear()

    def _exact_end(self, node: Node) -> int:
        """Return the position of the first marked token of the path to the node, or the end of its computed tokens."""
        path = [node]
        while path[-1] not in self._exact_ends and path[-1].parent is not None:
            path.append(path[-1].parent)
        end = 0
        for part in reversed(path):
            end = self._exact_ends.get(part, end)
            if end >= part.start:
                unread = part.tokens[end - part.start : part.computed]
                end += exact_len(unread) if unread.size and unread[0] >= 0 else 0
            self._exact_ends[part] = end
        return end

    def _add(self, node: Node, begin: int, end: int) -> None:
        """Index the windows numbered `[begin, end)`, the last of the node's."""
        namespace = _owner(node)
        if end <= begin or namespace is None:
            return
        tokens = node.path_tokens(begin * self._window, end * self._window)
        hashes = window_hashes(tokens, self._window)[:: self._window].tolist()
        self._hashes.setdefault(node, []).extend(hashes)
        for number, window in enumerate(hashes, begin):
            self._place(namespace, window, node, number)

    def _cut(self, node: Node, count: int) -> None:
        """Remove all windows of a node but the first `count`."""
        hashes, namespace = self._hashes.get(node, []), _owner(node)
        if namespace is None:
            return
        first = self._first_window(node)
        while len(hashes) > count:
            self._remove(namespace, hashes.pop(), node, first + len(hashes))
        if not hashes:
            self._hashes.pop(node, None)

    def _pass_up(self, namespace: str, lower: Node, upper: Node, first: int) -> None:
        """Let `upper` have the windows of `lower`, numbered from `first` on, that end in it now. They are indexed again
        if windows before them are not indexed yet.
        """
        hashes = self._hashes.get(lower, [])
        passed = hashes[: self._first_window(lower) - first]
        if not passed:
            return
        del hashes[: len(passed)]
        own = self._hashes.setdefault(upper, [])
        follows = self._first_window(upper) + len(own) == first
        for number, window in enumerate(passed, first):
            self._remove(namespace, window, lower, number)
            if follows:
                self._place(namespace, window, upper, number)
        own.extend(passed if follows else ())

    def _forget(self, node: Node) -> None:
        """Remove all that is known of a node that is removed."""
        self._cut(node, 0)
        self._exact_ends.pop(node, None)
        self._changed.pop(node, None)

    def _place(self, namespace: str, window: int, node: Node, number: int) -> None:
        """Remember where a window is, unless there are many such already."""
        places = self._places[namespace].setdefault(window, {})
        if len(places) < _MAX_PLACES:
            places[node, number * self._window] = None

    def _remove(self, namespace: str, window: int, node: Node, number: int) -> None:
        """Forget where a window is."""
        table = self._places[namespace]
        places = table.get(window, {})
        places.pop((node, number * self._window), None)
        if not places:
            table.pop(window, None)
        if not table:
            del self._places[namespace]


def _parts_between(run: Run, taken: Sequence[tuple[int, int]]) -> Iterator[Run]:
    """Yield the parts of a run outside the ranges `taken`, which are ascending and disjoint."""
    first, at = run.start, bisect(taken, (run.start, run.start))
    if at and taken[at - 1][1] > first:
        at -= 1
    while first < run.stop:
        begin, stop = taken[at] if at < len(taken) else (run.stop, run.stop)
        if first < begin:
            end = min(begin, run.stop)
            yield replace(run, start=first, source=run.source + first - run.start, length=end - first)
        first, at = max(first, stop) if begin < run.stop else run.stop, at + 1


def window_hashes(tokens: TokenArray, window: int) -> NDArray[np.uint64]:
    """Hash every window of `tokens`: uint64 `[max(tokens - window + 1, 0)]`. Polynomials modulo 2^64."""
    if tokens.size < window:
        return np.empty(0, np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * _powers(_BASE, tokens.size), dtype=np.uint64)])
    hashes: NDArray[np.uint64] = (sums[window:] - sums[:-window]) * _powers(_INVERSE, tokens.size - window + 1)
    return hashes


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    powers: NDArray[np.uint64] = np.multiply.accumulate(factors)
    return powers


def _owner(node: Node) -> str | None:
    """Return the namespace in whose searches the node is found, or None if it belongs to one sequence alone."""
    namespace = node.namespace.removesuffix(BLENDED)
    return None if PRIVATE in namespace else namespace


def _is_above(node: Node, lower: Node) -> bool:
    """Whether `node` is `lower` or above it."""
    above: Node | None = lower
    while above is not None and above.start >= node.start:
        if above is node:
            return True
        above = above.parent
    return False


def _extend(tokens: TokenArray, first: int, stop: int, at: int, node: Node, position: int) -> Run:
    """Return the longest run within `tokens[first:stop]` around `tokens[at]`, which may be cached at `position` of the
    path to `node`. Its length is 0 if the tokens there differ.
    """
    reach = min(at - first, position)
    path = node.path_tokens(position - reach, min(node.start + node.computed, position + stop - at))
    before = common_prefix_len(tokens[at - reach : at][::-1], path[:reach][::-1])
    after = common_prefix_len(tokens[at:stop], path[reach:])
    while position + after == node.end and at + after < stop:
        child = node.children.get(int(tokens[at + after]))
        if child is None or not child.computed:
            break
        node = child
        after += common_prefix_len(tokens[at + after : stop], node.tokens[: node.computed])
    return Run(at - before, position - before, before + after, node)
