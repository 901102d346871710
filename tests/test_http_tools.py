"""Tool calls in what a model writes, however its text falls into pieces."""

import families
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET
from texts import tokenizer

from radixgen import InvalidRequest, Limits, SamplingParams
from radixgen.sampling.structured import Grammars
from radixgen.serve.http.protocol import (
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    StructuredOutputs,
    Tool,
)
from radixgen.serve.http.tool_parsers import (
    HermesParser,
    NamedCallParser,
    PlainTextParser,
    RequiredCallParser,
    ToolCallParser,
)
from radixgen.serve.http.tools import constrain, parser_for

TOKENIZER = tokenizer()
GRAMMARS = Grammars(TOKENIZER, families.VOCAB, Limits())

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
    '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
    f"{CALL} {CALL.replace('look', 'other')}",
    '<tool_call>{"name": "look", "arguments": {"x": "</tool_call>\\"}"}} </tool_call> after',
    '<tool_call>{"name": "look", "arguments": {"x": {}}, "id": 1}<tool_call>{"name": "look", "arguments": {}}',
    '<tool_call>{"arguments": {"x": 1}, "name": "look"}</tool_call>',
]
NAMES = ["look", "lo?ok"]


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


def read_parts(reader: ToolCallParser, parts: list[str], *, cut: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls, put together as a client does."""
    content, calls = "", []
    for piece in [*(reader.push(part) for part in parts), reader.finish(cut=cut)]:
        content += piece.content
        for call in piece.calls:
            if call.id is UNSET:
                name, arguments = calls.pop()
                calls.append((name, arguments + call.function.arguments))
            else:
                assert call.index == len(calls) and call.id.startswith("call_")
                calls.append((call.function.name, call.function.arguments))
    return content, calls


@given(
    st.sampled_from(TEXTS), st.lists(st.integers(0, 200), max_size=30), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_pieces_change_nothing(text: str, cuts: list[int], parallel: bool, cut: bool, lost: int) -> None:
    text = text[: len(text) - lost]
    whole, parts = (HermesParser(NAMES, parallel=parallel) for _ in range(2))
    expected, found = read_parts(whole, [text], cut=cut), read_parts(parts, pieces(text, cuts), cut=cut)
    assert found == expected and whole.calls == parts.calls == bool(found[1])
    assert parallel or len(found[1]) <= 1


@given(st.text(alphabet='<>tol_ca/{}" n', max_size=80), st.lists(st.integers(0, 80), max_size=10))
def test_no_text_is_lost(text: str, cuts: list[int]) -> None:
    reader = HermesParser(NAMES)
    content, calls = read_parts(reader, pieces(text, cuts))
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
        (TEXTS[12], TEXTS[12], []),
        (TEXTS[13], " " + CALL.replace("look", "other"), [("look", '{"x": "<tool_call>"}')]),
        (TEXTS[14], " after", [("look", '{"x": "</tool_call>\\"}"}')]),
        (TEXTS[15], "", [("look", '{"x": {}}'), ("look", "{}")]),
        (TEXTS[16], "", [("look", '{"x": 1}')]),
    ],
)
def test_hermes(text: str, content: str, calls: list) -> None:
    reader = HermesParser(NAMES)
    assert read_parts(reader, [text]) == (content, calls) and reader.calls == bool(calls)


def test_nothing_is_held_back_that_is_certain() -> None:
    reader = HermesParser(NAMES)
    assert reader.push("so 1 <").content == "so 1 "
    assert reader.push("2 and <tool").content == "<2 and "
    assert reader.push("s").content == "<tools"


def test_arguments_come_as_they_are_written() -> None:
    for reader in (HermesParser(NAMES), RequiredCallParser(NAMES)):
        if isinstance(reader, HermesParser):
            reader.push("<tool_call>")
        (first, *_) = reader.push('{"name": "look", "arguments": {"x"').calls
        assert first.function.name == "look"
        (more,) = reader.push(": 1").calls
        assert (more.function.name, more.function.arguments) == (UNSET, ": 1")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "loo', "", []),
        ("hi <tool_call>", "hi ", []),
        ('<tool_call>{"name": "look", "arguments": {"x": [', "", [("look", '{"x": [')]),
        ('<tool_call>{"name": "look", "arguments": {}}', "", [("look", "{}")]),
        ('<tool_call>{"name": "other", "arguments": {"x": [', '<tool_call>{"name": "other", "arguments": {"x": [', []),
        ("<tool_call>I think", "<tool_call>I think", []),
    ],
)
def test_a_call_that_max_tokens_cuts(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read_parts(HermesParser(NAMES), [text], cut=True) == (content, calls)


def test_one_call_where_no_more_may_be() -> None:
    two = f"{CALL}{CALL.replace('look', 'lo?ok')} so"
    assert read_parts(HermesParser(NAMES, parallel=False), [two]) == (" so", [("look", '{"x": "<tool_call>"}')])


def test_required_and_named() -> None:
    text = '{"name": "look", "arguments": {"x": 1}}'
    assert read_parts(RequiredCallParser(NAMES), list(text)) == ("", [("look", '{"x": 1}')])
    assert read_parts(RequiredCallParser(NAMES), [text[:-3]], cut=True) == ("", [("look", '{"x": ')])
    assert read_parts(RequiredCallParser(NAMES), [text[:-30]], cut=True) == ("", [])
    assert read_parts(RequiredCallParser(NAMES), ['{"name": "look", "arguments": 5}']) == ("", [("look", "5")])
    assert read_parts(RequiredCallParser(["other"]), [text]) == ("", [])
    assert read_parts(NamedCallParser("look"), list('{"x": 1}')) == ("", [("look", '{"x": 1}')])
    assert read_parts(NamedCallParser("look"), []) == ("", [("look", "")])
    assert read_parts(PlainTextParser(), [CALL]) == (CALL, [])


def asked(choice: object, *names: str) -> ChatRequest:
    tools = [Tool(FunctionDefinition(name, parameters={"type": "object", "title": name})) for name in names]
    return ChatRequest(messages=[], tools=tools or None, tool_choice=choice)


def test_half_a_character_is_written_anyhow() -> None:
    """JSON can write halves of surrogate pairs, and UTF-8 can't."""
    name = "lo\ud83dok"
    for arguments, expected in (('{"x": "\\ud83d"}', '{"x": "\\ud83d"}'), ('"\\ud83d"', "?")):
        (call,) = read_parts(RequiredCallParser([name]), [f'{{"name": "lo\\ud83dok", "arguments": {arguments}}}'])[1]
        assert call == ("lo?ok", expected)


def constrained(body: ChatRequest) -> SamplingParams:
    return constrain(body.params(8, None), body, Limits(), pytest.fail)


def test_choices() -> None:
    named = NamedTool(FunctionName("b"))
    assert isinstance(parser_for(asked(None)), PlainTextParser) and isinstance(
        parser_for(asked(None, "a")), HermesParser
    )
    assert isinstance(parser_for(asked("none", "a")), PlainTextParser)
    assert isinstance(parser_for(asked("required", "a")), RequiredCallParser)
    assert isinstance(parser_for(asked(named, "a", "b")), NamedCallParser)
    assert not constrained(asked("auto", "a")).structured
    assert constrained(asked(named, "a", "b")).json_schema == {"type": "object", "title": "b"}
    with pytest.raises(InvalidRequest, match="requires tools"):
        parser_for(asked("auto"))
    with pytest.raises(InvalidRequest, match="one of tools"):
        constrained(asked(NamedTool(FunctionName("c")), "a"))


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", NamedTool(FunctionName("a"))])
def test_a_format_beside_tools(choice: object) -> None:
    body = asked(choice, "a")
    body.response_format = {"type": "json_object"}
    params = constrained(body)
    assert params.structured and (params.response_format is not None) == (choice == "none")
    assert bool(params.grammar and "answer:" in params.grammar) == (choice in (None, "auto"))
    body.structured_outputs = StructuredOutputs(regex="a")
    if choice != "none":
        with pytest.raises(InvalidRequest, match="structured_outputs"):
            constrained(body)
    body.response_format, body.structured_outputs = {"type": "odd"}, None
    if choice != "none":
        with pytest.raises(InvalidRequest, match="response_format"):
            constrained(body)


NODE = {"type": "object", "properties": {"next": {"$ref": "#"}, "x": {"$ref": "#/$defs/X"}}, "required": ["x"]}
LISTS = {"type": "object", "properties": {"x": {"$ref": "#/definitions/X"}}, "required": ["x"]}
REFERRING = [
    Tool(FunctionDefinition("node", parameters=NODE | {"$defs": {"X": {"enum": [1]}}})),
    Tool(FunctionDefinition("lists", parameters=LISTS | {"definitions": {"X": {"enum": ["a"]}}})),
    Tool(FunctionDefinition('a "name"')),
]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "node", "arguments": {"next": {"x": 1}, "x": 1}}', True),
        ('{"name": "node", "arguments": {"next": {"x": 2}, "x": 1}}', False),
        ('{"name": "node", "arguments": {"x": "a"}}', False),
        ('{"name": "lists", "arguments": {"x": "a"}}', True),
        ('{"name": "lists", "arguments": {"x": 1}}', False),
        ('{"name": "a \\"name\\"", "arguments": {}}', True),
        ('{"name": "other", "arguments": {}}', False),
    ],
)
@pytest.mark.parametrize("tagged", [False, True])
def test_each_schema_has_its_own_references(text: str, right: bool, tagged: bool) -> None:
    """Definitions that have one name in two tools, and a schema within itself."""
    body = ChatRequest(messages=[], tools=REFERRING, tool_choice="auto" if tagged else "required")
    body.response_format = {"type": "json_object"} if tagged else None
    text = f"<tool_call>{text}</tool_call>" if tagged else text
    assert _fits(constrained(body), text) == right
    if tagged:
        assert _fits(constrained(body), '{"x": 1}') and not _fits(constrained(body), "I see")
        assert _fits(constrained(body), f"{text}{text}") == right
        body.parallel_tool_calls = False
        assert _fits(constrained(body), text) == right and not _fits(constrained(body), f"{text}{text}")


def _fits(params: SamplingParams, text: str) -> bool:
    grammar = GRAMMARS.find(params)
    assert grammar is not None
    state = grammar.start()
    for token in TOKENIZER(text)["input_ids"]:
        if not state.allows(token):
            return False
        state.accept(token)
    return state.allowed().accepts
