"""Pins: cached prefixes that are kept for a while though no request holds them."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sortedcontainers import SortedKeyList

from radixgen.cache import Lock, Match, Node, RadixTree, TokenArray


@dataclass(eq=False, slots=True)
class Pin:
    """A kept prefix of `num_tokens`, until `expires` (seconds on the engine's clock) or until memory is short."""

    id: int
    lock: Lock
    num_tokens: int
    priority: int
    expires: float


class Pins:
    """Locks without requests. They yield before any request does, where that makes room: the lowest priority first,
    then the oldest.
    """

    def __init__(self, tree: RadixTree) -> None:
        self.released_early = 0
        """Pins that gave way because memory was short."""
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

    def add(self, tokens: TokenArray, namespace: str, priority: int, expires: float) -> Pin | None:
        """Pin what is cached of `tokens`; None where nothing of it is."""
        match = self._tree.match_prefix(tokens, namespace)
        if match is None or match.computed == 0:
            return None
        self._serial += 1
        lock = self._tree.insert(tokens[: match.computed], namespace)
        pin = Pin(self._serial, lock, match.computed, priority, expires)
        self._by_id[pin.id] = pin
        self._by_weakness.add(pin)
        self._next_expiry = min(self._next_expiry, expires)
        return pin

    def release(self, pin_id: int) -> None:
        pin = self._by_id.pop(pin_id)
        self._by_weakness.remove(pin)
        self._tree.unlock(pin.lock)

    def release_weakest(self) -> bool:
        """Give way. False where no pin is left."""
        if not self._by_weakness:
            return False
        self.release(self._by_weakness[0].id)
        self.released_early += 1
        return True

    def yieldable(self, match: Match | None = None) -> int:
        """Slots that would be cached or free if all pins gave way, without those of the tokens in `match`."""
        alone = self._alone()
        slots = sum(node.capacity for node in alone)
        if match is None or not slots:
            return slots
        kept = {node: min(node.known, match.length - node.start) for node in match.node.path()}
        return slots - sum(kept.get(node, 0) for node in alone)

    def expire(self, now: float) -> None:
        """Release what has expired."""
        if now < self._next_expiry:
            return
        for pin in [pin for pin in self if pin.expires <= now]:
            self.release(pin.id)
        self._next_expiry = min((pin.expires for pin in self), default=math.inf)

    @property
    def num_tokens(self) -> int:
        """Tokens on the paths that pins hold, each counted once."""
        nodes = {part.id: part.known for pin in self for part in pin.lock.held.path()}
        return sum(nodes.values())

    def _alone(self) -> list[Node]:
        """The nodes that nothing but pins holds, each behind those that follow it in the tree."""
        held = Counter(pin.lock.held for pin in self)
        alone = [node for node, pins in held.items() if pins == node.lock_count + node.locked_children]
        for node in alone:
            above = node.parent
            if above is not None:
                held[above] += 1
                if held[above] == above.lock_count + above.locked_children:
                    alone.append(above)
        return alone
