"""Frames of the live page: the tree as rows of integers, whole at first and then as differences.

A `TreeReader` reads in the engine's thread, between two steps: arrays of the tree's columns, and node objects only if
they are new, were split, or are not fully computed. Rows are made outside of that thread.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from radixgen.cache import Node, RadixTree, TokenArray
from radixgen.core import Limits, Stats
from radixgen.engine.core import EngineCore

_LARGEST_ARRAYS = 8
"""A tree with arrays larger than so many times the drawn nodes is walked instead of read as arrays."""


class Row(NamedTuple):
    """A node.

    parent: id of the parent; -1 for a root, which has no tokens.
    serial: siblings are drawn in this order.
    start: position of its first token.
    known, computed: numbers of tokens in these states.
    cursors, pins: numbers of cursors and pins on this node, not below it.
    hidden: number of children without a row.
    """

    id: int
    parent: int
    serial: int
    start: int
    known: int
    computed: int
    cursors: int
    pins: int
    hidden: int


class Text(NamedTuple):
    """Text of a node, or with `append` a continuation of it. It may be cut off before the end of the node."""

    id: int
    append: bool
    text: str


class Frame(msgspec.Struct, frozen=True):
    """The tree at one moment: all of it (`whole`), or the difference from the previous frame."""

    seq: int
    time: float
    """Monotonic time, in seconds"""
    whole: bool
    rows: list[Row]
    """New or changed"""
    gone: list[int]
    texts: list[Text]
    namespaces: dict[int, str]
    """Namespaces of new roots, by id"""
    figures: dict[str, Any]
    """Fields of `Stats`, savings by sharing, and the number of nodes"""

    def encode(self) -> bytes:
        """Encode as JSON, without line breaks."""
        return msgspec.json.encode(self)


class NodeTokens(NamedTuple):
    """First tokens of a node."""

    id: int
    complete: bool
    """Whether these are all tokens of the node"""
    tokens: TokenArray


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as an array, `[nodes, fields of Row]`, sorted by `ids`."""

    ids: NDArray[np.int64]
    values: NDArray[np.int64]

    def rows(self) -> list[Row]:
        """All rows."""
        return list(map(Row._make, self.values.tolist()))

    def known(self, ids: Sequence[int]) -> list[int]:
        """Return the number of known tokens of each of the nodes `ids`."""
        known: list[int] = self.values[np.searchsorted(self.ids, ids), Row._fields.index("known")].tolist()
        return known

    def since(self, before: "Table") -> tuple[list[Row], list[int]]:
        """Rows that are new or changed since `before`, and ids of nodes that are gone."""
        at = before._find(self.ids)
        same = at >= 0
        same[same] = (self.values[same] == before.values[at[same]]).all(axis=1)
        gone: list[int] = before.ids[self._find(before.ids) < 0].tolist()
        return list(map(Row._make, self.values[~same].tolist())), gone

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of each id, or -1."""
        if not self.ids.size:
            return np.full(ids.size, -1)
        indices = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        return np.where(self.ids[indices] == ids, indices, -1)


EMPTY = Table(np.zeros(0, np.int64), np.zeros((0, len(Row._fields)), np.int64))


@dataclass(slots=True)
class TreeReading:
    """Contents of the tree before conversion to rows. Columns are `[nodes]`, in the ascending order of `ids`."""

    ids: NDArray[np.int64]
    columns: dict[str, NDArray[np.int64]]
    """Columns of `Row`, by name; `hidden` only if not all nodes are drawn"""
    lacking: dict[int, int]
    """Numbers of known tokens of nodes that have unscheduled tokens, by id"""
    cursors: list[int]
    """Node on which each running sequence is drawn"""
    pins: list[int]
    """Node on which each pin is drawn"""
    captured: list[NodeTokens]
    stats: Stats
    num_nodes: int
    fresh: list[int] = field(default_factory=list)
    """Ids of nodes that were not drawn before, or whose tokens may have changed"""
    namespaces: dict[int, str] = field(default_factory=dict)
    """Namespaces of fresh roots, by id"""

    def table(self) -> Table:
        """Convert to one row per node."""
        table = np.zeros((self.ids.size, len(Row._fields)), np.int64)
        table[:, 0] = self.ids
        for name, column in self.columns.items():
            table[:, Row._fields.index(name)] = column
        known = Row._fields.index("known")
        if self.lacking:
            table[self._places(self.lacking), known] = list(self.lacking.values())
        for name, nodes in (("cursors", self.cursors), ("pins", self.pins)):
            if nodes:
                table[:, Row._fields.index(name)] = np.bincount(self._places(nodes), minlength=self.ids.size)
        return Table(self.ids, table)

    def _places(self, ids: Iterable[int]) -> NDArray[np.int64]:
        return np.searchsorted(self.ids, np.fromiter(ids, np.int64))


class TreeReader:
    """Reads an engine's tree repeatedly, and determines which nodes are fresh.

    At most `limits.max_shown_nodes` nodes are drawn: live nodes first, then the newest children of each node.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.seconds = 0.0
        """Processor time of the last reading"""
        self._version = -1
        self._drawn = np.zeros(0, np.bool_)
        self._serials = np.zeros(0, np.int64)

    def read(self, core: EngineCore, wanted: Sequence[int] = (), max_tokens: int = 0) -> TreeReading:
        """Read the tree; call it in the engine's thread.

        wanted: ids of nodes whose first `max_tokens` tokens are copied, too.
        """
        begin = time.thread_time()
        tree, columns = core.tree, core.tree.columns
        cursors, pins = held_nodes(core)
        hidden = None
        most = self._limits.max_shown_nodes
        if tree.num_nodes <= most and columns.parent.size <= _LARGEST_ARRAYS * most:
            ids, on, pinned = tree.node_ids(), [node.id for node in cursors], [node.id for node in pins]
        else:
            ids, hidden, on, pinned = _choose(tree, cursors, pins, most)
        self._fit(columns.parent.size)
        changed = np.maximum(columns.changed[ids], columns.cut[ids]) > self._version
        fresh = ids[changed | ~self._drawn[ids]].tolist()
        nodes = [tree.node(node_id) for node_id in fresh]
        self._serials[fresh] = [node.serial for node in nodes]
        self._version = tree.version
        self._drawn[:] = False
        self._drawn[ids] = True
        scheduled = columns.scheduled[ids].astype(np.int64)
        read: dict[str, NDArray[np.int64]] = {
            "parent": columns.parent[ids].astype(np.int64),
            "serial": self._serials[ids],
            "start": columns.start[ids].astype(np.int64),
            "known": scheduled,
            "computed": scheduled,
        }
        if hidden is not None:
            read["hidden"] = hidden
        reading = TreeReading(
            ids=ids,
            columns=read,
            lacking=_lacking(cursors, self._drawn),
            cursors=on,
            pins=pinned,
            captured=[_capture(tree.node(node_id), max_tokens) for node_id in wanted if self._drawn[node_id]],
            stats=core.stats(),
            num_nodes=tree.num_nodes,
            fresh=fresh,
            namespaces={node.id: node.namespace for node in nodes if node.parent is None},
        )
        self.seconds = time.thread_time() - begin
        return reading

    def _fit(self, size: int) -> None:
        more = size - self._drawn.size
        if more > 0:
            self._drawn = np.concatenate([self._drawn, np.zeros(more, np.bool_)])
            self._serials = np.concatenate([self._serials, np.zeros(more, np.int64)])


def held_nodes(core: EngineCore) -> tuple[list[Node], list[Node]]:
    """The node on which each running sequence stands, and that on which each pin does."""
    cursors = [s.cursor.node for s in core.scheduler.running if s.cursor and s.cursor.node]
    return cursors, [pin.lock.held for pin in core.scheduler.pins]


def figures(stats: Stats, num_nodes: int) -> dict[str, Any]:
    """Numbers that the page shows."""
    saved = {"rows_saved": stats.rows_saved, "kv_bytes_saved": stats.kv_bytes_saved}
    return {**asdict(stats), **saved, "num_nodes": num_nodes}


def _capture(node: Node, most: int) -> NodeTokens:
    return NodeTokens(node.id, node.known <= most, node.token_ids[:most])


def _lacking(cursors: Sequence[Node], drawn: NDArray[np.bool_]) -> dict[int, int]:
    """Numbers of known tokens of drawn nodes with unscheduled tokens; all of these are at or above a cursor."""
    lacking: dict[int, int] = {}
    for cursor in cursors:
        node: Node | None = cursor
        while node is not None and node.scheduled < node.known and node.id not in lacking:
            lacking[node.id] = node.known
            node = node.parent
    return {node_id: known for node_id, known in lacking.items() if drawn[node_id]}


def _choose(
    tree: RadixTree, cursors: Sequence[Node], pins: Sequence[Node], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int], list[int]]:
    """Choose at most `most` nodes, each with its parent.

    Returns their ids, the number of hidden children of each, and the chosen node of each cursor and of each pin, which
    may be an ancestor of the actual one.
    """
    is_chosen = bytearray(tree.columns.parent.size)
    chosen: list[Node] = []

    def stand(node: Node) -> int:
        """Choose the path to `node` as far as there is room. Returns the id of its last node, or -1."""
        missing = []
        above: Node | None = node
        while above is not None and not is_chosen[above.id]:
            missing.append(above)
            above = above.parent
        last = above.id if above is not None else -1
        for child in missing[::-1][: most - len(chosen)]:
            is_chosen[child.id] = 1
            chosen.append(child)
            last = child.id
        return last

    on, pinned = [stand(node) for node in cursors], [stand(node) for node in pins]
    for name in islice(reversed(tree.namespaces), most):
        root = tree.root(name)
        if root is not None:
            stand(root)
    for node in chosen:
        if len(chosen) == most:
            break
        for child in reversed(node.children.values()):
            if not is_chosen[child.id]:
                is_chosen[child.id] = 1
                chosen.append(child)
                if len(chosen) == most:
                    break
    ids = np.array([node.id for node in chosen], np.int64)
    order = np.argsort(ids)
    ids = ids[order]
    parents = tree.columns.parent[ids].astype(np.int64)
    drawn = np.bincount(np.searchsorted(ids, parents[parents >= 0]), minlength=ids.size)
    hidden = np.array([len(node.children) for node in chosen], np.int64)[order] - drawn
    return ids, hidden, [node_id for node_id in on if node_id >= 0], [node_id for node_id in pinned if node_id >= 0]
