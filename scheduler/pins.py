"""Pins: cached prefixes that stay locked for some time without a request."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sortedcontainers import SortedKeyList

from radixgen.cache import Lock, Match, Node, RadixTree, TokenArray


@dataclass(eq=False, slots=True)
class Pin:
    """A pinned prefix of `num_tokens`, until `expires` (seconds on the engine's clock) or until memory is short.

    `owner`: whose cache hint made it; None for a pin of `Engine.pin`.
    """

    id: int
    lock: Lock
    num_tokens: int
    priority: int
    expires: float
    owner: str | None = None


class Pins:
    """Locks held by pins. They are released before any request is preempted if that makes room: lowest priority first,
    then oldest.
    """

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._by_weakness: SortedKeyList[Pin] = SortedKeyList(key=lambda pin: (pin.priority, pin.id))
        self._by_id: dict[int, Pin] = {}
        self._serial = 0
        self._next_expiry = math.inf

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._by_weakness)

    def __contains__(self, pin_id: int) -> bool:
        return pin_id in self._by_id

    def add(
        self,
        tokens: TokenArray,
        namespace: str,
        priority: int,
        expires: float,
        owner: str | None = None,
        *,
        whole: bool = False,
    ) -> Pin | None:
        """Pin the cached prefix of `tokens`; None if nothing of it is cached, or with `whole`, less than all."""
        match = self._tree.match_prefix(tokens, namespace)
        if match is None or match.computed < (tokens.size if whole else 1):
            return None
        self._serial += 1
        lock = self._tree.insert(tokens[: match.computed], namespace)
        pin = Pin(self._serial, lock, match.computed, priority, expires, owner)
        self._by_id[pin.id] = pin
        self._by_weakness.add(pin)
        self._next_expiry = min(self._next_expiry, expires)
        return pin

    def release(self, pin_id: int) -> None:
        pin = self._by_id.pop(pin_id)
        self._by_weakness.remove(pin)
        self._tree.unlock(pin.lock)

    def release_weakest(self) -> bool:
        """Release the weakest pin. Returns False if there is none."""
        if not self._by_weakness:
            return False
        self.release(self._by_weakness[0].id)
        return True

    def release_from_largest(self, most: int) -> bool:
        """Release the weakest pin of the owner with the most pins of hints, if these are more than `most`. Returns
        whether they were.
        """
        counts = Counter(pin.owner for pin in self if pin.owner is not None)
        for owner, count in counts.most_common(1):
            if count > most:
                self.release(next(pin.id for pin in self if pin.owner == owner))
                return True
        return False

    def freed_by_release(self, match: Match | None = None) -> int:
        """Return how many slots become evictable if all pins are released, not counting those of `match`."""
        alone = self._alone()
        slots = sum(node.num_keys + node.reserved for node in alone)
        if match is None or not slots:
            return slots
        kept = {node: min(node.num_keys, match.length - node.start) for node in match.node.path()}
        return slots - sum(kept.get(node, 0) for node in alone)

    def expire(self, now: float) -> None:
        """Release expired pins."""
        if now < self._next_expiry:
            return
        for pin in [pin for pin in self if pin.expires <= now]:
            self.release(pin.id)
        self._next_expiry = min((pin.expires for pin in self), default=math.inf)

    @property
    def num_tokens(self) -> int:
        """Distinct tokens on the paths of all pins."""
        return sum(node.known for node in nodes_of(self))

    def _alone(self) -> list[Node]:
        """Return the nodes locked by pins only, each after its descendants."""
        held = Counter(pin.lock.held for pin in self)
        alone = [node for node, pins in held.items() if pins == node.lock_count + node.locked_children]
        for node in alone:
            above = node.parent
            if above is not None:
                held[above] += 1
                if held[above] == above.lock_count + above.locked_children:
                    alone.append(above)
        return alone


def nodes_of(pins: Iterable[Pin]) -> set[Node]:
    """Return the nodes on the paths of pins."""
    nodes: set[Node] = set()
    for pin in pins:
        above: Node | None = pin.lock.held
        while above is not None and above not in nodes:
            nodes.add(above)
            above = above.parent
    return nodes
