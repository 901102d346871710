"""`/v1/messages`: blocks, streams, cached tokens, and what is refused in Anthropic's format."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from served import HI, Served, in_process, scripted, tiny

from radixgen.serve.http.messages import with_pings

CALL = '<tool_call>{"name": "look", "arguments": {"x": 1}}</tool_call>'
TOOL = {"name": "look", "input_schema": {"type": "object"}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/messages", json={"max_tokens": 6, "messages": HI, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def stream(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await client.post("/v1/messages", json={"max_tokens": 6, "messages": HI, "stream": True, **body})
    events = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name for name, _ in events] == [f"event: {event['type']}" for event in found]
    return found


def test_text_whole_and_streamed() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        options = {"temperature": 0, "system": [{"type": "text", "text": "be brief"}]}
        whole = await ask(client, **options)
        chat = {"messages": [{"role": "system", "content": "be brief"}, *HI], "max_tokens": 6, "temperature": 0}
        same = (await client.post("/v1/chat/completions", json=chat)).json()
        assert whole["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
        assert whole["stop_reason"] == "max_tokens" and whole["usage"]["output_tokens"] == 6
        events = await stream(client, **options)
        kinds = [event["type"] for event in events]
        assert kinds[:3] == ["message_start", "ping", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
        assert text == whole["content"][0]["text"]
        usage = events[-2]["usage"]
        assert usage["cache_read_input_tokens"] and usage["output_tokens"] == 6
        assert events[0]["message"]["usage"]["cache_read_input_tokens"] == usage["cache_read_input_tokens"]
        count = await client.post("/v1/messages/count_tokens", json={"messages": HI, "system": "be brief"})
        assert count.json() == {"input_tokens": same["usage"]["prompt_tokens"]}

    in_process(test, tiny())


def test_the_last_message_may_be_the_beginning_of_the_answer() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        begun = [*HI, {"role": "assistant", "content": "it is"}]
        found = await ask(client, messages=begun, max_tokens=20, stop_sequences=["\n"])
        assert found["content"][0]["text"] == " sunny" and found["stop_reason"] == "stop_sequence"

    in_process(test, scripted(lambda *_: {"a:it is sunny": 1.0}, TEMPLATE))


def test_tools() -> None:
    def script(before: str, line: str) -> dict[str, float]:
        return {"a:sunny": 1.0} if "\nt:1" in before else {f"a:Let me see.{CALL}": 1.0}

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        options: dict[str, Any] = {"tools": [TOOL], "max_tokens": 100, "stop_sequences": ["\n"]}
        found = await ask(client, **options)
        text, call = found["content"]
        assert text["text"] == "Let me see." and found["stop_reason"] == "tool_use"
        assert call["name"] == "look" and call["input"] == {"x": 1}
        events = await stream(client, **options)
        starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
        parts = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
        assert starts == ["text", "tool_use"] and json.loads("".join(parts)) == {"x": 1}
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "1"}]}
        messages = [*HI, {"role": "assistant", "content": found["content"]}, {"role": "user", "content": [result]}]
        second = await ask(client, **options, messages=messages)
        assert second["content"][0]["text"] == "sunny" and second["stop_reason"] == "stop_sequence"
        usage, before = second["usage"], found["usage"]
        held = sum(before[name] for name in before) - 1
        assert usage["cache_read_input_tokens"] >= held

    in_process(test, scripted(script, TEMPLATE))


def test_cache_control() -> None:
    """What it retains counts as created once, and as read afterwards."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        control = {"type": "ephemeral", "ttl": "1h"}
        system = [{"type": "text", "text": "x" * 40, "cache_control": control}]
        first = (await ask(client, system=system, max_tokens=2))["usage"]
        assert first["cache_creation_input_tokens"] >= 40 and first["cache_read_input_tokens"] == 0
        assert first["input_tokens"] > 0
        other = [{"role": "user", "content": "other"}]
        second = (await ask(client, system=system, messages=other, max_tokens=2))["usage"]
        assert second["cache_read_input_tokens"] >= first["cache_creation_input_tokens"]
        assert second["cache_creation_input_tokens"] == 0
        assert (await served.engine.stats()).kv_tokens_pinned >= 40
        tools = [TOOL | {"cache_control": control}]
        third = (await ask(client, tools=tools, system="y" * 30, max_tokens=2, cache_control=control))["usage"]
        assert third["cache_creation_input_tokens"] >= 30
        await served.engine.reset_prefix_cache()

    in_process(test, tiny())


REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
    ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
    ({"messages": []}, 400, "invalid_request_error", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "invalid_request_error",
        "messages[0].content[0].type",
    ),
    ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system[0].type"),
    ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, 400, "invalid_request_error", "tools[0]"),
    ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
    ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
    ({"model": "claude"}, 404, "not_found_error", "model"),
    ({"n": 2}, 400, "invalid_request_error", "n"),
]


def test_refusals() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        headers = {"x-api-key": "right"}
        for body, status, kind, field in REFUSED:
            answer = await client.post("/v1/messages", json={"max_tokens": 2, "messages": HI} | body, headers=headers)
            assert answer.status_code == status, answer.text
            error = answer.json()
            assert error["type"] == "error" and error["error"]["type"] == kind and error["request_id"]
            assert error["error"]["message"].startswith(field), error
        wrong = await client.post("/v1/messages", json={"max_tokens": 2, "messages": HI}, headers={"x-api-key": "no"})
        assert wrong.status_code == 401 and wrong.json()["error"]["type"] == "authentication_error"

    in_process(test, tiny(), api_keys=["right"])


def test_pings() -> None:
    """They come while nothing else does, and the stream ends as it does without them."""
    closed = []

    async def slow() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            await asyncio.sleep(0.05)
            yield b"b"
        finally:
            closed.append(True)

    async def all_events() -> list[bytes]:
        return [event async for event in with_pings(slow(), b"p", 0.01)]

    found = asyncio.run(all_events())
    assert [event for event in found if event != b"p"] == [b"a", b"b"] and found.count(b"p") >= 2
    assert found[0] == b"a" and found[-1] == b"b" and closed


# -- the same in chats ----------------------------------------------------------------------------------------


def test_a_chat_may_continue_its_last_message() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        begun = [*HI, {"role": "assistant", "content": "it is"}]
        options: dict[str, Any] = {"messages": begun, "max_tokens": 20, "stop": "\n"}
        body = options | {"continue_final_message": True, "add_generation_prompt": False}
        found = (await client.post("/v1/chat/completions", json=body)).json()
        assert found["choices"][0]["message"]["content"] == " sunny"
        ends = {}
        for name, fields in (
            ("open", {"continue_final_message": True}),
            ("messages", {"add_generation_prompt": False}),
            ("generation", {}),
        ):
            tokens = (await client.post("/tokenize", json={"messages": begun, **fields})).json()["tokens"]
            ends[name] = (await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
        assert ends["messages"] == ends["open"] + "\n" and ends["generation"] == ends["messages"] + "a:"
        for wrong, field in (
            ({"add_generation_prompt": True}, "continue_final_message"),
            ({"session_id": "s"}, "session_id"),
        ):
            refused = await client.post("/v1/chat/completions", json=body | wrong)
            assert refused.json()["error"]["param"] == field, refused.text

    in_process(test, scripted(lambda *_: {"a:it is sunny": 1.0}, TEMPLATE))


def test_only_allowed_tools_are_called() -> None:
    """The model sees the others, and what it writes for them is no call."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "other")]

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        reasons = {}
        for allowed in ("look", "other", "unknown"):
            choice = {"mode": "auto", "tools": [{"type": "function", "function": {"name": allowed}}]}
            body = {"messages": HI, "tools": tools, "max_tokens": 100, "stop": "\n"}
            body["tool_choice"] = {"type": "allowed_tools", "allowed_tools": choice}
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            reasons[allowed] = (
                answer["choices"][0]["finish_reason"] if "choices" in answer else answer["error"]["param"]
            )
        assert reasons == {
            "look": "tool_calls",
            "other": "stop",
            "unknown": "tool_choice.allowed_tools.tools[0].function.name",
        }

    in_process(test, scripted(lambda *_: {f"a:{CALL}": 1.0}, TEMPLATE))
