"""Moves of tokens from a node up into its parent: the boundary between the two shifts, and no KV is copied."""

from typing import TYPE_CHECKING

from radixgen.cache.match import follow_raise
from radixgen.cache.node import Node
from radixgen.cache.pool import Extent, split_extents

if TYPE_CHECKING:
    from radixgen.cache.tree import RadixTree


def pass_up(tree: "RadixTree", node: Node, child: Node) -> bool:
    """Fast path of `shift_boundary`: one buffer and one run of slots hold both nodes, and the child is computed
    and keeps part of the run. Returns False, with nothing changed, in any other case.
    """
    if not child.computed == child.known == child.capacity:
        return False
    (first, size), (slot, length), end = node.extents[-1], child.extents[0], node._offset + node.known
    if length == 1 or first + size != slot or node._buffer is not child._buffer or end != child._offset:
        return False
    node.extents[-1], child.extents[0] = Extent(first, size + 1), Extent(slot + 1, length - 1)
    node.known = node.scheduled = node.computed = node.capacity = node.known + 1
    child.known = child.scheduled = child.computed = child.capacity = child.known - 1
    child.start += 1
    child._offset += 1
    node.children.clear()
    node.children[int(child._buffer[end + 1])] = child
    if not child.lock_count + child.locked_children:
        tree.evictable_tokens -= 1
    tree.columns.pass_up(node, child)
    tree._changed(child)
    if child.followers:
        follow_raise(child, node)
    for listener in tree.listeners:
        listener.moved(child, node, 1)
    return True


def shift_boundary(tree: "RadixTree", node: Node, child: Node) -> None:
    """Move the first token of an only child up into `node`, with its slot. Removes a child left without tokens."""
    token = child.first_token
    del node.children[token]
    if not child.locked:
        tree.evictable_tokens -= 1
    if node._buffer is child._buffer and node._offset + node.known == child._offset:
        node.known += 1
    else:
        node._append(token)
    move_head(tree, child, node, 1)
    follow_raise(child, node)
    tree._changed(child)
    tree.columns.write(node)
    if not child.known:
        tree._forget(child)
        return
    if child.children:
        tree._slots.cut(child, child.known)
    node.children[child.first_token] = child
    tree.columns.write(child)
    if child.computed and child.extents[0].start == node.extents[-1].end:
        tree.columns.following[node.id] = min(child.computed, child.extents[0].length)


def move_head(tree: "RadixTree", lower: Node, upper: Node, count: int) -> None:
    """Move the first `count` tokens of `lower`, with their slots and states, to the end of `upper`."""
    scheduled, computed = min(count, lower.scheduled), min(count, lower.computed)
    moved, kept = split_extents(lower.extents, scheduled)
    if upper.extents and moved and upper.extents[-1].end == moved[0].start:
        moved[0] = Extent(upper.extents[-1].start, upper.extents[-1].length + moved[0].length)
        upper.extents.pop()
    upper.extents.extend(moved)
    upper.capacity += scheduled
    lower.extents = kept
    lower.capacity -= scheduled
    upper.scheduled += scheduled
    upper.computed += computed
    lower.scheduled -= scheduled
    lower.computed -= computed
    lower.known -= count
    lower.start += count
    lower._offset += count
    for listener in tree.listeners:
        listener.moved(lower, upper, count)
