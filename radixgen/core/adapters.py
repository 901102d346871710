"""Adapters (LoRA) are not served: what names one is refused, so that nobody gets the base model's answer for it."""

from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar

from radixgen.core.errors import InvalidRequest

P = ParamSpec("P")
R = TypeVar("R")

ADAPTER_FIELDS: Final = frozenset(
    {
        "adapter",
        "adapter_id",
        "adapter_name",
        "adapter_path",
        "adapter_source",
        "adapters",
        "lora",
        "lora_adapter",
        "lora_adapters",
        "lora_id",
        "lora_int_id",
        "lora_local_path",
        "lora_modules",
        "lora_name",
        "lora_path",
        "lora_paths",
        "lora_request",
        "lora_weight",
        "loras",
        "prompt_adapter_request",
    }
)
"""Where front ends, clients and libraries name one."""
ADAPTERS: Final = "adapters (LoRA) are not served: merge it into the model's weights, and serve those"


def refuse_adapter(field: str, value: object) -> None:
    """Raise `InvalidRequest` unless `value` names no adapter: None, 0, nothing at all, or a list of such."""
    if any(value) if isinstance(value, list | tuple) else value:
        raise InvalidRequest(field, value, ADAPTERS)


def refuses_adapters(method: Callable[P, R]) -> Callable[P, R]:
    """Have `method` take the arguments by which other libraries name adapters, where they name none."""

    @wraps(method)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        for field in sorted(ADAPTER_FIELDS.intersection(options)):
            refuse_adapter(field, options.pop(field))
        return method(*arguments, **options)

    return checked
