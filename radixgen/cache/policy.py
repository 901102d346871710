"""Eviction policies: functions from a node to a sortable key. The node with the smallest key is evicted first."""

from collections.abc import Callable

from radixgen.cache.node import Node

EvictionPolicy = Callable[[Node], tuple[float, ...]]


def least_recently_used(node: Node) -> tuple[float, ...]:
    """Evict the lowest priority first, then the least recently used."""
    return node.priority, node.last_used


def first_in(node: Node) -> tuple[float, ...]:
    """Evict the lowest priority first, then the oldest."""
    return node.priority, node.serial
