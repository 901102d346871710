"""Questions about the path from the root to a node."""

from radixgen.cache import Lock, Node


def lacking(node: Node) -> list[Node]:
    """Return the nodes of the path with tokens without a slot, from the top."""
    nodes = []
    above: Node | None = node
    while above is not None and above.scheduled < above.known:
        nodes.append(above)
        above = above.parent
    return nodes[::-1]


def scheduled_end(node: Node) -> int:
    """Return the number of leading tokens of the path that have a slot."""
    first = next(iter(lacking(node)), node)
    return first.start + first.scheduled


def holds_alone(lock: Lock | None) -> bool:
    """Return whether any slots would become evictable if the lock were released."""
    node = lock.node if lock else None
    while node is not None and node.lock_count + node.locked_children == 1:
        if node.capacity:
            return True
        node = node.parent
    return False
