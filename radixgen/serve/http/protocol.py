"""What HTTP requests and responses hold, as types. Names are OpenAI's; extensions have vLLM's.

What a request may hold and this server does nothing with is listed in `Ignored`; any other field is refused by name.
docs/http.md says what each does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from radixgen.core import FinishReason, InvalidRequest, SamplingParams

Message = Annotated[
    dict[str, Any],
    Meta(
        description="Goes to the chat template: role, content (text, or a list of text parts), tool_calls, …",
        extra_json_schema={
            "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
            "required": ["role"],
        },
    ),
]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk with the usage of the whole request and no choices."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """At most one grammar: a JSON schema, a regular expression, some texts, or a Lark grammar."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class FunctionDefinition(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema, enforced whole where `strict`."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """A function, as OpenAI wraps it."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class FunctionName(Struct, forbid_unknown_fields=True):
    """The name of one of the tools."""

    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    """The one function that must be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class Ignored(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of OpenAI's that change nothing here."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None


class Sampled(Ignored, kw_only=True):
    """What chats and completions have in common."""

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
    return_token_ids: bool | None = None
    skip_special_tokens: bool | None = None

    def check(self) -> None:
        """Raises `InvalidRequest` for options of a stream that is none."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "…", "is for stream=true")

    @property
    def counts_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_usage_on(self) -> bool:
        """Whether each chunk before has the usage up to it."""
        return self.counts_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def params(
        self, max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any] | None = None
    ) -> SamplingParams:
        """As the engine takes them, `defaults` for what is null; `validate` says what is out of its range."""
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        seed = None if self.seed in (None, -1) else self.seed % 2**64
        return SamplingParams(
            **{**(defaults or {}), **given, "max_tokens": max_tokens},
            seed=seed,
            logprobs=logprobs,
            **self._grammar(),
        )

    def _grammar(self) -> dict[str, Any]:
        asked = self.structured_outputs
        if asked is None:
            return {}
        found: dict[str, Any] = {}
        if asked.json_object:
            found["json_schema"] = {"type": "object"}
        if asked.json is not None:
            found["json_schema"] = asked.json
        return found | {"regex": asked.regex, "choice": asked.choice, "grammar": asked.grammar}


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
"""Fields that are those of `SamplingParams`."""


class CompletionRequest(Sampled, kw_only=True):
    """`POST /v1/completions`. `prompt`: text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class ChatRequest(Sampled, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    session_id: str | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /tokenize`: of a text, or of a chat as it would be asked."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


# -- responses ------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct):
    """`cached_tokens`: those whose KV was already there."""

    cached_tokens: int = 0


class Usage(Struct, kw_only=True):
    """Tokens of all prompts, each once, and of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


Reason = FinishReason | Literal["tool_calls"]


class CompletionLogprobs(Struct):
    """Of each token; `text_offset` is its place in the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Struct, kw_only=True):
    """One continuation of one prompt, or what is new of it. The choices of prompt `i` are `i * n` and those after."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionResponse(Struct, kw_only=True):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class TopLogprob(Struct):
    """One of the likeliest tokens; `bytes` is what it adds to the content's UTF-8, parts of characters too."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    """Of one token, with the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Of each token of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    """`arguments`: JSON, or a part of it."""

    name: str | UnsetType
    arguments: str


class ToolCall(Struct, kw_only=True):
    """A call, or what is new of it: then `id`, `type` and the name come first."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCall


class AnswerMessage(Struct, kw_only=True):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    """What is new of a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatResponse(Struct, kw_only=True):
    """All answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    """What is new of some answers."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Model(Struct, kw_only=True):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "radixgen"
    root: str
    max_model_len: int


class ModelList(Struct, kw_only=True):
    """All that is served."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeResponse(Struct, kw_only=True):
    """`token_strs` where it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeResponse(Struct):
    """The text."""

    prompt: str


def schemas(*types: type[Struct]) -> Mapping[str, Any]:
    """OpenAPI's components of these and of all that they hold."""
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return components
