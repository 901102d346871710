"""radixgen: exact language-model serving in which a shared prefix is stored, computed and read once."""

from importlib import import_module
from typing import TYPE_CHECKING

from radixgen.core import (
    BeamSearchParams,
    CacheHint,
    CompletionOutput,
    ContextOverflow,
    DuplicateRequest,
    EngineClosed,
    EngineDead,
    HintResult,
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
    SegmentReuse,
    SharingEnd,
    Stats,
    UnknownRequest,
    UnsupportedModel,
)
from radixgen.core.settings import wait_without_spinning
from radixgen.version import VERSION

if TYPE_CHECKING:
    from radixgen.attention import TreeAttention
    from radixgen.chat.async_conversation import AsyncConversation
    from radixgen.chat.conversation import Conversation
    from radixgen.chat.history import HistoryBreak
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.huggingface.patch import patch, unpatch
    from radixgen.serve.zmq.client import AsyncClient, Client

__version__ = VERSION

_LAZY = {
    "AsyncClient": "radixgen.serve.zmq.client",
    "AsyncConversation": "radixgen.chat.async_conversation",
    "AsyncEngine": "radixgen.engine.async_engine",
    "Client": "radixgen.serve.zmq.client",
    "Conversation": "radixgen.chat.conversation",
    "Engine": "radixgen.engine.engine",
    "HistoryBreak": "radixgen.chat.history",
    "TreeAttention": "radixgen.attention",
    "patch": "radixgen.huggingface.patch",
    "unpatch": "radixgen.huggingface.patch",
}

__all__ = [
    "AsyncClient",
    "AsyncConversation",
    "AsyncEngine",
    "BeamSearchParams",
    "CacheHint",
    "Client",
    "CompletionOutput",
    "ContextOverflow",
    "Conversation",
    "DuplicateRequest",
    "Engine",
    "EngineClosed",
    "EngineDead",
    "HintResult",
    "HistoryBreak",
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
    "SegmentReuse",
    "SharingEnd",
    "Stats",
    "TreeAttention",
    "UnknownRequest",
    "UnsupportedModel",
    "__version__",
    "patch",
    "unpatch",
]


def __getattr__(name: str) -> object:
    """Torch is imported when the first name that needs it is."""
    if name in _LAZY:
        wait_without_spinning()
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'radixgen' has no attribute {name!r}")
