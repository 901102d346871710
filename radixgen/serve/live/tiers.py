"""Where the KV of the drawn nodes is besides the pool, and nodes whose KV is in host memory alone.

Both trees are walked side by side, from their roots down, once per reading.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from radixgen.cache import DiskTier, HostTier, Node, RadixTree, TokenArray
from radixgen.cache.tokens import common_prefix_len

FIRST_HOST_ID = 1 << 32
"""Ids and serials of rows of the host's tree are those of its nodes plus this."""


class HostRow(NamedTuple):
    """The tokens from the `offset`-th on of a node of the host's tree, which the pool lacks."""

    node: Node
    offset: int
    parent: int
    """Id of the row above; -1 for a root"""

    @property
    def id(self) -> int:
        return FIRST_HOST_ID + self.node.id

    @property
    def serial(self) -> int:
        return FIRST_HOST_ID + self.node.serial

    @property
    def start(self) -> int:
        return self.node.start + self.offset

    @property
    def known(self) -> int:
        return self.node.computed - self.offset

    @property
    def computed(self) -> int:
        return 0

    @property
    def hidden(self) -> int:
        return 0

    @property
    def tokens(self) -> TokenArray:
        return self.node.tokens[self.offset : self.node.computed]

    @property
    def token_ids(self) -> TokenArray:
        return self.node.token_ids[self.offset : self.node.computed]

    @property
    def namespace(self) -> str:
        return self.node.namespace

    @property
    def state(self) -> tuple[int, int, int]:
        """Unchanged only if the row's tokens are."""
        return self.node.epoch, self.start, self.known


@dataclass(slots=True)
class Tiers:
    """What one reading found. Counts are by the id of a row, and not 0."""

    rows: list[HostRow]
    """What is in host memory alone, in the order of ids"""
    host: dict[int, int]
    """Tokens in host memory"""
    hidden: dict[int, int]
    """Children in host memory that have no row"""
    disk: dict[int, int] = field(default_factory=dict)
    """Tokens on disk"""
    fresh: list[int] = field(default_factory=list)
    """Ids of `rows` that were not there before, or had other tokens"""


_Place = tuple[Node, int]
"""The first tokens of a node of the host's tree, and how many"""


class _Held(NamedTuple):
    """A node of the pool, all of whose `known` tokens are in host memory, and the node there in which they end."""

    below: Node
    known: int

    def lasts(self, node: Node, host: RadixTree) -> bool:
        """Whether this still holds for `node`, whose tokens are the same unless their number is another."""
        below = self.below
        return self.known == node.known and host.find(below.id) is below and node.end <= below.start + below.computed

    def place(self, node: Node) -> _Place:
        """Where the path to `node` ends in the host's tree now; `below` may have been split."""
        below = self.below
        while below.start >= node.end and below.parent is not None:
            below = below.parent
        return below, node.end - below.start


@dataclass(eq=False, slots=True)
class _ChunkPath:
    """Names of the disk chunks that end in a row, and what the next name depends on."""

    above: "_ChunkPath | None"
    last: str
    rest: TokenArray
    names: list[str] = field(default_factory=list)
    size: int = 0
    """Number of the row's tokens so far"""

    def extend(self, disk: DiskTier, tokens: TokenArray, namespace: str) -> None:
        """Append the row's next tokens."""
        self.size += tokens.size
        content = np.concatenate([self.rest, tokens])
        names = list(disk.names(content, namespace, self.last))
        self.rest = content[len(names) * disk.chunk_tokens :]
        self.names += names
        self.last = names[-1] if names else self.last


class TierReader:
    """Reads the host's tree and the disk's index beside the tree of the pool. Call it in the engine's thread."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        """Nodes that are in host memory as a whole, by id: nearly all, and so not compared again in each reading"""
        self._states: dict[int, tuple[int, int, int]] = {}
        self._paths: dict[int, _ChunkPath] = {}

    def read(self, tree: RadixTree, host: HostTier, nodes: Sequence[Node], fresh: Iterable[int], room: int) -> Tiers:
        """`nodes`: the drawn nodes of the pool, ancestors before descendants. `fresh`: ids of those whose tokens may
        have changed, other than by more at their end. `room`: number of rows that may be added.
        """
        changed = set(fresh)
        self._held = {
            node.id: held
            for node in nodes
            if (held := self._held.get(node.id)) and node.id not in changed and held.lasts(node, host.tree)
        }
        tiers = _walk(tree, host.tree, nodes, self._held, room)
        before, self._states = self._states, {row.id: row.state for row in tiers.rows}
        tiers.fresh = [row_id for row_id, state in self._states.items() if before.get(row_id) != state]
        if host.disk is not None:
            tiers.disk = self._on_disk(host.disk, nodes, tiers.rows, changed.union(tiers.fresh))
        tiers.rows.sort(key=lambda row: row.id)
        return tiers

    def _on_disk(
        self, disk: DiskTier, nodes: Sequence[Node], rows: Sequence[HostRow], fresh: set[int]
    ) -> dict[int, int]:
        """Number of each row's tokens in chunks on disk, if all chunks before them are there, too."""
        paths: dict[int, _ChunkPath] = {}
        stops: dict[int, int] = {-1: 0}  # position up to which the path of a row is on disk
        spans: list[tuple[int, int, int, int]] = []
        drawn: list[Node | HostRow] = [*nodes, *rows]
        for row in drawn:
            parent = _parent_id(row)
            above, path = paths.get(parent), self._paths.get(row.id)
            if path is None or path.above is not above or row.id in fresh:
                path = _ChunkPath(above, above.last if above else "", above.rest if above else np.empty(0, np.int32))
            if path.size < row.known:
                path.extend(disk, row.tokens[path.size :], row.namespace)
            paths[row.id] = path
            stop = stops[parent]
            if stop == row.start - (above.rest.size if above else 0):
                stop += disk.chunk_tokens * sum(1 for _ in takewhile(disk.holds, path.names))
            stops[row.id] = stop
            spans.append((row.id, parent, row.start, row.known))
        self._paths = paths
        counts = {}
        for row_id, parent, start, known in reversed(spans):
            stops[parent] = max(stops[parent], stops[row_id])  # a chunk may begin in one row and end in the next
            counts[row_id] = min(max(stops[row_id] - start, 0), known)
        return counts


def host_row(tree: RadixTree, host: RadixTree, row_id: int) -> HostRow | None:
    """The row with this id, without its parent; None if there is none now."""
    node = host.find(row_id - FIRST_HOST_ID)
    if node is None:
        return None
    match = tree.match_prefix(node.path_tokens(), node.namespace)
    row = HostRow(node, max(match.length - node.start, 0) if match else 0, -1)
    return row if row.known > 0 or node.parent is None else None


def _walk(tree: RadixTree, host: RadixTree, nodes: Sequence[Node], held: dict[int, _Held], room: int) -> Tiers:
    """Find what host memory has of the nodes, and draw what follows them there: that of nodes before that of others.

    held: nodes that are there as a whole; more of them are added.
    """
    tiers = Tiers([], {}, {})
    places: dict[int, _Place] = {}  # where the path to a node ends in the host

    def add(node: Node, offset: int, parent: int) -> None:
        if node.parent is not None and node.computed <= offset:
            return  # its KV is still on its way
        if len(tiers.rows) < room:
            row = HostRow(node, offset, parent)
            tiers.rows.append(row)
            tiers.host[row.id] = row.known
        elif parent >= 0:
            tiers.hidden[parent] = tiers.hidden.get(parent, 0) + 1

    for node in nodes:
        if node.parent is None:
            root = host.root(node.namespace)
            place = (root, 0) if root else None
        elif node.id in held:
            place, tiers.host[node.id] = held[node.id].place(node), node.known
        else:
            place = places.get(node.parent.id)
            if place is not None:
                place, tiers.host[node.id] = _descend(place, node.tokens)
            if place is not None and tiers.host[node.id] == node.known:
                held[node.id] = _Held(place[0], node.known)
        if place is not None:
            places[node.id] = place
            for below, offset in _continuations(place, node):
                add(below, offset, node.id)
    for root in host.roots():
        if tree.root(root.namespace) is None:
            add(root, 0, -1)
    for row in tiers.rows:  # grows meanwhile
        for child in row.node.children.values():
            add(child, 0, row.id)
    return tiers


def _parent_id(row: Node | HostRow) -> int:
    if isinstance(row, HostRow):
        return row.parent
    return row.parent.id if row.parent is not None else -1


def _continuations(place: _Place, node: Node) -> list[_Place]:
    """What follows a place of the host's tree and no child of `node`, whose path ends there."""
    below, offset = place
    if offset < below.known:
        return [] if int(below.tokens[offset]) in node.children else [place]
    return [(child, 0) for token, child in below.children.items() if token not in node.children]


def _descend(place: _Place, tokens: TokenArray) -> tuple[_Place | None, int]:
    """Follow `tokens` from a place of the host's tree. Returns where they end, None if they are not all known there,
    and how many have KV there.
    """
    known = computed = 0
    node, offset = place
    while known < tokens.size:
        if offset == node.known:
            child = node.children.get(int(tokens[known]))
            if child is None:
                return None, computed
            node, offset = child, 0
        common = common_prefix_len(node.tokens[offset:], tokens[known:])
        if not common:
            return None, computed
        computed += min(max(node.computed - offset, 0), common)
        known, offset = known + common, offset + common
    return (node, offset), computed
