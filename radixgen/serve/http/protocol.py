"""Bodies of HTTP requests and responses. Field names are OpenAI's; those of extensions are vLLM's.

Fields in `IgnoredFields` have no effect; other unknown fields are rejected. docs/http.md documents each field.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from radixgen.core import FinishReason, HintAction, HintStatus, InvalidRequest, SamplingParams
from radixgen.core.reading import reading_from_json

ChatMessage = Annotated[
    dict[str, Any],
    Meta(
        description="Message for the chat template: role, content (text, or a list of text parts), tool_calls, …",
        extra_json_schema={
            "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
            "required": ["role"],
        },
    ),
]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`include_usage`: end the stream with a chunk that has the request's usage and no choices."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Grammar of a request: a JSON schema, a regular expression, a list of texts, or a Lark grammar."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class CacheHintFields(Struct, forbid_unknown_fields=True):
    """Cache hint: what to do with the KV of the first `num_tokens` of the prompt, or for `demote` with what follows."""

    action: HintAction
    num_tokens: int | None = None
    ttl: float | None = None
    priority: int = 0


class FunctionDefinition(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Function that the model may call. `strict`: enforce its JSON schema, `parameters`, as a whole."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """Tool in OpenAI's format: a function."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(Struct, forbid_unknown_fields=True):
    """Name of one of the tools."""

    name: str


class NamedTool(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """`tool_choice` of a function that must be called."""

    function: FunctionName


class AllowedTools(Struct, forbid_unknown_fields=True):
    """Functions that may be called (`auto`), or of which one must be (`required`)."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(Struct, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"):
    """`tool_choice` of some of the tools; the model sees all of them."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


class IgnoredFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of OpenAI's API that have no effect here."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None


class SamplingFields(IgnoredFields, kw_only=True):
    """Fields that chats and completions share."""

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    cache_hints: list[CacheHintFields] | None = None
    reading: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None

    def check(self) -> None:
        """Raise `InvalidRequest` for `stream_options` without `stream=true`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "…", "requires stream=true")

    @property
    def counts_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_usage_on(self) -> bool:
        """Whether each chunk has the usage so far."""
        return self.counts_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def params(
        self, max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """Sampling parameters for the engine, not validated but for `reading`. `defaults`: values of fields that are
        null.
        """
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        seed = None if self.seed in (None, -1) else self.seed % 2**64
        return SamplingParams(
            **{**(defaults or {}), **given, "max_tokens": max_tokens},
            seed=seed,
            logprobs=logprobs,
            reading=None if self.reading is None else reading_from_json(self.reading),
            **self._grammar(),
        )

    def _grammar(self) -> dict[str, Any]:
        structured = self.structured_outputs
        if structured is None:
            return {}
        fields: dict[str, Any] = {}
        if structured.json_object:
            fields["json_schema"] = {"type": "object"}
        if structured.json is not None:
            fields["json_schema"] = structured.json
        return fields | {"regex": structured.regex, "choice": structured.choice, "grammar": structured.grammar}


_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "response_format",
)
"""Fields with the same name in `SamplingParams`"""


class CompletionRequest(SamplingFields, kw_only=True):
    """`POST /v1/completions`. `prompt`: text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    session_id: str | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class PromptFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(PromptFields, kw_only=True):
    """`POST /tokenize`."""

    return_token_strs: bool | None = None


class CacheHintsRequest(PromptFields, kw_only=True):
    """`POST /cache_hints`: hints about a text or chat, without a generation."""

    cache_hints: list[CacheHintFields]
    cache_salt: str | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


# -- responses ------------------------------------------------------------------------------------------------


class CacheHintAnswer(Struct):
    """Answer to a cache hint. `num_tokens`: length of what is kept or demoted. `ttl`: seconds."""

    action: HintAction
    status: HintStatus
    num_tokens: int
    ttl: float | None
    reason: str | None


class PromptTokensDetails(Struct):
    """`cached_tokens`: number of prompt tokens whose KV was cached. `cache_hints`: answers to the request's hints, and
    then to each `cache_control`.
    """

    cached_tokens: int = 0
    cache_hints: list[CacheHintAnswer] | UnsetType = UNSET


class Usage(Struct, kw_only=True):
    """Number of tokens of all prompts and of all choices. `exact`: false if keys were left out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    exact: Literal[False] | UnsetType = UNSET


Reason = FinishReason | Literal["tool_calls"]


class CompletionLogprobs(Struct):
    """Log-probabilities of each token. `text_offset`: index of its first character in the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Struct, kw_only=True):
    """Completion of a prompt, or a delta of it. Choices of prompt `i` have the indices `i * n` to `i * n + n - 1`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(Struct, kw_only=True):
    """Response to a completion request, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class TopLogprob(Struct):
    """One of the likeliest tokens. `bytes`: the UTF-8 bytes that it adds to the content."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    """Log-probability of a token, with the likeliest tokens at its position."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of each token of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    """Function and arguments of a call. `arguments`: JSON, or a part of it in a stream."""

    name: str | UnsetType
    arguments: str


class ToolCall(Struct, kw_only=True):
    """Tool call, or a delta of it; its first delta has `id`, `type` and the name."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCall


class AnswerMessage(Struct, kw_only=True):
    """Message of the assistant."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    """New part of a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """Answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    """New part of an answer to a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(Struct, kw_only=True):
    """Response to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    """Chunk of a streamed response to a chat request."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Struct, kw_only=True):
    """Description of a model. `eos_token_ids`: tokens that end its texts."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "radixgen"
    root: str
    max_model_len: int
    eos_token_ids: list[int]


class ModelList(Struct, kw_only=True):
    """Response of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Struct, kw_only=True):
    """Token ids of a text or chat. `token_strs`: text of each token, if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class CacheHintsResponse(Struct):
    """Answers to cache hints, in their order."""

    cache_hints: list[CacheHintAnswer]


class DetokenizeResponse(Struct):
    """Text of the token ids."""

    prompt: str


def schemas(*types: type[Struct]) -> Mapping[str, Any]:
    """OpenAPI schemas of these types and of all types that they contain."""
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return components
