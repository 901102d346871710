"""What the live page is told: frames and differences rebuild the tree, are bounded, and cost nothing unwatched."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import StampModel

from radixgen import AsyncEngine, Engine, LimitReached, Limits, SamplingParams
from radixgen.cache import Node, RadixTree
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.frames import Captured, Reader, Row
from radixgen.serve.live.texts import Texts, text_of

VOCAB = 4
STEP = st.one_of(
    st.tuples(st.just("submit"), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), st.integers(1, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("pin"), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)),
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.just("read")),
    st.tuples(st.just("reset")),
)


def engine_of(limits: Limits | None = None, **options: Any) -> Engine:
    return Engine(StampModel(VOCAB, 64), **({"kv_tokens": 200, "debug": True, "limits": limits} | options))


def plain_rows(engine: Engine) -> dict[int, Row]:
    """The tree as rows, read off the nodes one by one: the twin of what `Reader` takes out of the columns."""
    cursors, pins = engine.held_nodes()
    return {
        node.id: Row(
            node.id,
            node.parent.id if node.parent else -1,
            node.serial,
            node.start,
            node.known,
            node.computed,
            sum(one is node for one in cursors),
            sum(one is node for one in pins),
            0,
        )
        for node in engine.tree.nodes()
    }


def act(engine: Engine, step: tuple[Any, ...]) -> None:
    live = [name for name, request in engine._core.requests.items() if not request.finished]
    match step:
        case ("submit", prompt, n):
            engine.submit(prompt, SamplingParams(max_tokens=8, n=n), namespace="ab"[len(prompt) % 2])
        case ("cancel", which) if live:
            engine.cancel(live[which % len(live)])
        case ("pin", prompt):
            engine.pin(prompt, namespace="ab"[len(prompt) % 2])
        case ("step", count):
            for _ in range(count):
                engine.step()
        case ("reset",):
            engine.reset_prefix_cache()


@settings(max_examples=80, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=30))
def test_a_reading_is_the_tree_and_freshness_misses_no_change_of_tokens(steps: list[tuple[Any, ...]]) -> None:
    """What a viewer holds who takes over fresh nodes' tokens, and the new ones of grown nodes, is always the tree."""
    with engine_of(limits=Limits(max_pins=1_000)) as engine:
        reader = Reader(engine.limits)
        held: dict[int, list[int]] = {}
        for step in [*steps, ("read",)]:
            act(engine, step)
            if step != ("read",):
                continue
            engine.check()
            reading = reader.read(engine)
            rows = {row.id: row for row in reading.rows()}
            assert rows == plain_rows(engine)
            held = {node_id: held.get(node_id, []) for node_id in rows}
            for node_id, row in rows.items():
                tokens = engine.tree.node(node_id).tokens.tolist()
                if node_id in reading.fresh:
                    held[node_id] = tokens
                else:
                    held[node_id] += tokens[len(held[node_id]) :]
                assert held[node_id] == tokens and len(tokens) == row.known
            roots = {root.id: root.namespace for root in engine.tree.roots()}
            assert reading.namespaces == {k: v for k, v in roots.items() if k in reading.fresh}
