"""Agents of other projects against the server: openai-agents, anthropic and litellm, where they are installed."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import Served, over_socket, scripted

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def script(before: str, line: str) -> dict[str, float]:
    """Calls two tools, one after the other, and then says what the second returned."""
    results = before.count("\nt:")
    calls = ["add", "double"]
    if "route me" in before and results == 0:
        return {f"a:{call('transfer_to_helper')}": 1.0}
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
