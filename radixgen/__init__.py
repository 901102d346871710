"""radixgen: exact language-model serving in which a shared prefix is stored, computed and read once."""

from importlib import import_module
from typing import TYPE_CHECKING

from radixgen.core import (
    BeamSearchParams,
    CompletionOutput,
    DuplicateRequest,
    EngineClosed,
    EngineDead,
    InvalidRequest,
    LimitReached,
    Limits,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
    RadixgenError,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    SharingEnd,
    Stats,
    UnknownRequest,
    UnsupportedModel,
)
from radixgen.version import VERSION

if TYPE_CHECKING:
    from radixgen.async_engine import AsyncEngine
    from radixgen.attention import TreeAttention
    from radixgen.engine import Engine

__version__ = VERSION

_LAZY = {
    "AsyncEngine": "radixgen.async_engine",
    "Engine": "radixgen.engine",
    "TreeAttention": "radixgen.attention",
}

__all__ = [
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "DuplicateRequest",
    "Engine",
    "EngineClosed",
    "EngineDead",
    "InvalidRequest",
    "LimitReached",
    "Limits",
    "ModelNotFound",
    "PromptTooLong",
    "QueueFull",
    "RadixgenError",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "SharingEnd",
    "Stats",
    "TreeAttention",
    "UnknownRequest",
    "UnsupportedModel",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Torch is imported when the first name that needs it is."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'radixgen' has no attribute {name!r}")
