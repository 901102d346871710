"""`POST /v1/score`: log-probabilities of continuations of one prompt."""

import asyncio
import math
from dataclasses import dataclass
from functools import partial
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from radixgen.cache import TokenArray
from radixgen.core import InvalidRequest, RequestOutput
from radixgen.engine.output_processor import scores_of
from radixgen.serve.http.auth import Caller, Gate
from radixgen.serve.http.context import Context
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import PromptTokensDetails, Usage
from radixgen.serve.http.score_protocol import ContinuationScore, ScoreRequest, ScoreResponse
from radixgen.serve.http.stream import json_response, while_connected
from radixgen.serve.http.tools import Warn
from radixgen.serve.http.warnings import warner


@dataclass(frozen=True, slots=True)
class _Scoring:
    """A checked request."""

    prompt: TokenArray
    continuations: list[TokenArray]
    namespace: str


def score_routes(context: Context, gate: Gate) -> APIRouter:
    """Route of scores."""
    router = APIRouter()

    @router.post("/v1/score", dependencies=[gate.caller], openapi_extra=described(ScoreRequest, ScoreResponse))
    async def score(request: Request) -> Response:
        """Score continuations of a prompt, which is computed once."""
        open_count, body = await context.preparer.receive(request, ScoreRequest, context.open_limit)
        with open_count:
            prepare = partial(_prepare, context, request.state.caller, body, warner(request))
            scoring = await context.preparer.run(request, prepare)
            open_count.keep(len(scoring.continuations))
            try:
                return json_response(await while_connected(request.receive, _score(context, scoring)))
            finally:
                open_count.leave()

    return router


def _prepare(context: Context, caller: Caller, body: ScoreRequest, warn: Warn) -> _Scoring:
    """Check a request and tokenize it. Raises `InvalidRequest`, and `HTTPError` if the model is not served."""
    context.check_model(body.model)
    most = context.limits.max_prompts
    if not 0 < len(body.continuations) <= most:
        raise InvalidRequest("len(continuations)", len(body.continuations), f"must be 1 to {most}")
    inputs = context.engine.inputs
    prompt = inputs.tokenize(body.prompt, special=body.add_special_tokens is not False, warn=warn)
    continuations = [inputs.tokenize_continuation(continuation) for continuation in body.continuations]
    for continuation in continuations:
        inputs.check_score(prompt, continuation)
    return _Scoring(prompt, continuations, context.namespace(caller, body.cache_salt))


async def _score(context: Context, scoring: _Scoring) -> ScoreResponse:
    """Score all continuations at the same time. Raises `RequestFailed`, `QueueFull`, `EngineClosed`."""
    score_one = partial(context.engine.score_continuation, scoring.prompt, namespace=scoring.namespace)
    tasks = [asyncio.create_task(score_one(continuation)) for continuation in scoring.continuations]
    try:
        outputs = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    pairs = zip(scoring.continuations, outputs, strict=True)
    return ScoreResponse(
        id=f"score-{uuid4().hex}",
        model=context.names[0],
        data=[_entry(index, tokens, output) for index, (tokens, output) in enumerate(pairs)],
        usage=_usage(outputs),
    )


def _entry(index: int, tokens: TokenArray, output: RequestOutput) -> ContinuationScore:
    logprobs = scores_of(output)
    return ContinuationScore(
        index=index, token_ids=tokens.tolist(), token_logprobs=logprobs, logprob=math.fsum(logprobs)
    )


def _usage(outputs: list[RequestOutput]) -> Usage:
    count = sum(output.num_prompt_tokens for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(
        prompt_tokens=count,
        completion_tokens=0,
        total_tokens=count,
        prompt_tokens_details=PromptTokensDetails(cached),
    )
