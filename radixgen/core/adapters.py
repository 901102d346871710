"""Detect and reject requests for adapters (LoRA).

Adapters are not served. A request that names one is rejected instead of being answered by the base model.
"""

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
"""Fields and arguments that clients, front ends and other libraries use to name an adapter."""
_ADAPTER_NAME = re.compile(r"(?:.*[^a-z])?(?:[dq]?loras?|adapters?|peft)(?:[^a-z].*)?", re.DOTALL)
_MAX_DEPTH = 4
ADAPTERS: Final = "adapters (LoRA) are not served: merge them into the model's weights"


def names_adapter(field: str) -> bool:
    """Return whether a field name denotes an adapter, in any spelling: `loraPath`, `x-lora-name`."""
    if field in ADAPTER_FIELDS:
        return True
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field[:200].replace("LoRA", "Lora"))
    return _ADAPTER_NAME.fullmatch(parted.lower()) is not None


def refuse_adapters_in(field: str, value: object, depth: int = 0) -> None:
    """Raise `InvalidRequest` if `value`, of a field that is otherwise ignored, contains an adapter at any depth up to
    4.
    """
    if isinstance(value, dict) and depth < _MAX_DEPTH:
        for name, inner in value.items():
            if isinstance(name, str) and names_adapter(name):
                refuse_adapter(f"{field}.{name}"[:200], inner)
            refuse_adapters_in(f"{field}.{name}"[:200], inner, depth + 1)


def refuse_adapter(field: str, value: object) -> None:
    """Raise `InvalidRequest` if `value` names an adapter: if it is truthy, or a list with a truthy item."""
    if any(value) if isinstance(value, list | tuple) else value:
        raise InvalidRequest(field, value, ADAPTERS)


def refuses_adapters(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate `method` to accept the adapter arguments of other libraries while they are empty, and to reject them
    otherwise.
    """

    @wraps(method)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        for field in sorted(ADAPTER_FIELDS.intersection(options)):
            refuse_adapter(field, options.pop(field))
        return method(*arguments, **options)

    return checked
