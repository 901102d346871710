"""Bodies of `/v1/messages`. Field names are Anthropic's; those of extensions are the same as in chats."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from radixgen.serve.http.protocol import CacheHintFields, StructuredOutputs

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageTool(Struct, forbid_unknown_fields=True):
    """Tool that the model may call. `strict`: enforce its JSON schema, `input_schema`, as a whole."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None


class MessageToolChoice(Struct, forbid_unknown_fields=True):
    """Whether tools may be called, must be (`any`), or which must be (`tool`, with its name)."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingFields(Struct, forbid_unknown_fields=True):
    """Whether the model thinks first. Sets `enable_thinking` of chat templates that have this variable."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class OutputConfig(Struct, forbid_unknown_fields=True):
    """`format`: JSON schema of the text. `effort`: as `reasoning_effort` in chats."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/messages` and `/v1/messages/count_tokens`. The last message may be the beginning of the answer."""

    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    context_management: dict[str, Any] | None = None
    min_p: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    cache_hints: list[CacheHintFields] | None = None
    reading: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# -- responses ------------------------------------------------------------------------------------------------


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    """Text of an answer."""

    text: str


class ThinkingBlock(Struct, kw_only=True, tag_field="type", tag="thinking"):
    """Reasoning before an answer. `signature` is empty: thinking is not signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """Tool call. `input`: its arguments; empty if they are no JSON object because `max_tokens` cut them."""

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(Struct, kw_only=True):
    """Number of tokens; the prompt has the sum of the first three.

    input_tokens: prompt tokens that were computed, without the next.
    cache_creation_input_tokens: those of them that `cache_control` retains.
    cache_read_input_tokens: prompt tokens whose KV was cached.
    """

    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0


class MessageBody(Struct, kw_only=True):
    """Answer, as far as it is there."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageStop(Struct):
    """Why an answer ended."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    """More thinking."""

    thinking: str


class InputJSONDelta(Struct, tag_field="type", tag="input_json_delta"):
    """More of a call's arguments."""

    partial_json: str


class MessageEvent(Struct, kw_only=True):
    """Event of a stream. Each type has the fields that Anthropic documents for it."""

    type: str
    message: MessageBody | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: ContentBlock | UnsetType = UNSET
    delta: TextDelta | ThinkingDelta | InputJSONDelta | UnsetType = UNSET


class MessageDelta(Struct, kw_only=True):
    """Event at the end of an answer, with the whole usage."""

    type: Literal["message_delta"] = "message_delta"
    delta: MessageStop
    usage: MessageUsage


class MessageTokensCount(Struct):
    """Number of prompt tokens."""

    input_tokens: int


class MessageErrorDetails(Struct):
    """Type and text of an error."""

    type: str
    message: str


class MessageError(Struct, kw_only=True):
    """Body of an error in Anthropic's format."""

    type: Literal["error"] = "error"
    error: MessageErrorDetails
    request_id: str | None = None
