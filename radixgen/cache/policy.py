"""Which unreferenced leaf goes first: a policy maps a node to a sortable key, and the smallest is evicted."""

from collections.abc import Callable

from radixgen.cache.node import Node

EvictionPolicy = Callable[[Node], tuple[float, ...]]


def least_recently_used(node: Node) -> tuple[float, ...]:
    """Lowest priority first, then the longest unused."""
    return node.priority, node.last_used


def first_in(node: Node) -> tuple[float, ...]:
    """Lowest priority first, then the oldest node."""
    return node.priority, node.serial
