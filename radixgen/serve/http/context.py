"""State that the routes share: the engine, its limits, and access control."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radixgen.core import InvalidRequest, Limits
from radixgen.core.reading import ReadingPolicy
from radixgen.serve.http.auth import Caller, Keys
from radixgen.serve.http.backend import EngineBackend
from radixgen.serve.http.errors import HTTPError
from radixgen.serve.http.latest_stats import LatestStats
from radixgen.serve.http.logprobs import TokenTexts
from radixgen.serve.http.metrics import Metrics
from radixgen.serve.http.open_limit import OpenLimit, Quota
from radixgen.serve.http.request_preparer import RequestPreparer
from radixgen.serve.http.response_store import ResponseStore
from radixgen.serve.http.sessions import Sessions
from radixgen.serve.http.templates import TemplateRenderer


@dataclass(frozen=True, slots=True)
class Context:
    """Components of one server.

    names: names of the model; responses contain the first.
    created: start time, in seconds since the epoch.
    tokenizing: limit on requests to `/tokenize` and `/detokenize`.
    sampling_defaults: default fields of `SamplingParams`.
    readings: names of the reading policies that requests may name.
    """

    engine: EngineBackend
    names: tuple[str, ...]
    created: int
    keys: Keys
    open_limit: OpenLimit
    tokenizing: OpenLimit
    waiting: Quota
    preparer: RequestPreparer
    metrics: Metrics
    stats: LatestStats
    sessions: Sessions
    responses: ResponseStore
    texts: TokenTexts
    renderer: TemplateRenderer
    request_timeout: float | None
    send_timeout: float
    sampling_defaults: Mapping[str, Any]
    readings: frozenset[str]

    @property
    def limits(self) -> Limits:
        return self.engine.inputs.limits

    @property
    def room(self) -> int:
        """Maximum length of a prompt plus its answer, in tokens; the last token needs no slot."""
        inputs = self.engine.inputs
        return min(inputs.max_model_len, inputs.kv_tokens + 1)

    def check_model(self, name: str | None) -> None:
        """Raise `HTTPError` unless the model is served here."""
        if name is not None and name not in self.names:
            limit = f"must be one of {', '.join(self.names)}"
            raise HTTPError(
                404, f"model={name!r}: {limit}", field="model", value=name, limit=limit, code="model_not_found"
            )

    def check_reading(self, reading: ReadingPolicy | None) -> None:
        """Raise `InvalidRequest` unless requests may read by this policy."""
        if reading is None or reading.exact or reading.policy in self.readings:
            return
        allowed = f"must be one of {', '.join(sorted(self.readings))}" if self.readings else "is not allowed"
        raise InvalidRequest("reading.policy", reading.policy, f"{allowed} on this server (--allow-reading)")

    def namespace(self, caller: Caller, cache_salt: str | None) -> str:
        """Namespace of a caller's requests with this cache salt. Raises `InvalidRequest`."""
        return self.keys.namespace(caller, cache_salt, self.limits)

    def answer_tokens(self, requested: int | None, prompt_len: int, logprobs: int = 0) -> int:
        """`max_tokens` for the engine, at most that of `sampling_defaults`.

        requested: `max_tokens` of the request, limited to what the pool holds. If None, all that the prompt leaves, but
            no more than `Limits.max_logprob_values` allows.
        prompt_len: tokens of the prompt.
        logprobs: number of log-probabilities per position, of all choices together.
        """
        limit = int(self.sampling_defaults.get("max_tokens", self.room))
        if requested is None:
            most = self.limits.max_logprob_values // logprobs if logprobs else self.room
            return max(min(self.room - prompt_len, most, limit), 1)
        return min(requested, limit, max(self.engine.inputs.kv_tokens + 1 - prompt_len, 1))

    def priority(self, caller: Caller, requested: int | None) -> int:
        """Priority for the engine, from a request's, where as in vLLM lower values go first.

        If there are several keys, only operators may use negative values. Raises `InvalidRequest`.
        """
        lowest = 0 if self.keys.several and not caller.operator else -(2**31) + 1
        if requested is not None and not lowest <= requested < 2**31:
            raise InvalidRequest("priority", requested, f"must be from {lowest} to {2**31 - 1}")
        return -(requested or 0)
