"""Cache hints over HTTP: the field, `cache_control` in messages, the route; through an engine and through a worker."""

import asyncio
from typing import Any

import httpx
import pytest
from served import HI, Served, in_process, limited, tiny
from test_http_app import figures
from test_http_workers import over_workers

from radixgen.cache.node import DEMOTED

KEYS = ["one", "two"]
GREEDY = {"temperature": 0, "max_tokens": 3}
CONTROL = {"type": "ephemeral"}
EXTRAS = (("ttl", "2h"), ("ttl", 300), ("scope", "x"))


async def answers(client: httpx.AsyncClient, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
    response = await client.post(f"/v1/{path}", json=GREEDY | body)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["usage"]["prompt_tokens_details"]["cache_hints"]
    return found


async def error(client: httpx.AsyncClient, path: str = "/v1/completions", key: str = "", **body: Any) -> dict[str, str]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    response = await client.post(path, json=body, headers=headers)
    assert response.status_code == 400, response.text
    found: dict[str, str] = response.json()["error"]
    return found


async def unpin(served: Served) -> None:
    """Pins are what a server must not leave behind."""
    await served.engine._call(lambda: [served.engine._engine.unpin(pin) for pin in served.engine._engine.pins])


def parts(*texts: str, at: tuple[int, ...] = (), **control: Any) -> list[dict[str, Any]]:
    """A user's message of text parts, of which those at `at` have `cache_control`."""
    own = {"cache_control": CONTROL | control}
    blocks = [{"type": "text", "text": text} | (own if index in at else {}) for index, text in enumerate(texts)]
    return [{"role": "user", "content": blocks}]


# -- the field ------------------------------------------------------------------------------------------------


def test_hints_are_answered() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        hints = [{"action": "retain", "num_tokens": 4, "ttl": 60}, {"action": "pin", "ttl": 1e9}, {"action": "demote"}]
        found = await answers(client, prompt="abcdefgh", cache_hints=hints)
        assert [(one["action"], one["status"], one["num_tokens"]) for one in found] == [
            ("retain", "accepted", 4), ("pin", "clipped", 8), ("demote", "accepted", 8)
        ]  # fmt: skip
        assert [one["ttl"] for one in found] == [60, 3600, None]
        assert [one["reason"] for one in found] == [None, "ttl: at most 3600 seconds", None]
        chat = await answers(client, "chat/completions", messages=HI, cache_hints=[{"action": "retain"}])
        assert chat[0]["status"] == "accepted"
        plain = await client.post("/v1/completions", json=GREEDY | {"prompt": "a"})
        assert "cache_hints" not in plain.json()["usage"]["prompt_tokens_details"]
        seen = figures((await client.get("/metrics")).text)
        assert seen["radixgen:cache_hints_accepted_total"] == 3 and seen["radixgen:cache_hints_clipped_total"] == 1
        await unpin(served)

    in_process(test, tiny())


@pytest.mark.parametrize(
    ("hints", "field", "limit"),
    [
        ([{"action": "evict"}], "cache_hints", "evict"),
        ([{"action": "retain", "size": 3}], "cache_hints", "size"),
        ([{"action": "retain", "num_tokens": -1}], "cache_hints[0].num_tokens", "from 0"),
        ([{"action": "pin"}, {"action": "retain", "ttl": 0}], "cache_hints[1].ttl", "above 0"),
        ([{"action": "retain", "ttl": "5m"}], "cache_hints", "ttl"),
        (17 * [{"action": "retain"}], "len(cache_hints)", "at most 16"),
    ],
)
def test_malformed_hints(hints: list[Any], field: str, limit: str) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for path in ("/v1/completions", "/cache_hints"):
            found = await error(client, path, prompt="abc", cache_hints=hints)
            assert found["param"].startswith(field) and limit in found["message"], found

    in_process(test, tiny())


def test_hints_are_for_a_single_prompt() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await error(client, prompt=["a", "b"], cache_hints=[{"action": "retain"}])
        assert found["param"] == "cache_hints" and "single prompt" in found["message"]

    in_process(test, tiny())


def test_keys_have_bounds_of_their_own() -> None:
    """One key's salts count together, and callers cannot put themselves above others."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def ask(key: str, prompt: str, **body: Any) -> str:
            body |= {"prompt": prompt, "cache_hints": [{"action": "retain"}]}
            response = await client.post("/v1/completions", json=GREEDY | body, headers={"x-api-key": key})
            return str(response.json()["usage"]["prompt_tokens_details"]["cache_hints"][0]["status"])

        assert await ask("one", "abc") == await ask("one", "bcd", cache_salt="x") == "accepted"
        assert await ask("one", "cde", cache_salt="y") == "refused"
        assert await ask("two", "abc") == "accepted"
        hint = {"action": "retain", "priority": 1}
        found = await error(client, key="one", prompt="a", cache_hints=[hint])
        assert found["param"] == "cache_hints[0].priority" and "at most 0" in found["message"]
        await unpin(served)

    in_process(test, tiny(limits=limited(max_hint_pins=2)), api_keys=KEYS)


# -- cache_control --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (parts("abc", "def", at=(0,)), [(5, 300)]),
        (parts("abc", "def", at=(0, 1), ttl="1h"), [(5, 3600), (8, 3600)]),
        ([{"role": "system", "content": "be brief", "cache_control": CONTROL}, *HI], [(10, 300)]),
        ([{"role": "user", "content": "漢漢", "cache_control": {"type": "ephemeral", "ttl": "5m"}}], [(8, 300)]),
        (
            [*parts("é", at=(0,)), {"role": "assistant", "content": "b"}, *parts("c", "", at=(1,))],
            [(4, 300), (12, 300)],
        ),
    ],
)
def test_blocks_with_cache_control_are_retained(messages: Any, expected: list[tuple[int, int]]) -> None:
    """One token is one byte: `u:` or `s:` before each message, `;` after it."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await answers(client, "chat/completions", messages=messages)
        assert [(one["action"], one["num_tokens"], one["ttl"]) for one in found] == [
            ("retain", count, ttl) for count, ttl in expected
        ]
        plain = [{**message, "cache_control": None} for message in messages]
        tokens = (await client.post("/tokenize", json={"messages": messages})).json()["tokens"]
        assert (await client.post("/tokenize", json={"messages": plain})).json()["tokens"] == tokens
        await served.engine.reset_prefix_cache()
        again = await client.post("/v1/chat/completions", json=GREEDY | {"messages": messages})
        cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == expected[-1][0]
        await unpin(served)

    in_process(test, tiny())


def test_the_turns_of_a_session() -> None:
    """Blocks keep their `cache_control` as the chat grows, and the generated tokens stay as they were."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        messages: list[dict[str, Any]] = []
        counts = [0]
        for turn in range(3):
            messages += parts("abc", at=(0,))
            body = GREEDY | {"messages": messages, "session_id": "s"}
            response = (await client.post("/v1/chat/completions", json=body)).json()
            details = response["usage"]["prompt_tokens_details"]
            found = [one["num_tokens"] for one in details["cache_hints"]]
            assert found[:-1] == counts[1:] and found[-1] > counts[-1]
            assert turn == 0 or details["cached_tokens"] > counts[-1]
            counts.append(found[-1])
            messages.append(response["choices"][0]["message"])
        await unpin(served)

    in_process(test, tiny())


def test_the_path_that_a_session_leaves_is_demoted() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for text in ("abcdef", "abcxyz"):
            messages = [{"role": "user", "content": text}]
            body = GREEDY | {"messages": messages, "session_id": "s"}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        demoted = await asyncio.wrap_future(
            served.engine.inspect(lambda core: [n for n in core.tree.nodes() if n.priority == DEMOTED])
        )
        assert [(node.start, node.known) for node in demoted] == [(5, 8)], "`def;a:`, and two tokens of the answer"

    in_process(test, tiny())


@pytest.mark.parametrize(
    "control",
    [
        "ephemeral",
        {},
        {"type": "persistent"},
        CONTROL | {"ttl": "2h"},
        CONTROL | {"ttl": 300},
        CONTROL | {"scope": "x"},
    ],
)
def test_malformed_cache_control(control: Any) -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        block = {"type": "text", "text": "a", "cache_control": control}
        found = await error(client, "/v1/chat/completions", messages=[{"role": "user", "content": [block]}])
        assert found["param"] == "messages[0].content[0].cache_control" and "ephemeral" in found["message"]

    in_process(test, tiny())


def test_at_most_four_blocks() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        found = await error(client, "/v1/chat/completions", messages=parts(*"abcde", at=(0, 1, 2, 3, 4)))
        assert found["param"] == "len(cache_control)" and "at most 4" in found["message"]
        assert len(await answers(client, "chat/completions", messages=parts(*"abcde", at=(0, 1, 2, 3)))) == 4
        await unpin(served)

    in_process(test, tiny())


# -- without a request, and through workers -------------------------------------------------------------------


def test_the_route() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        body: dict[str, Any] = {"messages": HI, "cache_hints": [{"action": "retain"}, {"action": "prefetch"}]}
        cold = (await client.post("/cache_hints", json=body)).json()["cache_hints"]
        assert [one["status"] for one in cold] == ["refused", "refused"]
        await client.post("/v1/chat/completions", json=GREEDY | {"messages": HI})
        warm = (await client.post("/cache_hints", json=body)).json()["cache_hints"]
        assert [one["status"] for one in warm] == ["accepted", "accepted"]
        assert (await error(client, "/cache_hints", cache_hints=[]))["param"] == "prompt"
        await unpin(served)

    in_process(test, tiny())


def test_hints_reach_a_worker() -> None:
    """Hints go with the first of several sequences, and the answers come back."""

    async def ask(client: httpx.AsyncClient) -> Any:
        hints = [{"action": "retain", "ttl": 0.2}, {"action": "pin", "num_tokens": 2, "ttl": 0.1}]
        first = await answers(client, prompt="abcdef", n=2, seed=1, cache_hints=hints)
        body = {"prompt": "abcdef", "cache_hints": [{"action": "demote", "num_tokens": 99}, *hints]}
        second = (await client.post("/cache_hints", json=body)).json()["cache_hints"]
        await asyncio.sleep(0.3)
        await answers(client, prompt="b", cache_hints=[{"action": "share"}])  # a step, in which pins expire
        return first, second

    first, second = over_workers(ask)
    assert [(one["action"], one["status"], one["num_tokens"]) for one in first] == [
        ("retain", "accepted", 6), ("pin", "accepted", 2)
    ]  # fmt: skip
    assert [one["status"] for one in second] == ["refused", "accepted", "accepted"]
