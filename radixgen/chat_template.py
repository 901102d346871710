"""A model's own chat template: messages to text, text to token ids, and an answer back to a message."""

import json
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from radixgen.core import InvalidRequest, Limits, PromptTooLong
from radixgen.input_processor import through_template
from radixgen.template_variables import check_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]
Render = Callable[..., Any]
"""As `through_template`, whose arguments it takes."""

logger = logging.getLogger(__name__)

_HALF = "\ufffd"
_CONTEXT = 16
"""Tokens, and characters, before a piece in whose light it is decoded or tokenized."""


class ChatTemplate:
    """A tokenizer with the tools and the options that its chat template is given.

    Every method raises `InvalidRequest`, or a child of it, for what the caller gave.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        tools: Seq[Tool] | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        render: Render = through_template,
        field: str = "template_options",
    ) -> None:
        """options: variables of the template, which errors call `field`. render: what renders it; by default this
        process, within no bounds.
        """
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidRequest("messages", "…", "the model has no chat template")
        self.tokenizer: Any = tokenizer
        self._render = render
        self.limits = limits or Limits()
        self.tools = _as_tools(tools, self.limits)
        self.options: dict[str, Any] = as_json(field, {} if options is None else options)
        if not isinstance(self.options, dict):
            raise InvalidRequest(field, options, "must be a mapping")
        check_options(field, self.options, tokenizer)

    def render(self, messages: Seq[Message]) -> str:
        """The text that asks for an answer to `messages`."""
        text = self._render(self.tokenizer, messages, tools=self.tools, tokenize=False, **self.options)
        if len(text) > self.limits.max_prompt_chars:
            raise PromptTooLong("len(messages)", len(text), f"at most {self.limits.max_prompt_chars} characters")
        return str(text)

    def tokenize(self, text: str, before: str = "") -> tuple[int, ...]:
        """The tokens of `text` as it follows `before`: what tokenizers do at the beginning of a text (a space put in
        front) is not done, unless a token would reach across.
        """
        context = before[-_CONTEXT:]
        if context and text and self.tokenizer.is_fast:
            both = self.tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
            first = sum(begin < len(context) for begin, _ in both["offset_mapping"])
            if all(end <= len(context) for _, end in both["offset_mapping"][:first]):
                return tuple(both["input_ids"][first:])
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, token_ids: Seq[int], before: Seq[int] = (), *, special: bool = True) -> str:
        """What `token_ids` say after the tokens `before`, but for half a character at their end."""
        context = list(before[-_CONTEXT:])
        head, both = self._decode(context, special), self._decode([*context, *token_ids], special)
        own = both[len(head) :] if both.startswith(head) else self._decode(token_ids, special)
        return own.rstrip(_HALF)

    def message(self, text: str, raw: str, prompt: str) -> Message:
        """The assistant's message. `raw` is the answer with its special tokens.

        Where the tokenizer has a `response_template`, transformers reads reasoning and tool calls by it; else, and
        where that fails or finds nothing, the content is `text`, the answer without special tokens.
        """
        plain = {"role": "assistant", "content": text}
        if getattr(self.tokenizer, "response_template", None) is None:
            return plain
        try:
            parsed = as_json("answer", self.tokenizer.parse_response(raw, prefix=prompt, tools=self.tools))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("an answer could not be parsed by the tokenizer's response template: %s", error)
            return plain
        found = isinstance(parsed, dict) and parsed.keys() - {"role"}
        return {"role": "assistant", "content": "", **parsed} if found else plain

    def _decode(self, token_ids: Seq[int], special: bool) -> str:
        ids = list(token_ids)
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            if ids
            else ""
        )


def as_messages(field: str, value: object, limits: Limits) -> tuple[Message, ...]:
    """Text of a user, a message or a list of messages, as copies that nobody else holds; nothing for None."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = {"role": "user", "content": value}
    many = [value] if isinstance(value, Mapping) else value
    if not isinstance(many, Seq) or isinstance(many, str | bytes | bytearray | memoryview):
        raise InvalidRequest(field, value, "must be text, a message, or a list of messages")
    if len(many) > limits.max_messages:
        raise InvalidRequest(f"len({field})", len(many), f"at most {limits.max_messages} messages")
    return tuple(_as_message(field, one, limits) for one in many)


def as_json(field: str, value: object) -> Any:
    """A copy of `value` by way of JSON, in UTF-8. Raises `InvalidRequest` where that cannot hold it."""
    try:
        return json.loads(json.dumps(_plain(value), allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, value, f"cannot be written as JSON: {error}") from error


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _as_message(field: str, value: object, limits: Limits) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise InvalidRequest(field, value, 'a message is {"role": …, "content": …}')
    content = value.get("content")
    if isinstance(content, str) and len(content) > limits.max_prompt_chars:
        raise PromptTooLong(f"len({field})", len(content), f"at most {limits.max_prompt_chars} characters")
    message: Message = as_json(field, value)
    return message


def _as_tools(tools: object, limits: Limits) -> list[Any] | None:
    """Tools as JSON schemas; transformers reads one off a function's annotations and docstring."""
    if tools is None:
        return None
    if not isinstance(tools, Seq) or isinstance(tools, str | bytes) or len(tools) > limits.max_tools:
        raise InvalidRequest("tools", tools, f"must be a list of at most {limits.max_tools} schemas or functions")
    return [_as_tool(tool) for tool in tools]


def _as_tool(tool: object) -> Any:
    if isinstance(tool, Mapping):
        return as_json("tools", tool)
    from transformers.utils import get_json_schema

    try:
        return as_json("tools", get_json_schema(tool))
    except Exception as error:
        raise InvalidRequest("tools", tool, f"must be a JSON schema, or a function that has one: {error}") from error
