"""A server of a tiny model, in this process: over its application alone, or over a socket."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import families
import httpx
import texts
from fastapi import FastAPI
from scripted import ScriptedStamps, tokenizer

from radixgen import AsyncEngine, Engine, Limits, RequestOutput
from radixgen.serve.http.app import ServeOptions, create_app
from radixgen.serve.http.binding import Binding
from radixgen.serve.server import HTTPServer, whole_app

CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
HI = [{"role": "user", "content": "hi"}]


def tiny(**options: Any) -> Engine:
    """A llama of random weights, and one token a byte."""
    return Engine(
        families.build("llama"), tokenizer=texts.tokenizer(), **({"kv_tokens": 2048, "debug": True} | options)
    )


def scripted(script: Callable[[str, str], dict[str, float]], template: str = CHAT, **options: Any) -> Engine:
    """A model that writes the lines of a script."""
    text = tokenizer()
    text.chat_template = template
    return Engine(ScriptedStamps(script), tokenizer=text, **({"kv_tokens": 2048, "debug": True} | options))


def slowed(engine: Engine, seconds: float) -> Engine:
    """Each of its steps takes so much longer."""
    step = engine.step

    def slowly() -> list[RequestOutput]:
        time.sleep(seconds)
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    return engine


def limited(**limits: int) -> Limits:
    return Limits(**limits)


@dataclass
class Served:
    url: str
    app: FastAPI
    engine: AsyncEngine
    server: HTTPServer | None = None

    def wait_idle(self) -> None:
        """Until nothing runs; then nothing is held for anybody."""
        stop = time.monotonic() + 30
        while self.engine.progress[1] or self.app.state.context.open_limit.open:
            assert time.monotonic() < stop, "requests never end"
            time.sleep(0.002)

    def check(self) -> None:
        """Nothing is left of any request."""
        self.wait_idle()
        asyncio.run(self.engine.check())
        stats = asyncio.run(self.engine.stats())
        assert not stats.num_running and not stats.num_waiting and not stats.kv_tokens_pinned
        assert not self.engine._queues


@contextmanager
def over_socket(engine: Engine, **options: Any) -> Iterator[Served]:
    """A server in a thread of its own; in the end nothing is left of its requests. Options of `Binding` may be among
    those of the application.
    """
    listens = {name: options.pop(name) for name in Binding.__dataclass_fields__ if name in options}
    binding = Binding(**({"port": 0, "drain_timeout": 10.0} | listens))
    served = AsyncEngine(engine)
    app = whole_app(served, ServeOptions(**({"names": ["tiny"]} | options)))
    server = HTTPServer(app, binding)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.002)
        address = server.servers[0].sockets[0].getsockname()
        scheme = "http" if binding.ssl_certfile is None else "https"
        url = f"{scheme}://127.0.0.1:{address[1]}" if binding.uds is None else f"{scheme}://localhost"
        found = Served(url, app, served, server)
        while not app.state.health.warm:
            time.sleep(0.002)
        yield found
        if not served.closed:
            found.check()
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def in_process(test: Callable[[httpx.AsyncClient, Served], Any], engine: Engine, **options: Any) -> Any:
    """Run `test` on the application itself; in the end nothing is left of its requests."""

    async def whole() -> Any:
        served = AsyncEngine(engine)
        app = create_app(served, ServeOptions(**({"names": ["tiny"]} | options)))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app):
            while not app.state.health.warm:
                await asyncio.sleep(0.001)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:
                result = await test(client, Served("", app, served))
            while served.progress[1] or app.state.context.open_limit.open:
                await asyncio.sleep(0.001)
            await served.check()
            assert not served._queues
        return result

    return asyncio.run(asyncio.wait_for(whole(), 120))
