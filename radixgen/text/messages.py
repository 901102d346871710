"""Conversion of chat messages from clients to the form that chat templates expect."""

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from radixgen.core import InvalidRequest, check_texts

_ROLES = frozenset({"assistant", "developer", "function", "system", "tool", "user"})
_COMPARED = re.compile(r"""role['"]?\]?\s*(?:==|!=|in|not in)\s*(\[[^\]]*\]|\([^)]*\)|['"]\w+['"])""")
_QUOTED = re.compile(r"""['"](\w+)['"]""")


class Roles:
    """Roles that a chat template accepts: OpenAI's, and those that the template compares roles with.

    template: its text, or texts by name.
    """

    def __init__(self, template: str | Mapping[str, str] | None) -> None:
        texts = template.values() if isinstance(template, Mapping) else [template or ""]
        whole = "\n".join(texts)
        compared = "\n".join(_COMPARED.findall(whole))
        self._known = _ROLES.union(_QUOTED.findall(compared))
        self._names_developer = "developer" in _QUOTED.findall(whole)

    def role(self, role: str, field: str) -> str:
        """Role for the template: `developer` becomes `system` if the template does not mention it.

        Raises `InvalidRequest`.
        """
        if role not in self._known:
            raise InvalidRequest(field, role, f"must be one of {', '.join(sorted(self._known))}")
        return "system" if role == "developer" and not self._names_developer else role


def template_messages(messages: object, roles: Roles) -> list[dict[str, Any]]:
    """Convert messages: join text parts, drop null fields, and decode arguments of tool calls.

    Raises `InvalidRequest`.
    """
    if not isinstance(messages, Seq) or isinstance(messages, str | bytes):
        raise InvalidRequest("messages", messages, "must be a list of messages")
    return [template_message(message, roles, f"messages[{index}]") for index, message in enumerate(messages)]


def template_message(message: object, roles: Roles, field: str = "messages") -> dict[str, Any]:
    """Convert one message. Raises `InvalidRequest` for `field`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(field, message, 'must be {"role": …, "content": …}')
    check_texts(field, message)
    converted = {name: value for name, value in message.items() if value is not None}
    converted["role"] = roles.role(message["role"], f"{field}.role")
    converted["content"] = _text(converted.get("content"), f"{field}.content")
    calls = converted.pop("tool_calls", [])  # clients send empty lists, and templates test whether the field exists
    if calls != []:
        if not isinstance(calls, list | tuple):
            raise InvalidRequest(f"{field}.tool_calls", calls, "must be a list")
        converted["tool_calls"] = [_call(call, f"{field}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return converted


def _text(content: object, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(field, content, "must be text, null, or a list of parts")
    return "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(content))


def _part(part: object, field: str) -> str:
    """Text of a part; a refusal counts as text of the model."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise InvalidRequest(field, part, 'must be {"type": "text", "text": …}')
    return text


def _call(call: object, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(field, call, 'must hold {"function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments") or {}  # clients send "" for none
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}
