"""Default sampling parameters from a model's `generation_config.json`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixgen.core import InvalidRequest, Limits, SamplingParams
from radixgen.model.loader import GENERATION_CONFIG, load_generation_config, read_generation_config

if TYPE_CHECKING:
    from transformers import GenerationConfig

_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields that vLLM uses, and their names in `SamplingParams`."""


def sampling_defaults(model: str | Path, generation_config: str = "auto") -> dict[str, Any]:
    """Return fields of `SamplingParams` for requests that do not set them.

    `generation_config`: `"auto"`, the `generation_config.json` of `model`, if any; `"vllm"`, none; or the path of
    another such file or of its directory.

    Raises `InvalidRequest` for values that requests may not have, and `ModelNotFound`.
    """
    if generation_config == "vllm":
        return {}
    path = Path(generation_config).expanduser()
    if generation_config == "auto":
        config = load_generation_config(model)
    elif path.is_file():
        config = read_generation_config(str(path.parent), path.name)
    elif (path / GENERATION_CONFIG).is_file():
        config = read_generation_config(str(path))
    else:
        limit = f"must be auto, vllm, a file, or a directory with a {GENERATION_CONFIG}"
        raise InvalidRequest("generation_config", generation_config, limit)
    return {} if config is None else _checked(config)


def _checked(config: "GenerationConfig") -> dict[str, Any]:
    values = {ours: value for field, ours in _FIELDS.items() if (value := getattr(config, field, None)) is not None}
    try:
        SamplingParams(**values).validate(Limits(), 2**31)
    except InvalidRequest as error:
        field = next((field for field, ours in _FIELDS.items() if ours == error.field), error.field)
        raise InvalidRequest(f"generation_config.{field}", error.value, error.limit) from None
    return values
