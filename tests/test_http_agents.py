"""Agents of other projects against the server: openai-agents, anthropic and litellm, where they are installed."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import Served, over_socket, scripted

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def script(before: str, line: str) -> dict[str, float]:
    """Calls two tools, one after the other, and then says what the second returned."""
    results = before.count("\nt:")
    calls = ["add", "double"]
    if "route me" in before and '{"assistant"' not in before:
        return {f"a:{call('transfer_to_helper')}": 1.0}
    results -= '{"assistant"' in before
    if results < len(calls):
        return {f"a:{call(calls[results], x=results + 1)}": 1.0}
    return {'a:{"number": 4}': 1.0}


def call(name: str, **arguments: int) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with over_socket(scripted(script, TEMPLATE), sampling_defaults={"max_tokens": 100}) as found:
        yield found


# -- openai-agents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_openai_agents(served: Served, stream: bool) -> None:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    from pydantic import BaseModel

    class Answer(BaseModel):
        number: int

    @agents.function_tool
    def add(x: int) -> str:
        return str(x + 1)

    @agents.function_tool
    def double(x: int) -> str:
        return str(2 * x)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            model = agents.OpenAIResponsesModel("tiny", client)
            settings = agents.ModelSettings(extra_body={"stop": "\n"})
            helper = agents.Agent(
                "helper", tools=[add, double], model=model, model_settings=settings, output_type=Answer
            )
            first = agents.Agent("first", handoffs=[helper], model=model, model_settings=settings)
            if not stream:
                return await agents.Runner.run(first, "route me")
            result = agents.Runner.run_streamed(first, "route me")
            async for _ in result.stream_events():
                pass
            return result

    import asyncio

    result = asyncio.run(run())
    assert result.last_agent.name == "helper" and result.final_output == Answer(number=4)
    calls = [item.raw_item.name for item in result.new_items if item.type == "tool_call_item"]
    assert calls == ["add", "double"]


# -- anthropic ------------------------------------------------------------------------------------------------


def test_anthropic(served: Served) -> None:
    anthropic = pytest.importorskip("anthropic")
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("add", "double")]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "tools": tools, "stop_sequences": ["\n"]}
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0) as client:
        for turn, name in enumerate(["add", "double"]):
            if turn:
                answer = client.messages.create(**options, messages=messages)
            else:
                with client.messages.stream(**options, messages=messages) as stream:
                    answer = stream.get_final_message()
            (block,) = answer.content
            assert block.name == name and block.input == {"x": turn + 1} and answer.stop_reason == "tool_use"
            result = {"type": "tool_result", "tool_use_id": block.id, "content": "2"}
            messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        count = client.messages.count_tokens(model="tiny", messages=messages, tools=tools).input_tokens
        last = client.messages.create(**options, messages=messages)
        assert last.content[0].text == '{"number": 4}' and last.usage.cache_read_input_tokens > count // 2
        assert last.usage.cache_read_input_tokens + last.usage.input_tokens == count
        with pytest.raises(anthropic.BadRequestError, match="stop_sequences"):
            client.messages.create(**options | {"stop_sequences": [""]}, messages=messages)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**options | {"model": "other"}, messages=messages)


# -- litellm --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_litellm(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bridge from Anthropic's interface to OpenAI's, and its own call of responses."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    found = litellm.responses(model="openai/tiny", input="hi", api_base=f"{served.url}/v1", api_key="any")
    assert found.status in ("completed", "incomplete") and found.output
    options = {"model": "anthropic/tiny", "api_base": served.url, "api_key": "any"}
    answer = litellm.completion(**options, messages=[{"role": "user", "content": "hi"}], max_tokens=100, stop=["\n"])
    assert answer.choices[0].message.content.startswith("<tool_call>")
