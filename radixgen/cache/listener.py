"""Interface for observers of a tree."""

from typing import Protocol

from radixgen.cache.node import Node


class Listener(Protocol):
    """Receives changes of computed tokens as they happen. May read the tree but must not change it."""

    def changed(self, node: Node) -> None:
        """The node's number of computed tokens changed. All tokens before them are computed. If the number fell, no
        token below the node is computed.
        """

    def moved(self, lower: Node, upper: Node, count: int) -> None:
        """The first `count` tokens of `lower` moved to the end of its parent `upper`."""
