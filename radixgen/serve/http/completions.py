"""`POST /v1/completions`."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from uuid import uuid4

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from radixgen.cache import TokenArray
from radixgen.core import CompletionOutput, InvalidRequest, RequestOutput
from radixgen.engine.input_processor import Prompt
from radixgen.serve.http.auth import Caller, Gate
from radixgen.serve.http.cache_hints import hints_of
from radixgen.serve.http.context import Context
from radixgen.serve.http.echo import Echo
from radixgen.serve.http.enforceable_schema import enforceable_format
from radixgen.serve.http.fields import names_of, sent_as
from radixgen.serve.http.generation import Generation, GenerationRequest
from radixgen.serve.http.logprobs import completion_logprobs, end_of, join
from radixgen.serve.http.openapi import described
from radixgen.serve.http.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    Usage,
)
from radixgen.serve.http.stream import EventStream, event, json_response, while_connected
from radixgen.serve.http.warnings import warner

_MAX_TOKENS = 16


def completion_routes(context: Context, gate: Gate) -> APIRouter:
    """Route of completions."""
    router = APIRouter()

    @router.post(
        "/v1/completions", dependencies=[gate.caller], openapi_extra=described(CompletionRequest, CompletionResponse)
    )
    async def completions(request: Request) -> Response:
        """Generate completions of prompts."""
        open_count, body = await context.preparer.receive(request, CompletionRequest, context.open_limit)
        with open_count, sent_as(names_of(body)):
            context.check_model(body.model)
            prepare = partial(_prepare, context, request.state.caller, body, warner(request))
            prepared, echoes = await context.preparer.run(request, prepare)
            grammar = await context.preparer.compile(request, prepared.params)
            generation = await Generation.start(context, prepared, open_count, grammar)
        responder = _CompletionResponder(context, body, generation, echoes)
        if body.stream:
            return EventStream(responder.events(), generation.aclose, send_timeout=context.send_timeout)
        async with generation:
            return json_response(await while_connected(request.receive, responder.whole()))

    return router


def _prepare(
    context: Context, caller: Caller, body: CompletionRequest, warn: Callable[[str], None]
) -> tuple[GenerationRequest, list[Echo]]:
    """Check a request, all but its grammar, and tokenize it. Returns it, and the echo of each prompt if requested.

    Raises `InvalidRequest`.
    """
    _check_served(body)
    inputs = context.engine.inputs
    special = body.add_special_tokens is not False
    given = _prompts(body.prompt, context.limits.max_prompts)
    prompts = [inputs.tokenize(prompt, special=special, warn=warn) for prompt in given]
    longest = max(prompt.size for prompt in prompts)
    max_tokens = context.answer_tokens(_max_tokens(body), longest)
    params = body.params(max_tokens, body.logprobs, context.sampling_defaults)
    params = replace(params, response_format=enforceable_format(params.response_format, warn))
    context.check_reading(params.reading)
    if body.echo:
        params = replace(params, prompt_logprobs=body.logprobs)
    for prompt in prompts:
        inputs.check(prompt, params, compiles=False)
    inputs.check_logprobs(prompts, params, echoes=params.n if body.echo else 1)
    namespace = context.namespace(caller, body.cache_salt)
    hints = tuple(hints_of(context, caller, body.cache_hints))
    if hints and len(prompts) > 1:
        raise InvalidRequest("cache_hints", f"{len(hints)} hints", "require a single prompt")
    priority = context.priority(caller, body.priority)
    request = GenerationRequest(prompts, params, caller.key_id, namespace, priority, hints)
    return request, [_echo(context, *pair) for pair in zip(given, prompts, strict=True)] if body.echo else []


def _check_served(body: CompletionRequest) -> None:
    body.check()
    if body.suffix:
        raise InvalidRequest("suffix", body.suffix, "is not supported")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of", body.best_of, "must equal n: all choices are returned")


def _only_echo(body: CompletionRequest) -> bool:
    """Whether only the prompt and its log-probabilities are requested, and no output."""
    return bool(body.echo) and body.max_tokens == 0


def _max_tokens(body: CompletionRequest) -> int:
    if _only_echo(body):
        return 1  # the engine's minimum; dropped from the response
    return _MAX_TOKENS if body.max_tokens is None else body.max_tokens


def _prompts(given: str | Sequence[str | int | Sequence[int]], most: int) -> list[Prompt]:
    """Prompts of a request: one or several, as text or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest("prompt", given, "must hold at least one token or prompt")
    if all(isinstance(item, int) for item in given):
        return [given]  # type: ignore[list-item]
    if len(given) > most:
        raise InvalidRequest("len(prompt)", len(given), f"at most {most} prompts")
    if not all(isinstance(item, str) for item in given) and not all(isinstance(item, list) for item in given):
        raise InvalidRequest("prompt", given, "must be text, token ids, a list of texts, or a list of lists of ids")
    return list(given)  # type: ignore[arg-type]


class _CompletionResponder:
    """Response to a request, streamed or whole."""

    def __init__(
        self, context: Context, body: CompletionRequest, generation: Generation, echoes: Sequence[Echo]
    ) -> None:
        self._context = context
        self._body = body
        self._generation = generation
        self._echoes = echoes
        self._offsets: dict[int, int] = {}
        """Text offset of each choice, in characters"""
        self._pending = set(range(len(generation.request.prompts) * generation.request.params.n))
        """Choices without an output so far"""
        self._response = partial(
            CompletionResponse, id=f"cmpl-{uuid4().hex}", created=int(time.time()), model=context.names[0]
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events of a streamed response."""
        async for prompt, output in self._outputs():
            choices = self._choices(prompt, output)
            new = [choice for choice in choices if _has_news(choice)]
            if new:
                usage = self._usage() if self._body.counts_usage_on else UNSET
                yield event(self._response(choices=new, usage=usage))
        if self._body.counts_usage:
            yield event(self._response(choices=[], usage=self._usage()))

    async def whole(self) -> CompletionResponse:
        """The response, once all choices have finished."""
        choices: dict[int, CompletionChoice] = {}
        async for prompt, output in self._outputs():
            for new in self._choices(prompt, output):
                choice = choices.setdefault(new.index, new)
                if choice is not new:
                    _extend(choice, new)
        return self._response(choices=[choices[index] for index in sorted(choices)], usage=self._usage())

    async def _outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs with the index of their prompt. With echo and logprobs, they are held until the prompt is scored."""
        held: dict[int, list[RequestOutput]] = {}
        async for prompt, output in self._generation.outputs():
            echo = self._echoes[prompt] if self._echoes and self._body.logprobs is not None else None
            if echo is not None and echo.logprobs is None:
                if output.prompt_logprobs is not None:
                    read = partial(echo.read, output.prompt_logprobs, self._context.texts)
                    await self._context.preparer.finish(self._generation.request.key_id, read)
                elif not output.finished:
                    held.setdefault(prompt, []).append(output)
                    continue
            for earlier in held.pop(prompt, ()):
                yield prompt, earlier
            yield prompt, output

    def _choices(self, prompt: int, output: RequestOutput) -> list[CompletionChoice]:
        """Deltas of a prompt's choices."""
        echo = self._echoes[prompt] if self._echoes else None
        return [self._choice(prompt, completion, echo) for completion in output.outputs]

    def _choice(self, prompt: int, output: CompletionOutput, echo: Echo | None) -> CompletionChoice:
        """Delta of one choice."""
        if _only_echo(self._body):
            output = replace(output, text="", token_ids=[], logprobs=None)
            if output.finish_reason == "stop":
                output = replace(output, finish_reason="length", stop_reason=None)
        index = prompt * self._generation.request.params.n + output.index
        first, ids = index in self._pending, self._body.return_token_ids
        self._pending.discard(index)
        choice = CompletionChoice(
            index=index,
            text=output.text,
            logprobs=self._logprobs(index, output, echo),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if ids else UNSET,
            prompt_token_ids=self._generation.request.prompts[prompt].tolist() if ids and first else UNSET,
        )
        if echo is not None and first:
            echo.begin(choice)
        return choice

    def _logprobs(self, index: int, output: CompletionOutput, echo: Echo | None) -> CompletionLogprobs | None:
        if self._body.logprobs is None or not output.logprobs:
            return None
        begin = end_of(echo.logprobs) if echo is not None and echo.logprobs is not None else 0
        offset = self._offsets.get(index, begin)
        logprobs = completion_logprobs(output.token_ids, output.logprobs, self._context.texts, offset)
        self._offsets[index] = end_of(logprobs)
        return logprobs

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if _only_echo(self._body):
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage


def _has_news(choice: CompletionChoice) -> bool:
    return bool(choice.text or choice.finish_reason or choice.token_ids or choice.logprobs)


def _echo(context: Context, given: Prompt, prompt: TokenArray) -> Echo:
    """Echo of a prompt: its text, decoded if it came as token ids."""
    tokenizer, tokens = context.engine.inputs.tokenizer, prompt.tolist()
    if isinstance(given, str):
        return Echo(given, tokens)
    return Echo("" if tokenizer is None else str(tokenizer.decode(tokens)), tokens)


def _extend(choice: CompletionChoice, new: CompletionChoice) -> None:
    choice.text += new.text
    choice.finish_reason, choice.stop_reason = new.finish_reason, new.stop_reason
    if choice.token_ids is not UNSET and new.token_ids is not UNSET:
        choice.token_ids.extend(new.token_ids)
    choice.logprobs = join(choice.logprobs, new.logprobs)
