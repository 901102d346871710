"""What the live page is told of the tree: rows of integers, whole at first and then as differences.

A `Reader` reads in the engine's thread, between two steps: a few arrays of the tree's columns, and nodes themselves
only where they are new, were split or are not computed to their end. What it read becomes rows outside that thread.
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
from radixgen.engine_core import EngineCore

_LARGEST_ARRAYS = 8
"""A tree that had room for so many times the nodes that are drawn is walked, not read as arrays."""


class Row(NamedTuple):
    """A node. `parent` is -1 for a root, whose `known` is 0. Of its siblings, one of lower `serial` stands above.

    `start` is the position of its first token; `known` and `computed` count its tokens. `cursors` and `pins` count
    those that stand on it; those below it are not among them. `hidden` counts its children that have no row.
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
    """What a node's text is, or with `append` goes on with. It may end before the node does."""

    id: int
    append: bool
    text: str


class Frame(msgspec.Struct, frozen=True):
    """The tree at one moment: all of it (`whole`), or what differs from the frame numbered one less."""

    seq: int
    time: float
    """Seconds on a clock that never goes back"""
    whole: bool
    rows: list[Row]
    """New or changed"""
    gone: list[int]
    texts: list[Text]
    namespaces: dict[int, str]
    """Of roots that are new, by id"""
    figures: dict[str, Any]
    """`Stats` by name, what sharing saved, and how many nodes there are in all"""

    def encode(self) -> bytes:
        """As JSON, without a line break."""
        return msgspec.json.encode(self)


class Captured(NamedTuple):
    """Tokens of a node as they were read."""

    id: int
    complete: bool
    """Whether these are all of its tokens"""
    tokens: TokenArray


@dataclass(frozen=True, slots=True)
class Table:
    """Rows `[nodes, fields of Row]`, by ascending `ids`."""

    ids: NDArray[np.int64]
    values: NDArray[np.int64]

    def rows(self) -> list[Row]:
        return list(map(Row._make, self.values.tolist()))

    def known(self, ids: Sequence[int]) -> list[int]:
        """Known tokens of some of its nodes."""
        found: list[int] = self.values[np.searchsorted(self.ids, ids), Row._fields.index("known")].tolist()
        return found

    def since(self, before: "Table") -> tuple[list[Row], list[int]]:
        """The rows that are new or differ, and the ids that are here no more."""
        at = before._find(self.ids)
        same = at >= 0
        same[same] = (self.values[same] == before.values[at[same]]).all(axis=1)
        gone: list[int] = before.ids[self._find(before.ids) < 0].tolist()
        return list(map(Row._make, self.values[~same].tolist())), gone

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of each id, -1 where it has none."""
        if not self.ids.size:
            return np.full(ids.size, -1)
        places = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        return np.where(self.ids[places] == ids, places, -1)


EMPTY = Table(np.zeros(0, np.int64), np.zeros((0, len(Row._fields)), np.int64))


@dataclass(slots=True)
class Reading:
    """What was read of the tree, not yet as rows. Columns are `[nodes]`, in the order of `ids`, which ascend."""

    ids: NDArray[np.int64]
    columns: dict[str, NDArray[np.int64]]
    """Of `Row`, by name; `hidden` only where not all nodes are drawn"""
    lacking: dict[int, int]
    """Known tokens, where that is more than are scheduled"""
    cursors: list[int]
    """For each running sequence, the node that it is drawn on"""
    pins: list[int]
    captured: list[Captured]
    stats: Stats
    num_nodes: int
    fresh: list[int] = field(default_factory=list)
    """Ids that were not drawn before, or whose tokens may be others now"""
    namespaces: dict[int, str] = field(default_factory=dict)
    """Of fresh roots"""

    def table(self) -> Table:
        """A row a node."""
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


class Reader:
    """Reads an engine's tree again and again, and knows what is fresh since the last time. At most
    `limits.max_shown_nodes` nodes are drawn: what is live first, then of each node the newest children.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.seconds = 0.0
        """Of the processor, for the last reading"""
        self._version = -1
        self._cuts = 0
        self._drawn = np.zeros(0, np.bool_)
        self._serials = np.zeros(0, np.int64)

    def read(self, core: EngineCore, wanted: Sequence[int] = (), max_tokens: int = 0) -> Reading:
        """In the engine's thread. Of the nodes `wanted` the first `max_tokens` tokens are captured."""
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
        changed = (columns.changed[ids] > self._version) | (columns.cut[ids] > self._cuts)
        fresh = ids[changed | ~self._drawn[ids]].tolist()
        nodes = [tree.node(one) for one in fresh]
        self._serials[fresh] = [node.serial for node in nodes]
        self._version, self._cuts = tree.version, tree.num_cuts
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
        reading = Reading(
            ids=ids,
            columns=read,
            lacking=_lacking(cursors, self._drawn),
            cursors=on,
            pins=pinned,
            captured=[_capture(tree.node(one), max_tokens) for one in wanted if self._drawn[one]],
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
    """What the page shows in numbers."""
    saved = {"rows_saved": stats.rows_saved, "kv_bytes_saved": stats.kv_bytes_saved}
    return {**asdict(stats), **saved, "num_nodes": num_nodes}


def _capture(node: Node, most: int) -> Captured:
    return Captured(node.id, node.known <= most, node.tokens[:most])


def _lacking(cursors: Sequence[Node], drawn: NDArray[np.bool_]) -> dict[int, int]:
    """The known tokens of nodes that have more than are scheduled; all such lie at or above a cursor."""
    found: dict[int, int] = {}
    for cursor in cursors:
        node: Node | None = cursor
        while node is not None and node.scheduled < node.known and node.id not in found:
            found[node.id] = node.known
            node = node.parent
    return {node_id: known for node_id, known in found.items() if drawn[node_id]}


def _choose(
    tree: RadixTree, cursors: Sequence[Node], pins: Sequence[Node], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int], list[int]]:
    """At most `most` nodes: their ids, how many of each one's children are not among them, and where each cursor and
    pin stands, which may be on an ancestor. A node is chosen only with its parent.
    """
    is_chosen = bytearray(tree.columns.parent.size)
    chosen: list[Node] = []

    def stand(node: Node) -> int:
        """Choose the path to `node`, as far as there is room; where it ends, or -1."""
        missing = []
        above: Node | None = node
        while above is not None and not is_chosen[above.id]:
            missing.append(above)
            above = above.parent
        place = above.id if above is not None else -1
        for one in missing[::-1][: most - len(chosen)]:
            is_chosen[one.id] = 1
            chosen.append(one)
            place = one.id
        return place

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
    return ids, hidden, [place for place in on if place >= 0], [place for place in pinned if place >= 0]
