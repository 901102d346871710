"""Token-level radix tree of all tokens held by live requests or still cached, each stored once.

`radixgen.cache.node` defines the nodes.
"""

from collections.abc import Callable, Iterator, Reversible, Sequence

import numpy as np
from numpy.typing import NDArray

from radixgen.cache import boundary
from radixgen.cache.check import check_tree
from radixgen.cache.columns import Columns
from radixgen.cache.eviction import EvictionQueue
from radixgen.cache.listener import Listener
from radixgen.cache.match import (
    FollowedMatch,
    Match,
    follow_append,
    follow_branch,
    follow_cut,
    follow_raise,
    follow_removal,
    longest_match,
)
from radixgen.cache.node import Lock, Node, end_demotion
from radixgen.cache.policy import EvictionPolicy, least_recently_used
from radixgen.cache.pool import Extent, ExtentPool
from radixgen.cache.recent_evictions import RecentEvictions
from radixgen.cache.slots import NodeSlots
from radixgen.cache.stamps import SlotStamps
from radixgen.cache.tokens import TokenArray, as_tokens


class RadixTree:
    """A forest of radix trees, one root per namespace, over one `ExtentPool`.

    `version` counts the changes that `columns.changed` and `columns.cut` record.
    """

    def __init__(
        self,
        pool: ExtentPool,
        *,
        policy: EvictionPolicy = least_recently_used,
        stamps: bool = False,
    ) -> None:
        """`stamps=True` makes `check()` verify that the slots of every node hold its own prefix's KV."""
        self.pool = pool
        self.evictable = EvictionQueue(policy)
        self.version = 0
        self.columns = Columns()
        self._slots = NodeSlots(pool, self.columns)
        self.listeners: list[Listener] = []
        self.on_idle: Callable[[Node], None] | None = None
        """Called with a node after its last lock was released. The node may have been removed by then."""
        self.recent_evictions = RecentEvictions()
        self.evicted_tokens = self.evictable_tokens = self.unscheduled_tokens = 0
        self.loading: set[Extent] = set()
        """Slots that belong to no node yet, because their KV is on its way from another tier."""
        self._unrooted: dict[FollowedMatch, None] = {}
        """Followed matches in namespaces without a root."""
        self._roots: dict[str, Node] = {}
        self._nodes: list[Node | None] = []
        self._free_ids: list[int] = []
        self._clock = 0
        self._serial = 0
        self._stamps = SlotStamps(pool.capacity) if stamps else None

    # -- reading ------------------------------------------------------------------------------------------

    def root(self, namespace: str = "") -> Node | None:
        return self._roots.get(namespace)

    def roots(self) -> list[Node]:
        return list(self._roots.values())

    @property
    def namespaces(self) -> Reversible[str]:
        """Namespaces with a root, oldest first."""
        return self._roots.keys()

    def node(self, node_id: int) -> Node:
        node = self._nodes[node_id]
        assert node is not None, f"node {node_id} was removed"
        return node

    def find(self, node_id: int) -> Node | None:
        """Return the node with this id, or None."""
        return self._nodes[node_id] if 0 <= node_id < len(self._nodes) else None

    def node_ids(self) -> NDArray[np.int64]:
        """Return the ids of all nodes, ascending. Costs O(largest number of nodes so far)."""
        alive = np.ones(len(self._nodes), np.bool_)
        alive[self._free_ids] = False
        return np.flatnonzero(alive)

    def nodes(self) -> Iterator[Node]:
        return (node for node in self._nodes if node is not None)

    @property
    def num_nodes(self) -> int:
        return len(self._nodes) - len(self._free_ids)

    @property
    def reserved_tokens(self) -> int:
        """Slots reserved for tokens to come."""
        return int(self.columns.reserved[: len(self._nodes)].sum())

    def match_prefix(self, tokens: Sequence[int] | TokenArray, namespace: str = "") -> Match | None:
        """Return the longest known prefix of `tokens`, or None if the namespace has no root. Changes nothing."""
        root = self._roots.get(namespace)
        return None if root is None else longest_match(root, as_tokens(tokens))

    def follow(self, tokens: TokenArray, namespace: str = "") -> FollowedMatch:
        """As `match_prefix`, with a result that is kept up to date until `unfollow`."""
        followed, match = FollowedMatch(tokens, namespace, self.evictable), self.match_prefix(tokens, namespace)
        if match is None:
            self._unrooted[followed] = None
        else:
            followed.move(match.node, match.length)
        return followed

    def unfollow(self, followed: FollowedMatch) -> None:
        """Stop updating a match."""
        self._unrooted.pop(followed, None)
        followed.move(None, 0)

    def followed(self) -> Iterator[FollowedMatch]:
        """Iterate over the matches that are kept up to date."""
        return (match for holder in (self._unrooted, *(n.followers for n in self.nodes())) for match in holder)

    # -- growing ------------------------------------------------------------------------------------------

    def insert(
        self,
        tokens: Sequence[int] | TokenArray,
        namespace: str = "",
        *,
        priority: float = 0.0,
        followed: FollowedMatch | None = None,
    ) -> Lock:
        """Make `tokens` known and lock the node that ends with the last of them. Takes no slots.

        Splits the node in which `tokens` end or diverge. Nodes of higher `priority` are evicted later. `followed`: the
        followed match of `tokens`, if any.
        """
        tokens = as_tokens(tokens)
        match = followed.match() if followed else self.match_prefix(tokens, namespace)
        if match is None:
            match = Match(self._add_root(namespace), 0, 0, 0, 0)
        node = match.node
        if match.offset < node.known:
            node = self.split(node, match.offset)
        if match.length < tokens.size:
            node = self._add_leaf(node, tokens[match.length :].copy())
            node.priority = priority
        else:
            node.priority = max(node.priority, priority)
        return self.lock(node)

    def split(self, node: Node, offset: int) -> Node:
        """Split `node` after `offset` tokens and return the new upper node. No KV moves.

        The lower node keeps its identity, locks and reserve.
        """
        assert 0 < offset < node.known, (node, offset)
        parent = node.parent
        assert parent is not None
        if offset > node.scheduled:
            self._slots.cut(node, node.scheduled)
        upper = Node(parent, node.namespace, node._buffer[:0])
        upper._buffer, upper._offset, upper._owns_tail = node._buffer, node._offset, False
        upper.known = offset
        upper.priority, upper.last_used = node.priority, node.last_used
        upper.locked_children = int(node.locked)
        parent.children[upper.first_token] = upper
        node.parent = upper
        boundary.move_head(self, node, upper, offset)
        upper.children[node.first_token] = node
        follow_raise(node, upper)
        self._adopt(upper)
        upper.serial = node.serial
        self.columns.write(node)
        self._changed(node)
        return upper

    def advance(self, locks: Sequence[Lock], token: int) -> Node:
        """Move `locks`, all on the same node, forward by `token`. Returns the node they reach.

        If all locks of a leaf move together, the leaf grows in place. If a child begins with `token`, the locks move
        into it; an only child instead passes its tokens up one by one if nothing else is in the way, so that sequences
        that read cached tokens stay on one node, like sequences that compute theirs. Otherwise a new leaf branches off.
        """
        node = locks[0].held
        together = node.lock_count == len(locks)
        if together and not node.children and node.parent is not None:
            node._append(token)
            self.unscheduled_tokens += 1
            if node.followers:
                follow_append(node, token)
            return node
        child = node.children.get(token)
        if child is None:
            child = self._add_leaf(node, np.array([token], np.int32))
        elif together and len(node.children) == 1 and node.parent is not None and (child.known > 1 or child.idle):
            if not boundary.pass_up(self, node, child):
                boundary.shift_boundary(self, node, child)
            return node
        elif child.known > 1:
            child = self.split(child, 1)
        self._move(locks, child)
        return child

    # -- locks --------------------------------------------------------------------------------------------

    def lock(self, node: Node) -> Lock:
        """Keep the path to `node` in the tree until the returned lock is given to `unlock`. Ends its demotion."""
        end_demotion(node)
        node.lock_count += 1
        if node.lock_count + node.locked_children == 1:
            self._protect(node)
        return Lock(node)

    def unlock(self, lock: Lock, *, idle: bool = True) -> None:
        """Release a lock. The last on a node removes its uncomputed tokens and its reserve. `idle`: call `on_idle`."""
        node = lock.held
        lock.node = None
        assert node.lock_count > 0
        node.lock_count -= 1
        if not node.locked:
            self._unprotect(node)
            if idle and self.on_idle is not None:
                self.on_idle(node)

    # -- slots --------------------------------------------------------------------------------------------

    def slots_wanted(self, node: Node, count: int) -> int:
        """Return the number of free slots needed in the pool to schedule `count` more tokens of `node`."""
        return max(0, count - node.reserved)

    def schedule(self, node: Node, count: int, reserve: int = 0) -> NDArray[np.int64]:
        """Assign slots to the next `count` known tokens and return them. Reserves up to `reserve` slots after them.

        Raises `OutOfSlots`, with nothing changed, if the pool has too few.
        """
        assert 0 < count <= node.known - node.scheduled, (node, count)
        if self.slots_wanted(node, count):
            self._slots.take(node, count, reserve)
        first = node.scheduled
        node.scheduled += count
        self.unscheduled_tokens -= count
        self.columns.scheduled[node.id] = node.scheduled
        self.columns.reserved[node.id] -= count
        return node.slots(first, node.scheduled)

    def schedule_next(self, node: Node) -> int:
        """Schedule the only unscheduled token of a leaf from its reserve. Returns the slot, or -1, with nothing
        changed, if the reserve is empty.
        """
        slot = node.next_slot
        if slot < 0:
            return -1
        node.scheduled += 1
        self.unscheduled_tokens -= 1
        self.columns.scheduled[node.id] = node.scheduled
        self.columns.reserved[node.id] = node.capacity - node.scheduled
        return slot

    def give(self, node: Node, extents: list[Extent]) -> None:
        """Give the node slots that hold the KV of its next tokens."""
        self.unscheduled_tokens -= self._slots.give(node, extents)
        self._compute(node)
        self._changed(node)

    def reserve(self, leaves: Sequence[Node], counts: Sequence[int]) -> None:
        """As `NodeSlots.reserve`."""
        self._slots.reserve(leaves, counts)

    def commit(self, node: Node) -> None:
        """Mark the node's scheduled tokens as computed, after their step has retired.

        The same goes for its ancestors: a part split off the node while the step was in flight is one of them.
        """
        parts = [node]
        while (above := parts[-1].parent) is not None and above.computed < above.scheduled:
            parts.append(above)
        for part in reversed(parts):
            self._compute(part)

    def rollback(self, node: Node) -> None:
        """Return the slots of scheduled tokens of the node and its ancestors to the reserve: their step failed."""
        above: Node | None = node
        while above is not None and (above is node or above.computed < above.scheduled):
            if above.computed < above.scheduled:
                self.unscheduled_tokens += above.scheduled - above.computed
                above.scheduled = above.computed
                self.columns.write(above)
                self._changed(above)
            above = above.parent

    def reclaim_reserves(self, count: int) -> None:
        """Release up to `count` reserved slots to the pool, largest reserves first, each from its end."""
        reserved = self.columns.reserved[: len(self._nodes)]
        rows = np.flatnonzero(reserved)
        for row in rows[np.argsort(-reserved[rows], kind="stable")].tolist():
            if not count:
                break
            node = self._nodes[row]
            if node is None:
                continue
            part = min(count, node.reserved)
            self._slots.cut(node, node.capacity - part)
            count -= part

    # -- eviction -----------------------------------------------------------------------------------------

    def evict(self, count: int) -> int:
        """Evict up to `count` unlocked tokens, leaf by leaf in the policy's order, each from its end. Thinned parents
        go with their leaves. Returns the number of slots.
        """
        before, dropped = self.evictable_tokens, 0
        while dropped < count and (node := self.evictable.first()) is not None:
            kept = max(node.known - (count - dropped), 0)
            token = int(node._buffer[node._offset + kept])
            if kept:
                self.evictable_tokens -= node.known - kept
                self._cut_tokens(node, kept)
                node.epoch = self._next_serial()
                self.recent_evictions.add(node.epoch_end, token)
            else:
                assert node.parent is not None
                self.recent_evictions.add(node.parent.epoch_end, token)
                self._remove(node)
            dropped = before - self.evictable_tokens
        self.evicted_tokens += dropped
        return dropped

    def reset(self) -> int:
        """Evict everything that is not locked. Returns the number of tokens evicted."""
        return self.evict(self.evictable_tokens)

    def discard(self, namespace: str) -> None:
        """Evict everything in `namespace` that is not locked, for a namespace that will not be used again."""
        nodes = [self._roots[namespace]] if namespace in self._roots else []
        for node in nodes:
            nodes.extend(node.children.values())
        for node in reversed(nodes):
            if node.evictable:
                self._remove(node)

    # -- invariants ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the tree's invariants, recomputed from the nodes alone."""
        check_tree(self)
        if self._stamps is not None:
            for node in self.nodes():
                self._stamps.check(node)

    # -- inside -------------------------------------------------------------------------------------------

    def _adopt(self, node: Node) -> Node:
        if self._free_ids:
            node.id = self._free_ids.pop()
            self._nodes[node.id] = node
        else:
            node.id = len(self._nodes)
            self._nodes.append(node)
            self.columns.fit(len(self._nodes))
        node.serial = node.epoch = self._next_serial()
        self.columns.write(node)
        self._changed(node)
        return node

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _changed(self, node: Node) -> None:
        self.version += 1
        self.columns.changed[node.id] = self.version

    def _compute(self, node: Node) -> None:
        """Mark the node's scheduled tokens as computed."""
        if self._stamps is not None:
            self._stamps.record(node, node.computed, node.scheduled)
        node.computed = node.scheduled
        for listener in self.listeners:
            listener.changed(node)

    def _add_root(self, namespace: str) -> Node:
        self._roots[namespace] = root = self._adopt(Node(None, namespace, np.empty(0, np.int32)))
        for followed in [match for match in self._unrooted if match.namespace == namespace]:
            del self._unrooted[followed]
            followed.move(root, 0)
        return root

    def _add_leaf(self, parent: Node, tokens: TokenArray) -> Node:
        self._slots.cut(parent, parent.scheduled)
        end_demotion(parent)
        self.evictable.remove(parent)
        leaf = Node(parent, parent.namespace, tokens)
        leaf.priority = parent.priority
        parent.children[leaf.first_token] = leaf
        self.unscheduled_tokens += leaf.known
        follow_branch(parent, leaf)
        return self._adopt(leaf)

    def _remove(self, node: Node) -> None:
        """Remove an unlocked node without children or reserve, and its parent if that was thinned. Releases slots."""
        self.evictable_tokens -= node.num_keys
        for extent in node.extents:
            self.pool.release(extent)
        node.extents, node.capacity = [], 0
        node.known = node.scheduled = node.computed = 0
        for listener in self.listeners:
            listener.changed(node)
        parent = node.parent
        if parent is not None:
            del parent.children[node.first_token]
            follow_removal(node)
            if parent.evictable and parent.extent_positions is None:
                self.evictable.add(parent)
            elif not parent.children and not parent.locked:
                self._remove(parent)
        else:
            del self._roots[node.namespace]
            self._unrooted |= node.followers
            follow_removal(node)
        self._forget(node)

    def _forget(self, node: Node) -> None:
        """Free the node's id, once nothing refers to the node."""
        self._nodes[node.id] = None
        self._free_ids.append(node.id)
        self.evictable.remove(node)

    def _move(self, locks: Sequence[Lock], child: Node) -> None:
        """Move `locks` one node down. The parent stays locked through `child`."""
        parent = locks[0].held
        was_locked = child.locked
        end_demotion(child)
        child.lock_count += len(locks)
        if not was_locked:
            self._protect(child)
        for lock in locks:
            assert lock.node is parent, "the locks stand on different nodes"
            lock.node = child
        parent.lock_count -= len(locks)

    def _protect(self, node: Node) -> None:
        """Update the counters of `node` and its ancestors after it became locked."""
        while True:
            self.evictable.remove(node)
            self.evictable_tokens -= node.num_keys
            parent = node.parent
            if parent is None:
                return
            parent.locked_children += 1
            if parent.lock_count + parent.locked_children > 1:
                return
            node = parent

    def _unprotect(self, node: Node) -> None:
        """Remove uncomputed tokens of `node` after it lost its last lock, and update its ancestors."""
        self._clock += 1
        while True:
            parent = node.parent
            node.last_used = self._clock
            if node.computed < max(node.known, node.capacity):
                self._cut_tokens(node, node.computed)
            self.evictable_tokens += node.num_keys
            if node.known == 0 and not node.children:
                self._remove(node)
            elif node.evictable:
                self.evictable.add(node)
            if parent is None:
                return
            parent.locked_children -= 1
            if parent.locked:
                return
            node = parent

    def _cut_tokens(self, node: Node, known: int) -> None:
        self.unscheduled_tokens -= node.known - node.scheduled
        computed = node.computed
        if known < node.known:
            self.version += 1
            self.columns.cut[node.id] = self.version
        node.known = known
        node.scheduled = min(node.scheduled, known)
        node.computed = min(computed, known)
        follow_cut(node)
        for listener in self.listeners if node.computed < computed else ():
            listener.changed(node)
        self._slots.cut(node, node.scheduled)
        self.columns.scheduled[node.id] = node.scheduled
