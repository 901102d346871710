"""Runs of a prompt's tokens that are cached elsewhere, at other positions: an index of hashed token windows.

As in LZ77 (Ziv and Lempel, 1977) and rsync, the cached side is indexed at multiples of the window, and the prompt is
looked up at every offset, so that any run of almost two windows is found. Tokens are compared before a run is believed.
"""

from collections import defaultdict
from collections.abc import Iterator
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

    Memory is bounded by the tree: an entry per window of computed tokens. Nodes are indexed when a search needs them.
    """

    def __init__(self, tree: RadixTree, min_run: int) -> None:
        """`min_run`: shortest run that is found, in tokens."""
        self._min_run = min_run
        self._window = (min_run + 1) // 2
        self._places: defaultdict[str, dict[int, dict[tuple[Node, int], None]]] = defaultdict(dict)
        """Of each namespace and each hash of a window: the nodes in which such windows end, and where these begin."""
        self._hashes: dict[Node, list[int]] = {}
        """Hashes of the windows that end in each node, in order."""
        self._changed: dict[Node, bool] = {}
        """Nodes to index again, and whether more has changed than that they grew."""
        for node in tree.nodes():
            self.changed(node)
        tree.listeners.append(self)

    # -- Listener ------------------------------------------------------------------------------------------

    def changed(self, node: Node) -> None:
        """As `Listener.changed`."""
        if not node.known:
            self._drop(node)
            self._changed.pop(node, None)
        elif _owner(node) is not None:
            self._changed.setdefault(node, False)

    def moved(self, lower: Node, upper: Node, count: int) -> None:
        """As `Listener.moved`."""
        if _owner(lower) is not None:
            self._changed[lower] = self._changed[upper] = True

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
        free = np.ones(stop, np.bool_)
        runs: list[Run] = []
        while found:
            _, inexact, _, order, run = heappop(found)
            if free[run.start : run.stop].all():
                free[run.start : run.stop] = False
                runs.append(run)
                continue
            for part in self._parts(run, free):
                heappush(found, (-part.length, inexact, part.start, order, part))
        return runs

    def check(self) -> None:
        """Assert that exactly the windows of computed tokens are indexed, except for those of common content."""
        self._update()
        places = {(node, at) for table in self._places.values() for holders in table.values() for node, at in holders}
        for node, hashes in self._hashes.items():
            begin, end = self._window_range(node)
            assert len(hashes) == end - begin, f"{node} has {len(hashes)} windows"
            tokens = node.path_tokens(0, end * self._window)
            assert hashes == window_hashes(tokens, self._window)[:: self._window][begin:].tolist()
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

    def _parts(self, run: Run, free: NDArray[np.bool_]) -> Iterator[Run]:
        """Yield the parts of a run that others have left, if they are long enough."""
        left = np.flatnonzero(np.diff(np.pad(free[run.start : run.stop].astype(np.int8), 1)))
        for begin, end in left.reshape(-1, 2).tolist():
            if end - begin >= self._min_run:
                yield replace(run, start=run.start + begin, source=run.source + begin, length=end - begin)

    # -- indexing ------------------------------------------------------------------------------------------

    def _window_range(self, node: Node) -> tuple[int, int]:
        """Return the numbers of the first window that ends in the node's computed tokens, and of the one after the
        last. Tokens that were read inexactly are left out.
        """
        exact = exact_len(node.path_tokens(0, node.start + node.computed))
        return node.start // self._window, max(node.start, exact) // self._window

    def _update(self) -> None:
        """Index what has changed since the last search."""
        for node, moved in self._changed.items():
            begin, end = self._window_range(node)
            if moved or end - begin < len(self._hashes.get(node, ())):
                self._drop(node)
            if node.computed:
                self._add(node, begin + len(self._hashes.get(node, ())), end)
        self._changed.clear()

    def _add(self, node: Node, begin: int, end: int) -> None:
        """Index the windows numbered `[begin, end)`, the last of the node's."""
        namespace = _owner(node)
        if end <= begin or namespace is None:
            return
        tokens = node.path_tokens(begin * self._window, end * self._window)
        hashes = window_hashes(tokens, self._window)[:: self._window].tolist()
        self._hashes.setdefault(node, []).extend(hashes)
        for number, window in enumerate(hashes, begin):
            places = self._places[namespace].setdefault(window, {})
            if len(places) < _MAX_PLACES:
                places[node, number * self._window] = None

    def _drop(self, node: Node) -> None:
        """Remove all windows of a node."""
        hashes = self._hashes.pop(node, None)
        namespace = _owner(node)
        if not hashes or namespace is None:
            return
        table = self._places[namespace]
        for window in set(hashes):
            places = table[window] = {place: None for place in table.get(window, ()) if place[0] is not node}
            if not places:
                del table[window]
        if not table:
            del self._places[namespace]


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
    path = node.path_tokens(position - reach, node.start + node.computed)
    before = common_prefix_len(tokens[at - reach : at][::-1], path[:reach][::-1])
    after = common_prefix_len(tokens[at:stop], path[reach:])
    while position + after == node.end and at + after < stop:
        child = node.children.get(int(tokens[at + after]))
        if child is None or not child.computed:
            break
        node = child
        after += common_prefix_len(tokens[at + after : stop], node.tokens[: node.computed])
    return Run(at - before, position - before, before + after, node)
