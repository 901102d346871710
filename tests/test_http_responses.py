"""`/v1/responses`: OpenAI's own client and its agents, chains by id and by text, and what is refused."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import families
import httpx
import openai
import pytest
import texts
from served import HI, Served, in_process, limited, over_socket, scripted, slowed, tiny

from radixgen import Engine

CALL = '<tool_call>{"name": "look", "arguments": {"x": 1}}</tool_call>'
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with over_socket(tiny()) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as found:
        yield found
    served.check()


def test_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 5, "temperature": 0}
    found = client.responses.create(**options, instructions="be brief", metadata={"a": "b"})
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.output_text and found.output[0].role == "assistant" and found.metadata == {"a": "b"}
    assert found.usage.output_tokens == 5 and found.usage.input_tokens_details.cached_tokens == 0
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "be brief"}, *HI], max_tokens=5, temperature=0
    )
    assert found.output_text == chat.choices[0].message.content
    assert client.responses.retrieve(found.id) == found


def test_streaming(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 8, "temperature": 0}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        events = list(stream)
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 2 and "".join(deltas) == final.output_text == whole.output_text
    assert final.usage == whole.usage or final.usage.input_tokens_details.cached_tokens


def test_logprobs_and_formats(client: openai.OpenAI) -> None:
    found = client.responses.create(
        model="tiny", input="hi", max_output_tokens=3, include=["message.output_text.logprobs"], top_logprobs=2
    )
    logprobs = found.output[0].content[0].logprobs
    assert len(logprobs) == 3 and all(len(token.top_logprobs) == 2 for token in logprobs)
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    text = {"format": {"type": "json_schema", "name": "weather", "schema": schema, "strict": True}}
    found = client.responses.create(model="tiny", input="hi", max_output_tokens=60, text=text)
    assert json.loads(found.output_text)["sunny"] in (True, False) and found.status == "completed"


# -- chains ---------------------------------------------------------------------------------------------------


def exact_tokens(chained: bool) -> tuple[list[int], list[dict[str, Any]]]:
    """Computed prompt tokens and usage of three turns, chained by id or with the whole history."""
    computed, usages = [], []

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        options = {"temperature": 1, "seed": 2, "max_output_tokens": 12, "ignore_eos": True}
        items: list[Any] = [{"role": "user", "content": "hi"}]
        previous = None
        for text in ("more", "and more", ""):
            before = (await served.engine.stats()).computed_prompt_tokens
            body = {**options, "input": items[-1:] if chained else items, "previous_response_id": previous}
            answer = (await client.post("/v1/responses", json=body)).json()
            previous = answer["id"]
            computed.append((await served.engine.stats()).computed_prompt_tokens - before)
            usages.append(answer["usage"])
            items += [*answer["output"], {"role": "user", "content": text}]

    in_process(test, Engine(families.build("llama"), tokenizer=texts.tokenizer(), kv_tokens=2048, debug=True))
    return computed, usages


@pytest.mark.parametrize("chained", [True, False], ids=["by id", "by text"])
def test_later_turns_compute_what_is_new(chained: bool) -> None:
    """Of random text, whose tokens no tokenizer gives back, all is found again but the last token, which has no KV."""
    computed, usages = exact_tokens(chained)
    for before, after, new in zip(usages, usages[1:], computed[1:], strict=False):
        held = before["input_tokens"] + before["output_tokens"] - 1
        assert after["input_tokens_details"]["cached_tokens"] >= held
        assert new <= after["input_tokens"] - held


def test_branches_of_a_conversation_stay_exact() -> None:
    """Two clients that resend the same beginning part there, and neither loses its tokens to the other."""

    async def test(client: httpx.AsyncClient, served: Served) -> None:
        async def turn(items: list[Any], seed: int) -> dict[str, Any]:
            body = {"input": items, "seed": seed, "temperature": 1, "max_output_tokens": 9, "ignore_eos": True}
            answer: dict[str, Any] = (await client.post("/v1/responses", json=body)).json()
            held = answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"] - 1
            items += [*answer["output"], {"role": "user", "content": "go on"}]
            return {"held": held, "cached": answer["usage"]["input_tokens_details"]["cached_tokens"]}

        first: list[Any] = [{"role": "user", "content": "hi"}]
        await turn(first, 1)
        branches = [list(first), list(first), list(first)]
        held = [await turn(items, seed) for seed, items in enumerate(branches)]
        for _ in range(3):
            for seed, items in enumerate(branches):
                after = await turn(items, seed + 10)
                assert after["cached"] >= held[seed]["held"]
                held[seed] = after
        assert len(served.app.state.context.sessions) == 3
        sessions = served.app.state.context.sessions
        assert len(sessions._keys) == 2 * (1 + 3 * 4)

    in_process(test, tiny())


def test_deleted_and_unknown(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_output_tokens": 4}
    first = client.responses.create(**options, input="one")
    second = client.responses.create(**options, input="two", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]
    page = client.responses.input_items.list(second.id, order="asc", limit=2)
    assert page.has_more and [item.id for item in page] == [item.id for item in items]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(**options, input="x", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    third = client.responses.create(**options, input="three", previous_response_id=second.id, store=False)
    assert third.usage.input_tokens > second.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(third.id)
    reference = [{"type": "item_reference", "id": second.output[0].id}, {"role": "user", "content": "x"}]
    assert client.responses.create(**options, input=reference).status == "incomplete"


def test_a_response_belongs_to_its_key() -> None:
    with over_socket(tiny(limits=limited(max_responses=3)), api_keys=["one", "two"]) as served:
        one, two = (openai.OpenAI(base_url=f"{served.url}/v1", api_key=key) for key in ("one", "two"))
        with one, two:
            kept = two.responses.create(model="tiny", input="a", max_output_tokens=2)
            with pytest.raises(openai.NotFoundError):
                one.responses.retrieve(kept.id)
            ids = [one.responses.create(model="tiny", input=x, max_output_tokens=2).id for x in "abcd"]
            assert two.responses.retrieve(kept.id).id == kept.id
            with pytest.raises(openai.NotFoundError):
                one.responses.retrieve(ids[0])
            assert one.responses.retrieve(ids[-1]).id == ids[-1]
        assert len(served.app.state.context.responses._holders) == 6


def test_cancel() -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "abc", "extra_body": {"ignore_eos": True}}
    with (
        over_socket(slowed(tiny(), 0.01)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client,
        client.responses.create(**options, max_output_tokens=200, stream=True) as stream,
    ):
        response_id = next(stream).response.id
        for _ in range(8):
            next(stream)
        assert client.responses.retrieve(response_id).status == "in_progress"
        assert client.responses.cancel(response_id).status == "cancelled"
        last = list(stream)[-1]
        assert last.type == "response.incomplete" and last.response.status == "cancelled"
        assert 0 < last.response.usage.output_tokens < 200
        with pytest.raises(openai.BadRequestError, match="in_progress"):
            client.responses.cancel(response_id)


def test_truncation(client: openai.OpenAI, served: Served) -> None:
    items = [{"role": role, "content": "x" * 60} for role in ("user", "assistant") * 4] + [HI[0]]
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input=items, max_output_tokens=3)
    assert caught.value.code == "context_length_exceeded"
    found = client.responses.create(model="tiny", input=items, max_output_tokens=3, truncation="auto")
    assert found.usage.input_tokens < served.engine.inputs.max_model_len


# -- tools ----------------------------------------------------------------------------------------------------


def script(before: str, line: str) -> dict[str, float]:
    if "tool:" in before or "\nt:" in before:
        return {"a:it is 1": 1.0}
    return {f"a:Let me see.{CALL}": 1.0}


def test_tools() -> None:
    options: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "max_output_tokens": 100}
    options["extra_body"] = {"stop": "\n"}
    with over_socket(scripted(script)) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        found = client.responses.create(**options, input="hi")
        message, call = found.output
        assert message.content[0].text == "Let me see." and found.status == "completed"
        assert call.name == "look" and json.loads(call.arguments) == {"x": 1}
        with client.responses.stream(**options, input="hi") as stream:
            kinds = [event.type for event in stream]
            again = stream.get_final_response().output[1]
        assert again.arguments == call.arguments
        assert "response.function_call_arguments.delta" in kinds and "response.function_call_arguments.done" in kinds
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "1"}
        chained = client.responses.create(**options, input=[output], previous_response_id=found.id)
        assert chained.output_text == "it is 1"
        resent = client.responses.create(
            **options, input=[{"role": "user", "content": "hi"}, *found.output, output], store=False
        )
        assert resent.output_text == "it is 1" and resent.usage.input_tokens == chained.usage.input_tokens


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].arguments"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
    ({"input": "x", "background": True}, "background"),
    ({"input": "x", "include": ["file_search_call.results"]}, "include[0]"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": "x", "tools": [{"type": "mcp", "name": "x"}]}, "tools[0].type"),
    ({"input": "x", "temperature": -1}, "temperature"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "x", "conversation": "conv"}, "conversation"),
    ({"input": "x", "max_tokens": 3}, "max_tokens"),
    ({"input": "x", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ({"input": "x", "stream_options": {}}, "stream_options"),
    ({"input": "x", "model": "other"}, "model"),
]


def test_refusals() -> None:
    async def test(client: httpx.AsyncClient, served: Served) -> None:
        for body, field in REFUSED:
            answer = await client.post("/v1/responses", json=body)
            assert answer.status_code in (400, 404), (body, answer.text)
            assert answer.json()["error"]["param"] == field, (body, answer.text)
        assert not served.app.state.context.responses.num_bytes

    in_process(test, tiny())


def test_an_error_ends_a_stream_with_a_failed_response() -> None:
    found: list[str] = []

    def ask(url: str) -> None:
        body = {"input": "abc", "max_output_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/responses", json=body, timeout=60) as answer:
            found.append("".join(answer.iter_text()))

    with over_socket(slowed(tiny(), 0.02), drain_timeout=0.2) as served:
        asked = threading.Thread(target=ask, args=[served.url])
        asked.start()
        while served.engine.progress[0] < 5:
            time.sleep(0.002)
        served.check = lambda: None  # type: ignore[method-assign]
    asked.join()
    name, data = found[0].strip().split("\n\n")[-1].split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and event["type"] == "response.failed"
    assert event["response"]["status"] == "failed" and event["response"]["error"]["code"] == "engine_closed"
