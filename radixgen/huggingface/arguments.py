"""Arguments of transformers' `generate`, as sampling parameters; those that an engine does not have are refused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from radixgen.core import BeamSearchParams, InvalidRequest, SamplingParams

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

_REFUSED = (
    "assistant_model",
    "assistant_tokenizer",
    "cache_position",
    "custom_generate",
    "inputs_embeds",
    "logits_processor",
    "logits_to_keep",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "synced_gpus",
)
"""Arguments of `generate` that are no fields of a `GenerationConfig`."""
_OFF: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "cache_implementation": (None, "dynamic"),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "low_memory": (None, False),
    "max_time": (None,),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0.0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}
"""Fields of a `GenerationConfig` that change outputs in ways an engine does not, with the values that do nothing."""
_BEAMS_OFF: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "repetition_penalty": (None, 1.0),
    "stop_strings": (None,),
    "streamer": (None,),
}
"""The same, for beam search alone."""
_PROCESSORS = {
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
}
_CRITERIA = {"EosTokenCriteria", "MaxLengthCriteria"}
_MODEL_INPUTS = {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}
"""Inputs that transformers' `generate` prepares for each call."""
_NAMES = {
    "beam_width": "num_beams",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "eos_token_id",
    "prompt": "input_ids",
}
"""transformers' names of what radixgen calls otherwise."""


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `InvalidRequest` for the first argument of `generate` that an engine does not have."""
    for name in _REFUSED:
        value = arguments.get(name)
        if value is not None and value is not False and not (isinstance(value, list) and not value):
            raise InvalidRequest(name, value, "is not available with radixgen.patch; leave it out")


def check_config(config: "GenerationConfig", **others: Any) -> None:
    """Raise `InvalidRequest` for the first field, or other argument, that asks for what an engine does not do."""
    check_fields(vars(config))
    if (config.num_beams or 1) > 1:
        check_fields(vars(config) | others, _BEAMS_OFF, " with num_beams above 1")


def check_fields(
    fields: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]] = _OFF, where: str = " with radixgen.patch"
) -> None:
    """Raise `InvalidRequest` for the first of `fields` that has another value than those of `off`."""
    for name, allowed in off.items():
        value = fields.get(name)
        if not any(value is choice or value == choice for choice in allowed):
            raise InvalidRequest(name, value, f"must be {' or '.join(map(repr, allowed))}{where}")


def check_prepared(
    processors: "LogitsProcessorList", criteria: "StoppingCriteriaList", inputs: Mapping[str, Any]
) -> None:
    """Raise `InvalidRequest` for anything that transformers' `generate` has prepared and an engine does not have."""
    for field, items, known in (
        ("logits_processor", processors, _PROCESSORS),
        ("stopping_criteria", criteria, _CRITERIA),
    ):
        for item in items:
            if type(item).__name__ not in known:
                raise InvalidRequest(field, type(item).__name__, f"must be of {', '.join(sorted(known))}")
    for name, value in inputs.items():
        if name not in _MODEL_INPUTS and value is not None:
            raise InvalidRequest(name, value, "is not available with radixgen.patch; leave it out")


def end_token_ids(config: "GenerationConfig") -> list[int]:
    """Return the end tokens that transformers prepared; negative ones, which no model has, are left out."""
    ends = config._eos_token_tensor
    return [] if ends is None else [token for token in ends.tolist() if token >= 0]


def sampling_params(config: "GenerationConfig", prompt_len: int, seed: int) -> SamplingParams:
    """Return the parameters of one sequence. `prompt_len`: tokens of the padded prompts."""
    max_tokens, min_tokens = _lengths(config, prompt_len)
    options: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        options = {
            "temperature": _or(config.temperature, 1.0),
            "top_k": _or(config.top_k, 0),
            "top_p": _or(config.top_p, 1.0),
            "min_p": _or(config.min_p, 0.0),
        }
    return SamplingParams(
        **options,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        repetition_penalty=_or(config.repetition_penalty, 1.0),
        stop_token_ids=end_token_ids(config),
        ignore_eos=True,
        seed=seed,
    )


def beam_search_params(config: "GenerationConfig", prompt_len: int) -> BeamSearchParams:
    """As `sampling_params`, for `num_beams` above 1."""
    max_tokens, min_tokens = _lengths(config, prompt_len)
    return BeamSearchParams(
        beam_width=config.num_beams,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        length_penalty=_or(config.length_penalty, 1.0),
        early_stopping=_or(config.early_stopping, False),
        stop_token_ids=end_token_ids(config),
        ignore_eos=True,
    )


def unpadded(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the tokens of each row of `input_ids` `[rows, tokens]` without its padding on the left, where `mask` is 0.

    Raises `InvalidRequest`.
    """
    ids: list[list[int]] = input_ids.tolist()
    if mask is None:
        return ids
    if mask.shape != input_ids.shape:
        raise InvalidRequest("attention_mask.shape", tuple(mask.shape), f"must be {tuple(input_ids.shape)}")
    seen = mask.bool().cpu()
    for row, keep in enumerate(seen):
        if not keep[-1] or bool((keep[:-1] & ~keep[1:]).any()):
            limit = "must be zeros, then ones: pad on the left (padding_side='left')"
            raise InvalidRequest(f"attention_mask[{row}]", mask[row].tolist(), limit)
    return [row[len(row) - int(count) :] for row, count in zip(ids, seen.sum(1), strict=True)]


def draw_seeds(count: int) -> list[int]:
    """Draw a seed for each sequence from torch's generator, so that `torch.manual_seed` makes them reproducible."""
    seeds: list[int] = torch.randint(2**63 - 1, (count,)).tolist()
    return seeds


@contextmanager
def transformers_names() -> Iterator[None]:
    """Let errors name arguments as transformers does."""
    try:
        yield
    except InvalidRequest as error:
        field = error.field
        for ours, theirs in _NAMES.items():
            field = field.replace(ours, theirs)
        if field == error.field:
            raise
        raise InvalidRequest(field, error.value, error.limit) from error


def _lengths(config: "GenerationConfig", prompt_len: int) -> tuple[int, int]:
    """Return the most and the fewest tokens to generate."""
    most = config.max_length - prompt_len
    return most, min(max((config.min_length or 0) - prompt_len, 0), most)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
