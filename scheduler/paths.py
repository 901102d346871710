"""Questions about the path from the root to a node."""

from radixgen.cache import Lock, Node


def scheduled_end(node: Node) -> int:
    """Return the number of leading tokens of the path that have a slot."""
    first = next(iter(node.unscheduled_path()), node)
    return first.start + first.scheduled


def freed_slots(node: Node) -> int:
    """Return the number of tokens on the path that gave up their slots."""
    return sum(part.scheduled - part.num_keys for part in node.path())


def holds_alone(lock: Lock | None) -> bool:
    """Return whether any slots would become evictable if the lock were released."""
    node = lock.node if lock else None
    while node is not None and node.lock_count + node.locked_children == 1:
        if node.capacity:
            return True
        node = node.parent
    return False
