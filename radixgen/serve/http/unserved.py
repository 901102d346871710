"""Unsupported request fields, which are accepted with neutral values, as clients send them by default."""

from collections.abc import Callable
from typing import Any

from radixgen.core import InvalidRequest
from radixgen.core.adapters import names_adapter, refuse_adapter, refuse_adapters_in

_EMPTY: tuple[Any, ...] = ([], {}, "")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": _EMPTY,
    "best_of": (1,),
    "cache_hit_threshold": (),
    "container": (),
    "conversation": (),
    "chat_template": (),
    "chat_template_content_format": ("auto", "string", "openai"),
    "chat_template_kwargs": _EMPTY,
    "continue_final_message": (False,),
    "data_parallel_rank": (),
    "defer_loading": (False,),
    "detokenize": (True,),
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (False,),
    "documents": _EMPTY,
    "early_stopping": (False,),
    "ec_transfer_params": _EMPTY,
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": _EMPTY,
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "inference_geo": (),
    "kv_transfer_params": _EMPTY,
    "length_penalty": (1,),
    "logits_processors": _EMPTY,
    "logprob_token_ids": (),
    "max_completion_tokens": (),
    "max_tool_calls": (),
    "mcp_servers": _EMPTY,
    "media_io_kwargs": _EMPTY,
    "messages": (),
    "mm_processor_kwargs": _EMPTY,
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_embeds": _EMPTY,
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "request_id": (),
    "return_mm_kwargs": (True, False),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "session_id": (),
    "spaces_between_special_tokens": (True, False),
    "speed": ("standard",),
    "stream_interval": (1,),
    "structural_tag": (),
    "suffix": _EMPTY,
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": _EMPTY,
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": _EMPTY,
    "watermarking": (False,),
    "web_search_options": (),
    "whitespace_pattern": (),
}
"""Unsupported fields of OpenAI and vLLM, each with its neutral values besides null"""


def is_known(name: str) -> bool:
    """Whether OpenAI or vLLM define the field."""
    return name in _NEUTRAL


def is_neutral(name: str, value: object) -> bool:
    """Whether OpenAI or vLLM define the field, and `value` has no effect."""
    known = _NEUTRAL.get(name)
    if known is None:
        return False
    if value is None:
        return True
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in known)


def drop_unserved(
    holder: dict[str, Any], served: tuple[str, ...], path: str, ignore: Callable[[str], None] | None
) -> None:
    """Remove unsupported fields with neutral values from an object of a body.

    holder: the object, at `path` of the body.
    served: names of the supported fields.
    ignore: if given, called with the names of all other unsupported fields, which are removed too.

    Raises `InvalidRequest` for a field that names an adapter, and for a field that OpenAI or vLLM define.
    """
    for name in [name for name in holder if name not in served]:
        field = f"{path}.{name}".strip(".")
        if names_adapter(name):
            refuse_adapter(field, holder[name])
        elif not is_neutral(name, holder[name]):
            if not is_known(name) or name == "vllm_xargs":
                refuse_adapters_in(field, holder[name])
            if ignore is not None:
                ignore(field)
            elif is_known(name):
                raise InvalidRequest(field, holder[name], f"is not supported: leave it out{_hint(name)}")
            else:
                continue
        del holder[name]


def _hint(name: str) -> str:
    values = _NEUTRAL[name]
    return f", or send {' or '.join(map(repr, values))}" if values and values is not _EMPTY else ""
