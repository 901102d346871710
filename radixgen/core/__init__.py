"""The nouns: requests, parameters, outputs, plans, errors, limits. No torch here."""

from radixgen.core.errors import (
    ContextOverflow,
    DuplicateRequest,
    EngineClosed,
    EngineDead,
    GrammarFailed,
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
from radixgen.core.grammar import Allowed, Grammar, GrammarKind, GrammarState
from radixgen.core.limits import Limits
from radixgen.core.outputs import (
    CompletionOutput,
    FinishReason,
    OutputKind,
    RequestOutput,
    SharingEnd,
    SharingReason,
    Stats,
)
from radixgen.core.params import BeamSearchParams, SamplingParams, SamplingState
from radixgen.core.plan import NodeSummary, Plan

__all__ = [
    "Allowed",
    "BeamSearchParams",
    "CompletionOutput",
    "ContextOverflow",
    "DuplicateRequest",
    "EngineClosed",
    "EngineDead",
    "FinishReason",
    "Grammar",
    "GrammarFailed",
    "GrammarKind",
    "GrammarState",
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
    "SharingEnd",
    "SharingReason",
    "Stats",
    "UnknownRequest",
    "UnsupportedModel",
    "check_integer",
]
