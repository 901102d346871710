"""Eviction policies: functions from a node to a sortable key. The node with the smallest key is evicted first.

Both evict the lowest priority first, and within it nodes that no waiting request matches.
"""

from collections.abc import Callable

from radixgen.cache.node import Node

EvictionPolicy = Callable[[Node], tuple[float, ...]]


def least_recently_used(node: Node) -> tuple[float, ...]:
    """Evict the least recently used node next."""
    return node.priority, bool(node.followers), node.last_used


def first_in(node: Node) -> tuple[float, ...]:
    """Evict the oldest node next."""
    return node.priority, bool(node.followers), node.serial
