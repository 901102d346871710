"""Where the live page says that KV is: in the pool, in host memory, on disk."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import StampModel

from radixgen import Engine, Limits, SamplingParams
from radixgen.cache import Node
from radixgen.engine.core import EngineCore
from radixgen.serve.live.frames import TreeReader
from radixgen.serve.live.routes import _node_details
from radixgen.serve.live.tiers import FIRST_HOST_ID

VOCAB = 3
PROMPT = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
STEP = st.one_of(
    st.tuples(st.just("submit"), PROMPT),
    st.tuples(st.just("submit"), PROMPT),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("finish"), st.just(0)),
    st.tuples(st.just("evict"), st.integers(1, 40)),
    st.tuples(st.just("forget"), st.integers(1, 40)),
    st.tuples(st.just("read"), st.just(0)),
)


def engine_of(limits: Limits | None = None, **options: Any) -> Engine:
    options = {"kv_tokens": 120, "host_kv_tokens": 300, "debug": True, "limits": limits} | options
    engine = Engine(StampModel(VOCAB, 64), **options)
    assert engine._core.host is not None
    engine._core.host.fetches.min_fetch = 1
    return engine


def act(engine: Engine, step: tuple[str, Any]) -> None:
    host = engine._core.host
    assert host is not None
    match step:
        case ("submit", prompt):
            engine.submit(prompt, SamplingParams(max_tokens=6), namespace="ab"[len(prompt) % 2])
        case ("step", count):
            for _ in range(count):
                engine.step()
        case ("finish", _):
            while engine.has_unfinished:
                engine.step()
            host.saves.complete()
            host.saves.complete_writes()
        case ("evict", count):
            engine._core.tree.evict(count)
        case ("forget", count):
            host.tree.evict(count)
    engine.check()


def in_host(core: EngineCore, node: Node) -> int:
    """How many of a node's tokens host memory has."""
    assert core.host is not None
    match = core.host.tree.match_prefix(node.path_tokens(), node.namespace)
    return min(max(match.computed - node.start, 0), node.known) if match else 0


def only_in_host(core: EngineCore) -> dict[int, tuple[int, int, int, list[int]]]:
    """Parent, start, size and tokens of what has a row of the host, by id; found node by node from its whole path."""
    assert core.host is not None
    found: dict[int, tuple[int, int, int, list[int]]] = {}
    for node in sorted(core.host.tree.nodes(), key=lambda node: (node.start, node.parent is not None)):
        match = core.tree.match_prefix(node.path_tokens(), node.namespace)
        start = max(node.start, match.length) if match else node.start
        size = node.start + node.computed - start
        parent = FIRST_HOST_ID + node.parent.id if node.parent else -1
        if match and match.length >= node.start:
            if match.offset < match.node.known:
                continue  # branches off within a node
            parent = match.node.id
        elif node.parent is not None and parent not in found:
            continue
        if size > 0 or (node.parent is None and match is None):
            found[FIRST_HOST_ID + node.id] = parent, start, size, node.tokens[start - node.start :][:size].tolist()
    return found


@settings(max_examples=80, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=40))
def test_a_reading_tells_what_host_memory_has(steps: list[tuple[str, Any]]) -> None:
    with engine_of() as engine:
        core, reader = engine._core, TreeReader(engine.limits)
        held: dict[int, list[int]] = {}
        for step in [*steps, ("read", 0)]:
            act(engine, step)
            if step[0] != "read":
                continue
            reading = reader.read(core)
            rows = {row.id: row for row in reading.table().rows()}
            assert reading.num_nodes == len(rows)
            for node in core.tree.nodes():
                row = rows.pop(node.id)
                assert row.host == in_host(core, node) and (row.hidden, row.disk) == (0, 0)
            found = only_in_host(core)
            assert {i: (r.parent, r.start, r.known) for i, r in rows.items()} == {i: f[:3] for i, f in found.items()}
            assert all(row.host == row.known and not row.computed for row in rows.values())
            captured = {c.id: c.tokens.tolist() for c in reader.read(core, list(found), 99).captured}
            assert captured == {row_id: one[3] for row_id, one in found.items()}
            held = {i: one[3] if i in reading.fresh else held[i] for i, one in found.items()}
            assert held == {row_id: one[3] for row_id, one in found.items()}, "a change of tokens was missed"
            for row_id, (_, start, size, tokens) in found.items():
                details = _node_details(core, row_id)
                assert details is not None
                assert (details["start"], details["known"], details["head"]) == (start, size, tokens)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, min_size=5, max_size=30), st.integers(1, 12))
def test_no_more_rows_than_may_be_are_drawn(steps: list[tuple[str, Any]], most: int) -> None:
    with engine_of(Limits(max_shown_nodes=most)) as engine:
        reader = TreeReader(engine.limits)
        for step in steps:
            act(engine, step)
            rows = {row.id: row for row in reader.read(engine._core).table().rows()}
            assert len(rows) <= most
            assert all(row.parent in rows or row.parent == -1 for row in rows.values())


def on_disk(engine: Engine, tokens: list[int], namespace: str) -> int:
    """How many tokens of a path are in chunks on disk that follow one another from its beginning."""
    disk = engine._core.host.disk if engine._core.host else None
    assert disk is not None
    return disk.chunk_tokens * len(disk.find(np.array(tokens, np.int32), namespace, 0))


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=25), st.booleans())
def test_a_reading_tells_what_the_disk_has(tmp_path_factory: Any, steps: list[tuple[str, Any]], one: bool) -> None:
    folder: Path = tmp_path_factory.mktemp("kv") / "kv"
    with patch("radixgen.model.kv_dir.CHUNK_TOKENS", 4), engine_of(kv_dir=folder) as engine:
        core, reader = engine._core, TreeReader(engine.limits)
        for step in [*steps, ("finish", 0), ("read", 0)]:
            act(engine, step)
            reader = reader if one else TreeReader(engine.limits)
            rows = {row.id: row for row in reader.read(core).table().rows()}
            below: dict[int, int] = {}
            for row in sorted(rows.values(), key=lambda row: (row.start, row.parent >= 0), reverse=True):
                tree = core.tree if row.id < FIRST_HOST_ID or core.host is None else core.host.tree
                node = tree.node(row.id % FIRST_HOST_ID)
                path = node.path_tokens()[: row.start + row.known].tolist()
                stop = max(on_disk(engine, path, node.namespace), below.get(row.id, 0))
                below[row.parent] = max(below.get(row.parent, 0), stop)
                assert row.disk == min(max(stop - row.start, 0), row.known), row
