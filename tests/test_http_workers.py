"""The same application over workers behind their wire: what it answers is what it answers over an engine."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import families
import httpx
import pytest
from served import in_process, tiny
from texts import tokenizer
from transformers import PreTrainedTokenizerFast

from radixgen import AsyncClient, Engine, Stats
from radixgen.serve.http.app import ServeOptions, create_app
from radixgen.serve.http.totals import Totals
from radixgen.serve.http.worker_backend import WorkerBackend
from radixgen.serve.zmq.worker import Worker

GREEDY = {"model": "tiny", "prompt": "Some words that", "max_tokens": 24, "temperature": 0.0}
Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


@contextmanager
def working(client: AsyncClient, engine: Engine, index: int = 0) -> Iterator[Worker]:
    worker = Worker(engine, [client.address], engine_index=index, drain_timeout=0.1)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.drain()
        thread.join(60)
        assert not thread.is_alive()


def over_workers(
    ask: Ask,
    *,
    before: Callable[[Worker], None] = lambda _: None,
    text: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> Any:
    """What `ask` returns of an application over one worker; in the end nothing is left of its requests."""

    async def whole() -> Any:
        async with AsyncClient(timeout=60) as client:
            with working(client, tiny()) as worker:
                before(worker)
                await client.wait()
                backend = WorkerBackend(client, text or tokenizer(), model_name="tiny")
                app = create_app(backend, ServeOptions(names=["tiny"], **options))
                async with app.router.lifespan_context(app):
                    while not app.state.health.warm:
                        await asyncio.sleep(0.001)
                    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as http:
                        result = await ask(http)
                    while backend.progress[1] or worker._thread.service.num_live:
                        await asyncio.sleep(0.001)
                    assert not app.state.context.open_limit.open
                    if not backend.closed:
                        await client.call("check")
        return result

    return asyncio.run(asyncio.wait_for(whole(), 120))


def same(ask: Ask) -> Any:
    """What both answer, which must be the same."""

    async def by_engine(client: httpx.AsyncClient, _: Any) -> Any:
        return await ask(client)

    answer = over_workers(ask)
    assert answer == in_process(by_engine, tiny())
    return answer


def post(path: str, **body: Any) -> Ask:
    async def ask(client: httpx.AsyncClient) -> Any:
        reply = await client.post(path, json=body)
        told = reply.json()
        for key in ("id", "created"):
            told.pop(key, None)
        return reply.status_code, told

    return ask


def stream(**body: Any) -> Ask:
    async def ask(client: httpx.AsyncClient) -> str:
        reply = await client.post("/v1/completions", json=body | {"stream": True})
        chunks = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        return "".join(httpx.Response(200, text=chunk).json()["choices"][0]["text"] for chunk in chunks)

    return ask


@pytest.mark.parametrize("body", [{}, {"ignore_eos": True}, {"stop_token_ids": [26]}], ids=str)
def test_answers_end_where_the_front_end_s_template_ends_them(body: dict[str, Any]) -> None:
    """Chats, that is. Workers know only their own tokenizer's; `serve --chat-template` gives another."""
    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": [";"]})
    text.chat_template = "{% for m in messages %}{{ m.content }}{{ ';' if m.role == 'assistant' }}{% endfor %}"
    chat = GREEDY | {"messages": [{"role": "user", "content": GREEDY["prompt"]}]} | body
    del chat["prompt"]
    ask = post("/v1/chat/completions", **chat)

    async def by_engine(client: httpx.AsyncClient, _: Any) -> Any:
        return await ask(client)

    status, told = over_workers(ask, text=text)
    (choice,) = told["choices"]
    assert status == 200 and choice["finish_reason"] == ("length" if body.get("ignore_eos") else "stop")
    assert (status, told) == in_process(by_engine, Engine(families.build("llama"), tokenizer=text, kv_tokens=2048))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"logprobs": 2},
        {"logprobs": 2, "echo": True},
        {"echo": True, "n": 2},
        {"echo": True, "max_tokens": 0},
        {"prompt": ["Some words that", [1, 2, 3]]},
        {"stop": ["e", "qu"]},
        {"stop": "e", "include_stop_str_in_output": True},
        {"stop": "e", "min_tokens": 9},
        {"temperature": 0.8, "seed": 5},
        {"max_tokens": 5_000},
        {"top_p": 7},
    ],
    ids=str,
)
def test_completions(body: dict[str, Any]) -> None:
    status, told = same(post("/v1/completions", **GREEDY | body))
    assert (status == 200) == ("choices" in told)


SCHEMA = {
    "type": "object",
    "properties": {"x": {"enum": [1, 2]}},
    "required": ["x"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"regex": "[0-9]{4}"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"structured_outputs": {"regex": "[0-9]{4}"}, "ignore_eos": True, "logprobs": True},
    ],
    ids=str,
)
def test_structured_output_is_whole(body: dict[str, Any]) -> None:
    """A worker ends it with the end token that the wire has at the end of what stopped; it is no text."""
    pytest.importorskip("llguidance")

    async def ask(client: httpx.AsyncClient) -> Any:
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "temperature": 0} | body
        reply = await client.post("/v1/chat/completions", json=asked)
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        return choice["message"]["content"], calls, choice["finish_reason"]

    content, calls, reason = same(ask)
    assert (content or calls) and reason in ("stop", "tool_calls")


def test_figures_of_workers_never_fall() -> None:
    """Gauges are of the workers that are there, counters of all that ever were."""

    def told(steps: int, running: int, prompts: int = 0) -> dict[str, Any]:
        zero = {one.name: 0 for one in fields(Stats)}
        cold = {"cold": steps}
        return zero | {"steps": steps, "num_running": running, "prompt_tokens": prompts, "sharing_ended": cold}

    totals = Totals()
    for told_now, steps, running in (
        ({0: told(5, 2), 1: told(7, 1)}, 12, 3),
        ({0: told(6, 2)}, 13, 2),
        ({0: told(6, 2), 1: told(2, 1)}, 15, 3),
        ({0: told(1, 0), 1: told(9, 1)}, 23, 1),
        ({}, 23, 0),
    ):
        found = totals.add(told_now)
        assert (found.steps, found.num_running, found.sharing_ended) == (steps, running, {"cold": steps})
    totals = Totals()
    assert totals.add({0: told(5, 0, 900)}).prompt_tokens == 900
    assert totals.add({0: told(6, 0, 10)}).prompt_tokens == 910, "another process, which has made more steps"


def test_what_was_served_is_cached() -> None:
    async def twice(client: httpx.AsyncClient) -> Any:
        await post("/v1/completions", **GREEDY)(client)
        return (await post("/v1/completions", **GREEDY)(client))[1]["usage"]

    assert same(twice)["prompt_tokens_details"]["cached_tokens"] > 0


def test_streams() -> None:
    assert len(same(stream(**GREEDY))) > 5
    assert (
        same(stream(**GREEDY, stop=["e", "qu"]))
        == same(post("/v1/completions", **GREEDY, stop=["e", "qu"]))[1]["choices"][0]["text"]
    )


def test_metrics_and_the_cache() -> None:
    async def ask(client: httpx.AsyncClient) -> Any:
        await post("/v1/completions", **GREEDY)(client)
        told = (await client.get("/metrics")).text
        dropped = (await client.post("/reset_prefix_cache")).json()["tokens_dropped"]
        return told, dropped, (await client.get("/health")).status_code

    told, dropped, healthy = over_workers(ask)
    assert "radixgen:generation_tokens_total" in told and dropped > 0 and healthy == 200


def test_a_deadline() -> None:
    status, told = over_workers(post("/v1/completions", **GREEDY | {"max_tokens": 1_500}), request_timeout=0.05)
    assert status == 200 and told["choices"][0]["finish_reason"] == "abort"


def test_a_worker_that_goes_is_told() -> None:
    workers: list[Worker] = []

    async def ask(client: httpx.AsyncClient) -> Any:
        asked = asyncio.create_task(post("/v1/completions", **GREEDY | {"max_tokens": 1_500})(client))
        await asyncio.sleep(0.1)
        workers[0].drain()
        status, told = await asked
        while (await client.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        refused, _ = await post("/v1/completions", **GREEDY)(client)
        return status, told, refused

    status, told, refused = over_workers(ask, before=workers.append)
    assert refused == 503
    assert status == 503 or told["choices"][0]["finish_reason"] == "abort"
