"""Tool calls in what a model writes, however its text falls into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from radixgen import InvalidRequest
from radixgen.serve.http.protocol import ChatRequest, FunctionDefinition, FunctionName, NamedTool, Tool
from radixgen.serve.http.tools import (
    HermesReader,
    NamedReader,
    PlainReader,
    Reader,
    RequiredReader,
    reader_of,
    schema_of,
    template_message,
)

CALL = '<tool_call>\n{"name": "look", "arguments": {"x": "<tool_call>"}}\n</tool_call>'
TEXTS = [
    "nothing of the sort",
    "",
    CALL,
    f"Let me see.\n{CALL}\n{CALL}\n",
    f"a < b <tool {CALL} and more",
    "<tool_call>{}</tool_call>",
    "<tool_call>not JSON</tool_call> after",
    '<tool_call>{"name": "look", "arguments": {}}',
    '<tool_call>{"name": "look", "argu',
    "ends in <tool_cal",
    '<tool_call>{"name": 1}</tool_call>',
    '<tool_call>{"name": "look", "parameters": "{\\"x\\": 1}"}</tool_call>',
]
"""None has a closing tag inside a call's JSON, where Hermes's form can't be told apart."""


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


def told(reader: Reader, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, put together as a client does."""
    content, calls = "", []
    for piece in [*(reader.push(part) for part in parts), reader.finish()]:
        content += piece.content
        for call in piece.calls:
            if call.id is UNSET:
                name, arguments = calls.pop()
                calls.append((name, arguments + call.function.arguments))
            else:
                assert call.index == len(calls) and call.id.startswith("call_")
                calls.append((call.function.name, call.function.arguments))
    return content, calls


@given(st.sampled_from(TEXTS), st.lists(st.integers(0, 200), max_size=30))
def test_pieces_change_nothing(text: str, cuts: list[int]) -> None:
    whole, parts = HermesReader(), HermesReader()
    expected, found = told(whole, [text]), told(parts, pieces(text, cuts))
    assert found == expected and whole.calls == parts.calls


@given(st.text(alphabet='<>tol_ca/{}" n', max_size=80), st.lists(st.integers(0, 80), max_size=10))
def test_no_text_is_lost(text: str, cuts: list[int]) -> None:
    reader = HermesReader()
    content, calls = told(reader, pieces(text, cuts))
    assert calls or content == text


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (TEXTS[0], TEXTS[0], []),
        (CALL, "", [("look", '{"x": "<tool_call>"}')]),
        (TEXTS[3], "Let me see.\n", [("look", '{"x": "<tool_call>"}')] * 2),
        (TEXTS[5], TEXTS[5], []),
        (TEXTS[7], "", [("look", "{}")]),
        (TEXTS[8], TEXTS[8], []),
        (TEXTS[9], TEXTS[9], []),
        (TEXTS[11], "", [("look", '{"x": 1}')]),
    ],
)
def test_hermes(text: str, content: str, calls: list) -> None:
    reader = HermesReader()
    assert told(reader, [text]) == (content, calls) and reader.calls == bool(calls)


def test_nothing_is_held_back_that_is_certain() -> None:
    reader = HermesReader()
    assert reader.push("so 1 <").content == "so 1 "
    assert reader.push("2 and <tool").content == "<2 and "
    assert reader.push("s").content == "<tools"


def test_required_and_named() -> None:
    text = '{"name": "look", "arguments": {"x": 1}}'
    assert told(RequiredReader(), list(text)) == ("", [("look", '{"x": 1}')])
    assert told(RequiredReader(), [text[:-3]]) == (text[:-3], [])
    assert told(NamedReader("look"), list('{"x": 1}')) == ("", [("look", '{"x": 1}')])
    assert told(NamedReader("look"), []) == ("", [("look", "")])
    assert told(PlainReader(), [CALL]) == (CALL, [])


def asked(choice: object, *names: str) -> ChatRequest:
    tools = [Tool(FunctionDefinition(name, parameters={"type": "object", "title": name})) for name in names]
    return ChatRequest(messages=[], tools=tools or None, tool_choice=choice)


def test_half_a_character_is_written_anyhow() -> None:
    """JSON can write halves of surrogate pairs, and UTF-8 can't."""
    (call,) = told(RequiredReader(), ['{"name": "lo\\ud83dok", "arguments": {"x": "\\ud83d"}}'])[1]
    assert call == ("lo?ok", '{"x": "?"}')


def test_choices() -> None:
    named = NamedTool(FunctionName("b"))
    assert isinstance(reader_of(asked(None)), PlainReader) and isinstance(reader_of(asked(None, "a")), HermesReader)
    assert isinstance(reader_of(asked("none", "a")), PlainReader)
    assert isinstance(reader_of(asked("required", "a")), RequiredReader)
    assert isinstance(reader_of(asked(named, "a", "b")), NamedReader)
    assert schema_of(asked("auto", "a")) is None
    assert schema_of(asked(named, "a", "b")) == {"type": "object", "title": "b"}
    one, other = schema_of(asked("required", "a", "b"))["anyOf"]
    assert one["properties"]["name"] == {"const": "a"} and other["properties"]["arguments"]["title"] == "b"
    with pytest.raises(InvalidRequest, match="with tools"):
        reader_of(asked("auto"))
    with pytest.raises(InvalidRequest, match="one of tools"):
        schema_of(asked(NamedTool(FunctionName("c")), "a"))


def test_messages_for_templates() -> None:
    """Templates want arguments as objects, and text."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}
    found = template_message({"role": "assistant", "content": None, "tool_calls": [call], "refusal": None})
    assert found["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found["content"] == "" and "refusal" not in found
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template_message({"role": "user", "content": parts})["content"] == "ab"
    for empty in ({}, {"arguments": ""}, {"arguments": None}):
        bare = {**call, "function": {"name": "look", **empty}}
        assert template_message({"role": "a", "tool_calls": [bare]})["tool_calls"][0]["function"]["arguments"] == {}
    assert "tool_calls" not in template_message({"role": "assistant", "content": "a", "tool_calls": []})
    broken = {**call, "function": {"name": "look", "arguments": "{"}}
    assert template_message({"role": "a", "tool_calls": [broken]})["tool_calls"][0]["function"]["arguments"] == "{"
    for wrong in (
        {"content": 5},
        {"content": [{"type": "image_url", "image_url": {}}]},
        {"tool_calls": 5},
        {"tool_calls": [5]},
        {"tool_calls": [{"function": {}}]},
    ):
        with pytest.raises(InvalidRequest):
            template_message({"role": "user", **wrong})
    assert json.dumps(found)
