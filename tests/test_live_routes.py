"""The live page's routes without a browser: viewers are counted, texts are bounded, refusals give a reason."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from oracle import StampModel

from radixgen import AsyncEngine, Engine, Limits, SamplingParams
from radixgen.serve.live import routes
from radixgen.serve.live.feed import Feed
from radixgen.serve.live.routes import tree_routes

VOCAB = 4


class Client:
    """One request to an ASGI app. It hangs up when told to, and may take nothing."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.reads = asyncio.Event()
        self.reads.set()
        self.gone = asyncio.Event()
        scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": path, "query_string": b"",
                 "headers": [], "scheme": "http", "http_version": "1.1"}  # fmt: skip
        self.done = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message["body"]


def run(test: Callable[[FastAPI, AsyncEngine, Feed], Awaitable[None]], limits: Limits | None = None) -> None:
    async def whole() -> None:
        async with AsyncEngine(Engine(StampModel(VOCAB, 4096), kv_tokens=8192)) as engine:
            feed, app = Feed(engine, limits, interval=0.01), FastAPI()
            app.include_router(tree_routes(engine, feed=feed))
            await test(app, engine, feed)
            await engine.check()

    asyncio.run(asyncio.wait_for(whole(), 20))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_who_hangs_up_gives_the_seat_back() -> None:
    async def test(app: FastAPI, engine: AsyncEngine, feed: Feed) -> None:
        first = Client(app, "/tree/events")
        await until(lambda: b"\n\n" in first.body)
        assert first.status == 200 and first.headers["content-type"].startswith("text/event-stream")
        assert json.loads(first.body.split(b"\n\n")[0].removeprefix(b"data: "))["whole"]
        refused = Client(app, "/tree/events")
        await refused.done
        assert refused.status == 429 and refused.headers["retry-after"]
        assert json.loads(refused.body)["error"]["param"] == "viewers"
        first.gone.set()
        await first.done
        assert feed.num_viewers == 0
        again = Client(app, "/tree/events")
        await until(lambda: b"\n\n" in again.body)
        feed.close()
        await again.done
        assert again.body.endswith(b"event: end\ndata: {}\n\n") and feed.num_viewers == 0

    run(test, Limits(max_viewers=1))


def test_who_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_SEND_SECONDS", 0.05)

    async def test(app: FastAPI, engine: AsyncEngine, feed: Feed) -> None:
        client = Client(app, "/tree/events")
        await until(lambda: b"\n\n" in client.body)
        client.reads.clear()
        await client.done
        assert feed.num_viewers == 0

    run(test)


def test_a_nodes_text_is_bounded() -> None:
    async def test(app: FastAPI, engine: AsyncEngine, feed: Feed) -> None:
        prompt = [index % VOCAB for index in range(3_000)]
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=1)):
            pass
        (leaf,) = [node.id for node in engine.inspect(lambda core: list(core.tree.nodes())).result(9) if node.known]
        client = Client(app, f"/tree/node/{leaf}")
        await client.done
        found = json.loads(client.body)
        assert (found["known"], found["start"], found["cut"]) == (3_000, 0, 3_000 - 1_280)
        assert found["text"] == " ".join(map(str, prompt[:1_024]))
        assert found["tail"] == " ".join(map(str, prompt[-256:]))
        for path, status in (("/tree/node/999999", 404), ("/tree/node/-1", 422), ("/tree/node/x", 422)):
            client = Client(app, path)
            await client.done
            assert client.status == status

    run(test)


def test_the_files_of_the_page_and_no_others() -> None:
    async def test(app: FastAPI, engine: AsyncEngine, feed: Feed) -> None:
        kinds = {"tree.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
        for name, kind in kinds.items():
            client = Client(app, f"/tree/static/{name}")
            await client.done
            assert client.status == 200 and client.headers["content-type"].startswith(kind) and client.body
        for name in ("nothing.js", "..", "%2e%2e"):
            client = Client(app, f"/tree/static/{name}")
            await client.done
            assert client.status == 404

    run(test)
