"""Bodies of `/v1/score`."""

from typing import Literal

from msgspec import Struct

from radixgen.serve.http.protocol import Usage


class ScoreRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/score`: continuations of a prompt, each as text or token ids."""

    prompt: str | list[int]
    continuations: list[str | list[int]]
    model: str | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None


class ContinuationScore(Struct, kw_only=True):
    """Natural-log probability of a continuation after the prompt, and of each of its tokens after those before it."""

    index: int
    token_ids: list[int]
    token_logprobs: list[float]
    logprob: float


class ScoreResponse(Struct, kw_only=True):
    """Scores of continuations, in their order. `usage` counts the prompt once for each."""

    id: str
    object: Literal["score"] = "score"
    model: str
    data: list[ContinuationScore]
    usage: Usage
