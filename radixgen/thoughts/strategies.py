"""Search strategies: the order in which a tree of thoughts grows.

A strategy has one method, `plan(root)`. It is a generator of bursts: each list of thoughts that it yields is expanded,
and when it is resumed, the thoughts have children and the children have scores. It must depend on nothing else, so that
a resumed search can replay it over the known thoughts.
"""

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol

from radixgen.core import InvalidRequest, check_integer
from radixgen.thoughts.thought import Thought, ranked

Plan = Generator[list[Thought], None, None]
_MOST = 2**31 - 1


class Strategy(Protocol):
    """Strategy of a search. The thoughts that it yields must be open, and not yielded before."""

    def plan(self, root: Thought) -> Plan:
        """Yield bursts of thoughts to expand."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BreadthFirst:
    """Level by level, the `breadth` best thoughts of each (Tree of Thoughts, arXiv 2305.10601, algorithm 1)."""

    breadth: int = 5
    depth: int = 3

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(breadth=self.breadth, depth=self.depth)

    def plan(self, root: Thought) -> Plan:
        frontier = [root]
        for _ in range(self.depth):
            yield frontier
            children = ranked([child for thought in frontier for child in thought.children])
            frontier = children[: self.breadth]
            _prune(children[self.breadth :])
            if not frontier:
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthFirst:
    """Follow the best child down to `depth`, then backtrack to the next best. Children scoring `threshold` or less are
    pruned.

    Tree of Thoughts, arXiv 2305.10601, algorithm 2.
    """

    depth: int = 3
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(depth=self.depth)

    def plan(self, root: Thought) -> Plan:
        stack = [root]
        while stack:
            thought = stack.pop()
            yield [thought]
            children = ranked(thought.children)
            kept = [child for child in children if self.threshold is None or _score(child) > self.threshold]
            _prune(set(children).difference(kept))
            if thought.depth + 1 < self.depth:
                stack += reversed(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestFirst:
    """The `width` best thoughts so far, at any depth less than `depth`."""

    depth: int = 3
    width: int = 1

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(depth=self.depth, width=self.width)

    def plan(self, root: Thought) -> Plan:
        heap = [(0.0, root.id, root)]
        while heap:
            burst = [heappop(heap)[2] for _ in range(min(self.width, len(heap)))]
            yield burst
            for child in ranked([child for thought in burst for child in thought.children]):
                if child.depth < self.depth:
                    heappush(heap, (-_score(child), child.id, child))


@dataclass(frozen=True, slots=True, kw_only=True)
class MonteCarlo:
    """Monte Carlo tree search with UCT (Kocsis and Szepesvári, 2006).

    The score of a thought takes the place of a simulation: it counts as a visit, with the score as reward, to the
    thought and all its ancestors. Each of `iterations` walks goes from the root to a thought that is not expanded, by
    the greatest `mean + exploration * sqrt(ln(visits of the parent) / visits)`, with means scaled to [0, 1] by the
    lowest and highest score so far. Fully explored subtrees are skipped. `width` walks share a burst; until its result
    is known, each counts as a visit without reward (virtual loss), so that walks diverge.
    """

    depth: int = 3
    iterations: int = 32
    exploration: float = math.sqrt(2)
    width: int = 1

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(depth=self.depth, iterations=self.iterations, width=self.width)
        if not 0 <= self.exploration < math.inf:
            raise InvalidRequest("exploration", self.exploration, "must be a number from 0")

    def plan(self, root: Thought) -> Plan:
        closed: set[Thought] = set()
        grown: set[Thought] = set()
        scale, left = _Scale(), self.iterations
        while left > 0 and root not in closed:
            burst = self._walks(root, grown, closed, scale, min(self.width, left))
            left -= len(burst)
            yield burst
            grown.update(burst)
            for leaf in burst:
                _count(leaf, -1)
                self._learn(leaf, closed, scale)

    def _walks(
        self, root: Thought, grown: set[Thought], closed: set[Thought], scale: "_Scale", most: int
    ) -> list[Thought]:
        """Choose up to `most` different thoughts to expand. `grown`: thoughts that were expanded before."""
        taken, leaves = set(closed), list[Thought]()
        while len(leaves) < most and root not in taken:
            leaf = root
            while leaf in grown:
                leaf = max((child for child in leaf.children if child not in taken), key=self._worth(leaf, scale))
            leaves.append(leaf)
            _count(leaf, 1)
            _close(leaf, taken)
        return leaves

    def _worth(self, parent: Thought, scale: "_Scale") -> "_Worth":
        spread = self.exploration * math.sqrt(math.log(max(parent.visits, 1)))
        return _Worth(spread, scale)

    def _learn(self, leaf: Thought, closed: set[Thought], scale: "_Scale") -> None:
        for child in leaf.children:
            if child.score is not None:
                scale.see(child.score)
                _count(child, 1, child.score)
            if not child.open or child.score is None or child.depth >= self.depth:
                closed.add(child)
        if all(child in closed for child in leaf.children):
            _close(leaf, closed)


@dataclass(slots=True)
class _Scale:
    """Scales scores to [0, 1] by the lowest and highest so far."""

    low: float = field(default=math.inf)
    high: float = field(default=-math.inf)

    def see(self, score: float) -> None:
        self.low, self.high = min(self.low, score), max(self.high, score)

    def __call__(self, score: float) -> float:
        return (score - self.low) / (self.high - self.low) if self.high > self.low else 0.5


@dataclass(frozen=True, slots=True)
class _Worth:
    """UCT of a child."""

    spread: float
    scale: _Scale

    def __call__(self, child: Thought) -> float:
        return self.scale(child.total / child.visits) + self.spread / math.sqrt(child.visits)


def _count(thought: Thought, visits: int, reward: float = 0.0) -> None:
    for each in thought.lineage():
        each.visits += visits
        each.total += reward


def _close(thought: Thought, closed: set[Thought]) -> None:
    """Close a thought, and each ancestor whose children are all closed."""
    for each in thought.lineage():
        if each is not thought and not all(child in closed for child in each.children):
            return
        closed.add(each)


def _prune(thoughts: Iterable[Thought]) -> None:
    for thought in thoughts:
        thought.pruned = True


def _score(thought: Thought) -> float:
    assert thought.score is not None
    return thought.score


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        check_integer(name, value, 1, _MOST)
