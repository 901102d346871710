"""What the live page is told: frames and differences rebuild the tree, are bounded, and cost nothing unwatched."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import StampModel

from radixgen import AsyncEngine, Engine, LimitReached, Limits, SamplingParams
from radixgen.cache import Node
from radixgen.engine.core import EngineCore
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.frames import NodeTokens, Row, TreeReader, held_nodes
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
    """The tree as rows, read off the nodes one by one: the twin of what `TreeReader` takes out of the columns."""
    cursors, pins = held_nodes(engine._core)
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
            hidden=0,
            host=0,
            disk=0,
        )
        for node in engine._core.tree.nodes()
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
        reader = TreeReader(engine.limits)
        held: dict[int, list[int]] = {}
        for step in [*steps, ("read",)]:
            act(engine, step)
            if step != ("read",):
                continue
            engine.check()
            reading = reader.read(engine._core)
            rows = {row.id: row for row in reading.table().rows()}
            assert rows == plain_rows(engine)
            held = {node_id: held.get(node_id, []) for node_id in rows}
            for node_id, row in rows.items():
                tokens = engine._core.tree.node(node_id).tokens.tolist()
                if node_id in reading.fresh:
                    held[node_id] = tokens
                else:
                    held[node_id] += tokens[len(held[node_id]) :]
                assert held[node_id] == tokens and len(tokens) == row.known
            roots = {root.id: root.namespace for root in engine._core.tree.roots()}
            assert reading.namespaces == {k: v for k, v in roots.items() if k in reading.fresh}


class Direct:
    """Stands in for `AsyncEngine`: whoever inspects does it at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.inputs = engine.inputs

    def inspect(self, function: Callable[[EngineCore], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(self.engine.inspect(function))
        return future


class Viewer:
    """What a page makes of its frames."""

    def __init__(self) -> None:
        self.seq = 0
        self.rows: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.namespaces: dict[str, str] = {}
        self.figures: dict[str, Any] = {}
        self.wholes = 0

    def take(self, message: bytes) -> None:
        frame = json.loads(message)
        self.wholes += frame["whole"]
        if frame["whole"]:
            self.rows, self.texts, self.namespaces = {}, {}, {}
        else:
            assert frame["seq"] == self.seq + 1
        self.seq, self.figures = frame["seq"], frame["figures"]
        for node_id in frame["gone"]:
            del self.rows[node_id]
            self.texts.pop(node_id, None)
            self.namespaces.pop(str(node_id), None)
        self.rows |= {row[0]: row for row in frame["rows"]}
        for row in frame["rows"]:
            if row[1] >= 0:
                self.namespaces.pop(str(row[0]), None)
        self.namespaces |= frame["namespaces"]
        for node_id, append, text in frame["texts"]:
            self.texts[node_id] = self.texts[node_id] + text if append else text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEP, st.integers(0, 3)), min_size=1, max_size=60))
def test_frames_and_differences_rebuild_the_tree_however_late_they_are_taken(steps: list[Any]) -> None:
    """Viewers 1 and 2 look when they are named, viewer 0 always; with 3 the texts are brought up to date."""

    async def whole(engine: Engine) -> None:
        feed = Feed(Direct(engine), engine.limits, clock=iter(range(10**6)).__next__)
        viewers = [Viewer() for _ in range(3)]

        def look(viewer: Viewer) -> None:
            for seq, message in feed._since(viewer.seq):
                viewer.take(message)
                assert viewer.seq == seq
            assert viewer.seq == feed._seq
            assert {node_id: Row(*row) for node_id, row in viewer.rows.items()} == plain_rows(engine)
            assert viewer.figures["num_running"] == sum(row[6] for row in viewer.rows.values())
            roots = {str(root.id): root.namespace for root in engine._core.tree.roots()}
            assert viewer.namespaces == roots

        for step, which in steps:
            act(engine, step)
            await feed._tick(engine.decode)
            look(viewers[0])
            if which in (1, 2):
                look(viewers[which])
            while which == 3 and feed._texts._due:
                await feed._tick(engine.decode)
        while feed._texts._due:
            await feed._tick(engine.decode)
        for viewer in (*viewers, Viewer()):
            look(viewer)
            texts = {node.id: engine.decode(node.tokens.tolist()) for node in engine._core.tree.nodes() if node.known}
            assert {node_id: text for node_id, text in viewer.texts.items() if text} == texts
        assert viewers[0].wholes == 1

    with engine_of(limits=Limits(max_pins=1_000)) as engine:
        asyncio.run(whole(engine))


def test_who_is_too_late_gets_everything_anew() -> None:
    async def whole(engine: Engine) -> None:
        feed, viewer = Feed(Direct(engine), engine.limits), Viewer()
        engine.submit([1, 2, 3], SamplingParams(max_tokens=50))
        for count, wholes in ((3, 1), (16, 1), (17, 2), (1, 2)):
            for _ in range(count):
                engine.step()
                await feed._tick(engine.decode)
            for _, message in feed._since(viewer.seq):
                viewer.take(message)
            assert viewer.wholes == wholes and viewer.seq == feed._seq

    with engine_of() as engine:
        asyncio.run(whole(engine))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, min_size=5, max_size=40), st.integers(1, 12))
def test_no_more_nodes_are_drawn_than_may_be(steps: list[tuple[Any, ...]], most: int) -> None:
    with engine_of(limits=Limits(max_pins=1_000, max_shown_nodes=most)) as engine:
        reader = TreeReader(engine.limits)
        for step in steps:
            act(engine, step)
            reading = reader.read(engine._core)
            rows = {row.id: row for row in reading.table().rows()}
            assert len(rows) == min(most, engine._core.tree.num_nodes)
            children: dict[int, int] = {}
            for row in rows.values():
                assert row.parent == -1 or row.parent in rows
                children[row.parent] = children.get(row.parent, 0) + 1
            for row in rows.values():
                node = engine._core.tree.node(row.id)
                assert row.hidden == len(node.children) - children.get(row.id, 0)
                assert (row.serial, row.start, row.known) == (node.serial, node.start, node.known)
            running = engine.stats().num_running
            roots = {path_root(node) for node in held_nodes(engine._core)[0]}
            drawn = sum(row.cursors for row in rows.values())
            assert drawn == running or (drawn < running and len(roots) > 1), "a cursor is lost only with its root"


def path_root(node: Node) -> Node:
    return node.path()[0]


def test_a_tree_that_was_huge_is_not_read_as_it_was() -> None:
    """Pins that a reading costs what is drawn, not what the tree's columns once held."""
    with Engine(StampModel(VOCAB, 64), kv_tokens=4_000, limits=Limits(max_shown_nodes=20)) as engine:
        tree, rng = engine._core.tree, np.random.default_rng(0)
        locks = [tree.insert(rng.integers(0, VOCAB, 12)) for _ in range(300)]
        for lock in locks:
            tree.unlock(lock)
        assert tree.num_nodes == 0
        engine.submit([1, 2, 3], SamplingParams(max_tokens=4))
        engine.step()
        tree.node_ids = None  # type: ignore[method-assign]
        assert [row._replace(hidden=0) for row in TreeReader(engine.limits).read(engine._core).table().rows()] == list(
            plain_rows(engine).values()
        )


TEXTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60), st.booleans()), max_size=60)


@given(TEXTS)
def test_the_text_of_all_nodes_is_bounded(changes: list[tuple[int, int, bool]]) -> None:
    limits = Limits(max_shown_nodes=10, max_shown_chars=100)
    texts, seen = Texts(limits), {}
    for node_id, length, gone in changes:
        texts.update([] if gone else [(node_id, length)], [], [node_id] if gone else [])
        if gone:
            seen.pop(node_id, None)
            continue
        captured = NodeTokens(node_id, True, np.arange(length, dtype=np.int32))
        whole = "x" * length
        for news in texts.learn([(captured, whole)]):
            seen[node_id] = seen[node_id] + news.text if news.append else news.text
        assert len(seen.get(node_id, "")) >= min(length, 5), "everyone has a share"
        assert sum(map(len, seen.values())) <= limits.max_shown_chars
        assert {one.id: one.text for one in texts.whole()} == seen


def test_a_tokenizer_that_fails_costs_its_text_alone() -> None:
    def decode(tokens: Any) -> str:
        raise ValueError("planted")

    assert text_of(NodeTokens(1, True, np.array([1], np.int32)), decode) == ""
    assert text_of(NodeTokens(1, True, np.array([1], np.int32)), lambda _: "a\ud800b") == "a?b"


def run(test: Callable[[AsyncEngine, Feed], Awaitable[None]], limits: Limits | None = None) -> None:
    async def whole() -> None:
        async with AsyncEngine(engine_of(limits=limits)) as engine:
            await test(engine, Feed(engine, limits, interval=0.01))
            await engine.check()

    asyncio.run(asyncio.wait_for(whole(), 20))


async def seen_by(frames: AsyncGenerator[bytes, None], count: int) -> Viewer:
    viewer = Viewer()
    for _ in range(count):
        viewer.take(await anext(frames))
    return viewer


def test_nothing_is_read_while_nobody_watches() -> None:
    async def test(engine: AsyncEngine, feed: Feed) -> None:
        async def asked() -> None:
            async for _ in engine.generate([1, 2], SamplingParams(max_tokens=30)):
                pass

        await asked()
        await asyncio.sleep(0.05)
        assert feed.num_readings == 0
        with feed.viewer() as frames:
            await seen_by(frames, 1)
            await asked()
            await seen_by(frames, 0)
        done = feed.num_readings
        assert done > 0 and feed.num_viewers == 0 and not feed._table.ids.size
        await asked()
        await asyncio.sleep(0.05)
        assert feed.num_readings == done
        with feed.viewer() as frames:
            assert (await seen_by(frames, 1)).wholes == 1

    run(test)


def test_one_reading_serves_all_and_who_does_not_read_holds_nobody_up() -> None:
    async def test(engine: AsyncEngine, feed: Feed) -> None:
        with feed.viewer() as frames, feed.viewer() as others, feed.viewer():
            async for _ in engine.generate([1, 2], SamplingParams(max_tokens=60)):
                await asyncio.sleep(0.005)
            viewers = await asyncio.gather(seen_by(frames, 1), seen_by(others, 1))
            assert feed.num_viewers == 3 and len(feed._differences) <= 16
            assert viewers[0].rows == viewers[1].rows and viewers[0].seq <= feed.num_readings

    run(test)


def test_no_more_watch_than_may() -> None:
    async def test(engine: AsyncEngine, feed: Feed) -> None:
        with feed.viewer():
            with feed.viewer(), pytest.raises(LimitReached, match="viewers=3"), feed.viewer():
                pass
            with feed.viewer() as frames:
                await seen_by(frames, 1)

    run(test, Limits(max_viewers=2))


def test_a_stream_ends_with_the_feed_or_the_engine() -> None:
    async def closed(engine: AsyncEngine, feed: Feed) -> None:
        with feed.viewer() as frames:
            await seen_by(frames, 1)
            feed.close()
            assert [one async for one in frames] == []

    async def ended(engine: AsyncEngine, feed: Feed) -> None:
        with feed.viewer() as frames:
            await seen_by(frames, 1)
            await engine.close()
            async for _ in frames:
                pass

    run(closed)

    async def whole() -> None:
        engine = AsyncEngine(engine_of())
        await ended(engine, Feed(engine, interval=0.01))

    asyncio.run(asyncio.wait_for(whole(), 20))
