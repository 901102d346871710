"""Messages as clients send them, for chat templates as they are."""

from typing import Any

import families
import pytest
import templates
from texts import tokenizer

from radixgen import Engine, InvalidRequest, SamplingParams
from radixgen.text.messages import Roles, template_message, template_messages

PLAIN = Roles("{{ m.role }}: {{ m.content }}")
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}


def test_arguments_are_objects_and_content_is_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "name": None}
    found = template_message(message, PLAIN)
    assert found["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found["content"] == "" and found.keys() == {"role", "content", "tool_calls"}
    assert template_message({"role": "user"}, PLAIN) == {"role": "user", "content": ""}
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert template_message({"role": "user", "content": parts}, PLAIN)["content"] == "ab"
    for empty in ({}, {"arguments": ""}, {"arguments": None}):
        bare = {**CALL, "function": {"name": "look", **empty}}
        found = template_message({"role": "assistant", "tool_calls": [bare]}, PLAIN)
        assert found["tool_calls"][0]["function"]["arguments"] == {}
    for none in ([], None):
        assert "tool_calls" not in template_message({"role": "assistant", "content": "a", "tool_calls": none}, PLAIN)
    broken = {**CALL, "function": {"name": "look", "arguments": "{"}}
    found = template_message({"role": "assistant", "tool_calls": [broken]}, PLAIN)
    assert found["tool_calls"][0]["function"]["arguments"] == "{"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"content": 5}, "content"),
        ({"content": ["a"]}, "content[0]"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}, "content[1]"),
        ({"content": [{"type": "text", "text": None}]}, "content[0]"),
        ({"tool_calls": 5}, "tool_calls"),
        ({"tool_calls": [CALL, 5]}, "tool_calls[1]"),
        ({"tool_calls": [{"function": {}}]}, "tool_calls[0]"),
        ({"role": "wizard"}, "role"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template_messages([{"role": "user", "content": "a"}, {"role": "user", **wrong}], PLAIN)
    assert caught.value.field == f"messages[1].{field}"


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (None, "system"),
        ("{{ m.role }}", "system"),
        ({"default": "{{ m.role }}"}, "system"),
        (templates.HARMONY, "system"),
        ("{% if m.role == 'developer' %}D{% endif %}", "developer"),
        ('{% if m["role"] in ["system", "developer"] %}D{% endif %}', "developer"),
        ({"default": "", "tool_use": "{{ {'developer': 'D'}[m.role] }}"}, "developer"),
    ],
)
def test_developer_is_what_the_template_knows(template: Any, role: str) -> None:
    assert template_message({"role": "developer", "content": "a"}, Roles(template))["role"] == role


def test_roles_of_the_template() -> None:
    roles = Roles(
        "{% if message['role'] == 'ipython' or message.role in ('critic', \"judge\") %}{{ 'content' }}{% endif %}"
    )
    for role in ("ipython", "critic", "judge", "user", "function"):
        assert template_message({"role": role, "content": "a"}, roles)["role"] == role
    for role in ("content", "", "User"):
        with pytest.raises(InvalidRequest, match="must be one of assistant, critic"):
            template_message({"role": role, "content": "a"}, roles)


def test_chats_of_the_engine() -> None:
    plain = [
        {"role": "system", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "bc"},
    ]
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    sent = [
        {"role": "developer", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    with Engine(families.build("llama"), tokenizer=tokenizer(), kv_tokens=512) as engine:
        one, other = engine.chat([plain, sent], SamplingParams(max_tokens=1))
        assert one.prompt_token_ids == other.prompt_token_ids == engine.chat_tokens(sent)
