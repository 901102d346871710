"""Chat template of a model: rendering of messages, tokenization, and parsing of answers."""

import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from radixgen.core import InvalidRequest, Limits, PromptTooLong
from radixgen.engine.input_processor import through_template
from radixgen.text.template_variables import check_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]
Render = Callable[..., Any]
"""Function with the arguments of `through_template`"""

PromptEnding = Literal["generation", "open", "messages"]
"""End of a prompt: where the next message begins, where the last message ends without its end token, or with it"""

logger = logging.getLogger(__name__)

_ENDINGS: dict[PromptEnding, dict[str, bool]] = {
    "generation": {},
    "open": {"add_generation_prompt": False, "continue_final_message": True},
    "messages": {"add_generation_prompt": False},
}
_HALF = "\ufffd"
_CONTEXT = 16
_BLOCK = 256
"""Tokens that are decoded at a time, where they are counted."""
"""Number of tokens, or characters, of context for decoding or tokenizing a text"""


class ChatTemplate:
    """Chat template of a tokenizer, with tools and options.

    Methods raise `InvalidRequest`, or a subclass, for invalid arguments.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase | None",
        tools: Seq[Tool] | None = None,
        options: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        render: Render = through_template,
        field: str = "template_options",
        ending: PromptEnding = "generation",
    ) -> None:
        """
        tools: JSON schemas, or functions with annotations and a docstring.
        options: variables of the template.
        render: function that renders the template; by default in this process, without limits on time and memory.
        field: name of `options` in errors.
        ending: how renders end.
        """
        if tokenizer is None or not tokenizer.chat_template:
            raise InvalidRequest("messages", "…", "the model has no chat template")
        self.tokenizer: Any = tokenizer
        self._render = partial(render, **_ENDINGS[ending])
        self.limits = limits or Limits()
        self.tools = _as_tools(tools, self.limits)
        self.options: dict[str, Any] = as_json(field, {} if options is None else options)
        if not isinstance(self.options, dict):
            raise InvalidRequest(field, options, "must be a mapping")
        check_options(field, self.options, tokenizer)

    def render(self, messages: Seq[Message]) -> str:
        """Render the prompt that asks for an answer to `messages`."""
        text = self._render(self.tokenizer, messages, tools=self.tools, tokenize=False, **self.options)
        if len(text) > self.limits.max_prompt_chars:
            raise PromptTooLong("len(messages)", len(text), f"at most {self.limits.max_prompt_chars} characters")
        return str(text)

    def tokenize(self, text: str, before: str = "") -> tuple[int, ...]:
        """Tokenize `text` as a continuation of `before`.

        What tokenizers do at the beginning of a text, such as adding a space, is avoided, unless a token spans both.
        """
        context = before[-_CONTEXT:]
        if context and text and self.tokenizer.is_fast:
            both = self.tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
            first = sum(begin < len(context) for begin, _ in both["offset_mapping"])
            if all(end <= len(context) for _, end in both["offset_mapping"][:first]):
                return tuple(both["input_ids"][first:])
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, token_ids: Seq[int], before: Seq[int] = (), *, special: bool = True) -> str:
        """Decode `token_ids` as a continuation of the tokens `before`, without an incomplete character at the end."""
        return self._continuation(token_ids, before, special).rstrip(_HALF)

    def count_tokens(self, token_ids: Seq[int], lengths: Seq[int]) -> list[int]:
        """For each of `lengths`, in characters, return how many leading tokens have text of at most this length.

        The text is decoded once, in blocks, and then only the blocks in which a length ends.
        """
        begins, starts, longest = [0], [0], max(lengths, default=0)  # first token and first character of each block
        while begins[-1] < len(token_ids) and starts[-1] <= longest:
            begin = begins[-1]
            before, stop = token_ids[max(begin - _CONTEXT, 0) : begin], begin + _BLOCK
            text = self._continuation(token_ids[begin:stop], before)
            while text.endswith(_HALF) and stop < min(begin + _BLOCK + _CONTEXT, len(token_ids)):
                stop += 1
                text = self._continuation(token_ids[begin:stop], before)
            begins.append(min(stop, len(token_ids)))
            starts.append(starts[-1] + len(text))

        def count(length: int) -> int:
            block = bisect_right(starts, length) - 1
            begin, left = begins[block], length - starts[block]
            rest, before = token_ids[begin : begin + _BLOCK + _CONTEXT], token_ids[max(begin - _CONTEXT, 0) : begin]
            sizes = range(len(rest) + 1)
            return begin + bisect_right(sizes, left, key=lambda size: len(self.text(rest[:size], before))) - 1

        return [count(length) if length else 0 for length in lengths]

    def _continuation(self, token_ids: Seq[int], before: Seq[int] = (), special: bool = True) -> str:
        context = list(before[-_CONTEXT:])
        head, both = self._decode(context, special), self._decode([*context, *token_ids], special)
        return both[len(head) :] if both.startswith(head) else self._decode(token_ids, special)

    def message(self, text: str, raw: str, prompt: str) -> Message:
        """Convert an answer to a message of the assistant.

        text: the answer without special tokens.
        raw: the answer with special tokens.
        prompt: the rendered prompt.

        If the tokenizer has a `response_template`, transformers parses reasoning and tool calls by it. Otherwise, or if
        that fails, the content is `text`.
        """
        plain = {"role": "assistant", "content": text}
        if getattr(self.tokenizer, "response_template", None) is None:
            return plain
        try:
            parsed = as_json("answer", self.tokenizer.parse_response(raw, prefix=prompt, tools=self.tools))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning("an answer could not be parsed by the tokenizer's response template: %s", error)
            return plain
        has_fields = isinstance(parsed, dict) and parsed.keys() - {"role"}
        return {"role": "assistant", "content": "", **parsed} if has_fields else plain

    def _decode(self, token_ids: Seq[int], special: bool) -> str:
        ids = list(token_ids)
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            if ids
            else ""
        )


def as_messages(field: str, value: object, limits: Limits) -> tuple[Message, ...]:
    """Convert the text of a user, a message, or a list of messages to a tuple of copied messages; empty for None."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = {"role": "user", "content": value}
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, Seq) or isinstance(messages, str | bytes | bytearray | memoryview):
        raise InvalidRequest(field, value, "must be text, a message, or a list of messages")
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"len({field})", len(messages), f"must be at most {limits.max_messages}")
    return tuple(_as_message(field, message, limits) for message in messages)


def as_json(field: str, value: object) -> Any:
    """Copy `value` by encoding it as JSON in UTF-8. Raises `InvalidRequest` if that fails."""
    try:
        return json.loads(json.dumps(_plain(value), allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(field, value, f"cannot be written as JSON: {error}") from error


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _as_message(field: str, value: object, limits: Limits) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise InvalidRequest(field, value, 'must be {"role": …, "content": …}')
    content = value.get("content")
    if isinstance(content, str) and len(content) > limits.max_prompt_chars:
        raise PromptTooLong(f"len({field})", len(content), f"must be at most {limits.max_prompt_chars} characters")
    message: Message = as_json(field, value)
    return message


def _as_tools(tools: object, limits: Limits) -> list[Any] | None:
    """Convert tools to JSON schemas; those of functions are derived from annotations and docstring."""
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
        raise InvalidRequest("tools", tool, f"must be a JSON schema or an annotated function: {error}") from error
