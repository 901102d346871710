"""`RequestSubmitter`: checks requests and makes them, for `RequestLoop` to run."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np

from radixgen.cache import TokenArray
from radixgen.core import (
    CacheHint,
    DuplicateRequest,
    HintResult,
    InvalidRequest,
    OutputKind,
    RequestOutput,
    Reuse,
    SamplingParams,
    check_integer,
    check_reuse,
)
from radixgen.engine.core import EngineCore
from radixgen.engine.input_processor import (
    InputProcessor,
    Messages,
    Params,
    Prompt,
    as_params,
    as_prompts,
    chat_tokens,
)
from radixgen.engine.output_processor import scores_of
from radixgen.engine.request_loop import Progress, RequestLoop

_OUTPUT_KINDS = ("cumulative", "delta", "final")
_SCORING = SamplingParams(max_tokens=1, prompt_logprobs=0)


class RequestSubmitter:
    """Submits requests for `Engine`, whose methods of the same names describe arguments and errors."""

    def __init__(
        self, inputs: InputProcessor, core: EngineCore, loop: RequestLoop, clock: Callable[[], float], *, share: bool
    ) -> None:
        self._inputs = inputs
        self._core = core
        self._loop = loop
        self._clock = clock
        self._share = share
        self._reuse: Reuse = "segments" if core.scheduler.takes_runs else "prefix"

    def submit(
        self,
        prompt: Prompt,
        params: Params | None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
        cache_hints: Seq[CacheHint] = (),
        hint_owner: str | None = None,
        reuse: Reuse | None = None,
    ) -> str:
        self._loop.begin_call()
        params = params if params is not None else SamplingParams()
        tokens = self._inputs.tokenize(prompt)
        self._inputs.check(tokens, params)
        self._inputs.check_place(namespace, priority)
        self._check_id(request_id)
        if output_kind not in _OUTPUT_KINDS:
            raise InvalidRequest("output_kind", output_kind, f"must be one of {', '.join(_OUTPUT_KINDS)}")
        hints = self._inputs.check_hints(cache_hints, hint_owner)
        reuse = self._check_reuse(reuse)
        deadline = self._clock() + self._inputs.check_seconds("timeout", timeout)
        return self.submit_checked(
            tokens,
            params,
            output_kind,
            request_id=request_id,
            priority=priority,
            namespace=namespace,
            deadline=deadline,
            hints=hints,
            hint_owner=hint_owner,
            reuse=reuse,
        )

    def submit_score(self, prompt: Prompt, continuation: Prompt, *, request_id: str | None, namespace: str) -> str:
        self._loop.begin_call()
        tokens, rest = self._inputs.tokenize(prompt), self._inputs.tokenize_continuation(continuation)
        self._inputs.check_score(tokens, rest)
        self._inputs.check_place(namespace)
        self._check_id(request_id)
        return self._submit_score(tokens, rest, request_id=request_id, namespace=namespace)

    def generate(
        self, prompts: Prompt | Seq[Prompt], params: Params | Seq[Params] | None, progress: Progress | None
    ) -> list[RequestOutput]:
        self._loop.begin_call()
        batch = as_prompts(prompts)
        each = as_params(params, len(batch))
        tokens = [self._inputs.tokenize(prompt) for prompt in batch]
        for ids, own in zip(tokens, each, strict=True):
            self._inputs.check(ids, own)
        submits = [partial(self.submit_checked, ids, own) for ids, own in zip(tokens, each, strict=True)]
        return self._loop.serve(submits, progress)

    def chat(self, messages: Messages | Seq[Messages], params: Params | None) -> list[RequestOutput]:
        self._loop.begin_call()
        many = isinstance(messages, Seq) and bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if many else [messages]
        each = [self._inputs.for_chat(own) for own in as_params(params, len(conversations))]
        return self.generate([chat_tokens(self._inputs.tokenizer, one) for one in conversations], each, None)

    def score(
        self, prompt: Prompt, continuations: Seq[Prompt], namespace: str, reuse: Reuse | None
    ) -> list[list[float]]:
        self._loop.begin_call()
        tokens = self._inputs.tokenize(prompt)
        each = [self._inputs.tokenize_continuation(text) for text in as_prompts(continuations, "continuations")]
        for rest in each:
            self._inputs.check_score(tokens, rest)
        self._inputs.check_place(namespace)
        options = {"namespace": namespace, "reuse": self._check_reuse(reuse)}
        submits = [partial(self._submit_score, tokens, rest, **options) for rest in each]
        return [scores_of(output) for output in self._loop.serve(submits)]

    def apply_hints(
        self, prompt: Prompt, hints: Seq[CacheHint], namespace: str, hint_owner: str | None
    ) -> tuple[HintResult, ...]:
        self._loop.begin_call()
        tokens = self._inputs.tokenize(prompt)
        checked = self._inputs.check_hints(hints, hint_owner)
        self._inputs.check_place(namespace)
        path, own = self._core.place_of(tokens, None, namespace)
        owner = namespace if hint_owner is None else hint_owner
        with self._core.guard:
            return self._core.hints.apply(checked, path, own, owner, self._clock())

    def fork(self, request_id: str, n: int) -> list[str]:
        self._loop.begin_call()
        request = self._loop.live(request_id)
        if request.search is not None:
            raise InvalidRequest("request_id", request_id, "a beam search is not forked")
        check_integer("n", n, 1, self._core.limits.max_n)
        self._core.require_room(n, n * request.prompt.size)
        return self._loop.fork(request, n)

    def submit_checked(self, tokens: TokenArray, params: Params, kind: OutputKind = "final", **options: Any) -> str:
        """Queue a checked request. Takes the options of `EngineCore.make`."""
        grammar = self._inputs.grammar(params)
        options.setdefault("reuse", self._reuse)
        request = self._core.make(tokens, params, share=self._share, grammar=grammar, arrived=self._clock(), **options)
        return self._loop.submit(request, kind)

    def _submit_score(self, tokens: TokenArray, rest: TokenArray, **options: Any) -> str:
        return self.submit_checked(np.concatenate([tokens, rest]), _SCORING, score_from=tokens.size - 1, **options)

    def _check_reuse(self, reuse: Reuse | None) -> Reuse:
        """Return what a request reuses; by default what the engine does."""
        if reuse is None:
            return self._reuse
        check_reuse(reuse)
        if reuse == "segments" and self._reuse != "segments":
            raise InvalidRequest("reuse", reuse, "the engine was started without reuse='segments'")
        return reuse

    def _check_id(self, request_id: str | None) -> None:
        if request_id is None:
            return
        self._inputs.check_name("request_id", request_id)
        if request_id in self._core.requests:
            raise DuplicateRequest("request_id", request_id, "a request with this id has not ended")
