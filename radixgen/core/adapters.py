"""Adapters (LoRA) are not served: a request that names one is refused, and not answered by the base model."""

import re
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
"""Fields and arguments by which clients, front ends and other libraries name an adapter"""
_NAMES_ONE = re.compile(r"(?:.*[^a-z])?(?:[dq]?loras?|adapters?|peft)(?:[^a-z].*)?", re.DOTALL)
_DEEPEST = 4
ADAPTERS: Final = "adapters (LoRA) are not served: merge them into the model's weights"


def names_adapter(field: str) -> bool:
    """Whether a field of this name, in whatever spelling, is where an adapter is named: `loraPath`, `x-lora-name`."""
    if field in ADAPTER_FIELDS:
        return True
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field[:200].replace("LoRA", "Lora"))
    return _NAMES_ONE.fullmatch(parted.lower()) is not None


def refuse_adapters_in(field: str, value: object, depth: int = 0) -> None:
    """Raise `InvalidRequest` where `value`, of a field that is about to be ignored, names an adapter inside."""
    if isinstance(value, dict) and depth < _DEEPEST:
        for name, inner in value.items():
            if isinstance(name, str) and names_adapter(name):
                refuse_adapter(f"{field}.{name}"[:200], inner)
            refuse_adapters_in(f"{field}.{name}"[:200], inner, depth + 1)


def refuse_adapter(field: str, value: object) -> None:
    """Raise `InvalidRequest` where `value` names an adapter: where it is true, or a list in which something is."""
    if any(value) if isinstance(value, list | tuple) else value:
        raise InvalidRequest(field, value, ADAPTERS)


def refuses_adapters(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate `method` to ignore adapter arguments of other libraries that name none, and to refuse all others."""

    @wraps(method)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        for field in sorted(ADAPTER_FIELDS.intersection(options)):
            refuse_adapter(field, options.pop(field))
        return method(*arguments, **options)

    return checked
