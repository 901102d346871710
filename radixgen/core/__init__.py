"""The nouns: requests, parameters, outputs, plans, errors, limits. No torch here."""

from radixgen.core.errors import (
    ContextOverflow,
    DuplicateRequest,
    EngineClosed,
    EngineDead,
    InvalidRequest,
    LimitReached,
    ModelNotFound,
    OutOfSlots,
    PromptTooLong,
    QueueFull,
    RadixgenError,
    RequestFailed,
    UnknownRequest,
    UnsupportedModel,
    check_integer,
)
from radixgen.core.limits import Limits
from radixgen.core.outputs import CompletionOutput, FinishReason, OutputKind, RequestOutput, Stats
from radixgen.core.params import SamplingParams, SamplingState
from radixgen.core.plan import NodeSummary, Plan

__all__ = [
    "CompletionOutput",
    "ContextOverflow",
    "DuplicateRequest",
    "EngineClosed",
    "EngineDead",
    "FinishReason",
    "InvalidRequest",
    "LimitReached",
    "Limits",
    "ModelNotFound",
    "NodeSummary",
    "OutOfSlots",
    "OutputKind",
    "Plan",
    "PromptTooLong",
    "QueueFull",
    "RadixgenError",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "SamplingState",
    "Stats",
    "UnknownRequest",
    "UnsupportedModel",
    "check_integer",
]
