"""The nouns: requests, parameters, outputs, plans, errors, limits. No torch here."""

from radixgen.core.errors import (
    DuplicateRequest,
    EngineClosed,
    InvalidRequest,
    ModelNotFound,
    OutOfSlots,
    PromptTooLong,
    RadixgenError,
    UnknownRequest,
    UnsupportedModel,
)
from radixgen.core.limits import Limits
from radixgen.core.outputs import CompletionOutput, FinishReason, RequestOutput, Stats
from radixgen.core.params import SamplingParams
from radixgen.core.plan import NodeSummary, Plan

__all__ = [
    "CompletionOutput",
    "DuplicateRequest",
    "EngineClosed",
    "FinishReason",
    "InvalidRequest",
    "Limits",
    "ModelNotFound",
    "NodeSummary",
    "OutOfSlots",
    "Plan",
    "PromptTooLong",
    "RadixgenError",
    "RequestOutput",
    "SamplingParams",
    "Stats",
    "UnknownRequest",
    "UnsupportedModel",
]
