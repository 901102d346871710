"""Bodies of `/v1/responses`. Field names are OpenAI's; those of extensions are the same as in chats."""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from radixgen.serve.http.protocol import (
    CacheHintAnswer,
    CacheHintFields,
    IgnoredFields,
    StreamOptions,
    StructuredOutputs,
    TokenLogprob,
)

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseTool(Struct, forbid_unknown_fields=True):
    """Function that the model may call. `strict`: enforce its JSON schema, `parameters`, as a whole."""

    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolReference(Struct, forbid_unknown_fields=True):
    """Name of one of the tools."""

    name: str
    type: Literal["function"] = "function"


class ResponseToolChoice(Struct, forbid_unknown_fields=True):
    """`tool_choice` of a function that must be called (`name`), or of those that may be (`mode` and `tools`)."""

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ToolReference] | None = None


class TextFormatFields(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Format of the text: free, any JSON object, or JSON that follows `schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | UnsetType = UNSET
    schema: dict[str, Any] | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class TextFields(Struct, forbid_unknown_fields=True):
    """`format` of the text. `verbosity` has no effect."""

    format: TextFormatFields | None = None
    verbosity: str | None = None


class ReasoningFields(Struct, forbid_unknown_fields=True):
    """`effort`: as `reasoning_effort` in chats. No summaries are written."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseRequest(IgnoredFields, kw_only=True):
    """`POST /v1/responses`. `input`: text, or a list of messages, tool calls, their outputs and reasoning."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    cache_hints: list[CacheHintFields] | None = None
    reading: dict[str, Any] | None = None
    skip_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# -- items of the output --------------------------------------------------------------------------------------


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    """Text of a message."""

    text: str
    annotations: list[str] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Text of a reasoning item."""

    text: str


class MessageItem(Struct, kw_only=True, tag_field="type", tag="message"):
    """Message of the assistant."""

    id: str
    role: Literal["assistant"] = "assistant"
    status: ResponseStatus
    content: list[OutputText]


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """Reasoning before a message or a tool call."""

    id: str
    status: ResponseStatus
    summary: list[str] = []
    content: list[ReasoningText]


class FunctionCallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """Tool call. `arguments`: JSON."""

    id: str
    status: ResponseStatus
    call_id: str
    name: str
    arguments: str


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


# -- responses ------------------------------------------------------------------------------------------------


class InputTokensDetails(Struct):
    """`cached_tokens`: input tokens whose KV was cached. `cache_write_tokens`: those that were computed, and cached."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_hints: list[CacheHintAnswer] | UnsetType = UNSET


class OutputTokensDetails(Struct):
    """`reasoning_tokens`: output tokens of reasoning items."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, kw_only=True):
    """Number of tokens. `exact`: false if keys were left out."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    exact: Literal[False] | UnsetType = UNSET


class IncompleteDetails(Struct):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseFailure(Struct):
    """Error that ended a response."""

    code: str
    message: str


class ResponseBody(Struct, kw_only=True):
    """Response, as far as it is there. Fields of the request are repeated."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: Literal[False] = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningFields
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float | None
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(Struct, kw_only=True):
    """Event of a stream. Each type has the fields that OpenAI documents for it."""

    type: str
    sequence_number: int
    response: ResponseBody | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET


class ResponseDeleted(Struct, kw_only=True):
    """Answer to a deletion."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(Struct, kw_only=True):
    """Page of the input items of a response."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
