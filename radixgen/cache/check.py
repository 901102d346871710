"""Checks of the tree's invariants, recomputed from the nodes alone."""

from typing import TYPE_CHECKING

import numpy as np

from radixgen.cache.columns import Columns
from radixgen.cache.node import PRIVATE, Node
from radixgen.cache.pool import ExtentPool
from radixgen.core import Plan

if TYPE_CHECKING:
    from radixgen.cache.tree import RadixTree


def check_tree(tree: "RadixTree") -> None:
    """Assert every invariant of the tree and its pool."""
    tree.pool.check()
    nodes = _reachable(tree)
    assert len(nodes) == tree.num_nodes
    _check_slots(tree, nodes)
    evictable = sum(node.num_keys for node in nodes if not node.locked)
    assert tree.evictable_tokens == evictable, (tree.evictable_tokens, evictable)
    assert tree.reserved_tokens == sum(node.reserved for node in nodes)
    assert tree.unscheduled_tokens == sum(node.known - node.scheduled for node in nodes)
    for node in nodes:
        assert tree.node(node.id) is node
        assert (node in tree.evictable) == node.evictable
        assert not node.evictable or tree.evictable.up_to_date(node), f"{node} is evicted out of order"
        _check_node(node)
        _check_columns(tree.columns, node)
    assert len(tree.evictable) == sum(node.evictable for node in nodes)
    for followed in tree.followed():
        fresh = tree.match_prefix(followed.tokens, followed.namespace)
        assert followed.match() == fresh, f"a followed match is {followed.match()}, and should be {fresh}"


def check_plan(plan: Plan, pool: ExtentPool) -> None:
    """Assert that no segment of the plan includes a free or fenced slot."""
    taken = np.ones(pool.capacity, np.bool_)
    for extent in (*pool.free_extents(), *pool.fenced_extents()):
        taken[extent.start : extent.end] = False
    for start, length in zip(plan.segment_starts.tolist(), plan.segment_lengths.tolist(), strict=True):
        assert taken[start : start + length].all(), f"a plan reads free slots in [{start}, {start + length})"


def _reachable(tree: "RadixTree") -> list[Node]:
    seen = tree.roots()
    for node in seen:
        seen.extend(node.children.values())
    assert len({id(node) for node in seen}) == len(seen), "a node is reachable twice"
    return seen


def _check_slots(tree: "RadixTree", nodes: list[Node]) -> None:
    """Assert that each slot has exactly one owner."""
    pool = tree.pool
    owned = [extent for node in nodes for extent in node.extents] + list(tree.loading)
    position = 0
    for extent in sorted(owned + pool.free_extents() + pool.fenced_extents()):
        assert extent.start == position, f"slot {min(position, extent.start)} has no or two owners"
        position = extent.end
    assert position == pool.capacity
    assert pool.used == sum(extent.length for extent in owned)


def _check_node(node: Node) -> None:
    assert node.known >= node.scheduled >= node.computed >= 0, node
    assert node.lock_count >= 0
    assert node.locked_children == sum(child.locked for child in node.children.values())
    assert all(extent.length > 0 for extent in node.extents)
    if node.extent_positions is None:
        assert node.capacity == sum(extent.length for extent in node.extents)
    else:
        _check_thinned(node)
    assert node.reserved >= 0 and (node.locked or not node.reserved)
    assert not node.children or node.reserved <= node.known - node.scheduled
    assert node.locked or node.complete, f"an unlocked node has an uncomputed tail: {node}"
    for token, child in node.children.items():
        assert child.parent is node and child.first_token == token
        assert child.known > 0 and child.start == node.end, (node, child)
        assert child.namespace == node.namespace
        assert node.scheduled == node.known or child.scheduled == 0
        assert node.complete or child.computed == 0
    for followed in node.followers:
        assert followed.node is node and followed.namespace == node.namespace


def _check_thinned(node: Node) -> None:
    """Assert that a thinned node is in a namespace of its own, is removed with its child, and that the positions of its
    slots ascend.
    """
    assert PRIVATE in node.namespace and node.complete and node.capacity == node.known, node
    assert len(node.children) == 1 and not node.lock_count, node
    positions, _ = node.key_slots()
    assert positions.size <= node.known and (np.diff(positions) > 0).all(), node
    assert not positions.size or node.start <= positions[0] <= positions[-1] < node.end, node


def _check_columns(columns: Columns, node: Node) -> None:
    row = columns.parent[node.id], columns.start[node.id], columns.scheduled[node.id]
    assert row == (node.parent.id if node.parent else -1, node.start, node.num_keys), (row, node)
    assert node.extent_positions == (columns.thinned[node.id].tolist() if node.id in columns.thinned else None)
    assert columns.reserved[node.id] == node.reserved
    assert columns.num_extents[node.id] == len(node.extents)
    assert not node.extents or columns.first_slot[node.id] == node.extents[0].start
    if len(node.extents) > 1:
        place = columns.first_extent[node.id]
        assert columns.extents[place : place + len(node.extents)].tolist() == [list(e) for e in node.extents]
    assert columns.place[node.id] == -1
