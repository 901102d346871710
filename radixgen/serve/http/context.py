"""What the routes share: the engine, its bounds, and who may what."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radixgen.core import InvalidRequest, Limits
from radixgen.serve.http.admission import Admission, Quota
from radixgen.serve.http.auth import Caller, Keys
from radixgen.serve.http.backend import Backend
from radixgen.serve.http.errors import Refused
from radixgen.serve.http.intake import Intake
from radixgen.serve.http.latest_stats import LatestStats
from radixgen.serve.http.logprobs import TokenTexts
from radixgen.serve.http.metrics import Metrics
from radixgen.serve.http.sessions import Sessions
from radixgen.serve.http.templates import TemplateRenderer


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts. `names`: of the model, the first is told; `created`: seconds of the epoch; `tokenizing`
    counts requests of `/tokenize` and `/detokenize`, apart from requests that generate; `sampling_defaults`:
    fields of `SamplingParams` for requests that do not set them.
    """

    engine: Backend
    names: tuple[str, ...]
    created: int
    keys: Keys
    admission: Admission
    tokenizing: Admission
    waiting: Quota
    intake: Intake
    metrics: Metrics
    stats: LatestStats
    sessions: Sessions
    texts: TokenTexts
    renderer: TemplateRenderer
    request_timeout: float | None
    send_timeout: float
    sampling_defaults: Mapping[str, Any]

    @property
    def limits(self) -> Limits:
        return self.engine.inputs.limits

    @property
    def room(self) -> int:
        """Tokens that a prompt and its answer have together: the last one needs no slot."""
        inputs = self.engine.inputs
        return min(inputs.max_model_len, inputs.kv_tokens + 1)

    def check_model(self, name: str | None) -> None:
        """That it is served here. Raises `Refused`."""
        if name is not None and name not in self.names:
            limit = f"must be one of {', '.join(self.names)}"
            raise Refused(
                404, f"model={name!r}: {limit}", field="model", value=name, limit=limit, code="model_not_found"
            )

    def namespace(self, caller: Caller, cache_salt: str | None) -> str:
        """Where a caller's requests share. Raises `InvalidRequest`."""
        return self.keys.namespace(caller, cache_salt, self.limits)

    def answer_tokens(self, asked: int | None, prompt: int, logprobs: int = 0) -> int:
        """`max_tokens` of a request: what the prompt leaves where `asked` is None, else no more than the pool holds;
        never more than `sampling_defaults` say. The context cuts each answer by itself.

        logprobs: log-probabilities of one position, in all choices; by default there are so few tokens that
            `Limits.max_logprob_values` holds.
        """
        limit = int(self.sampling_defaults.get("max_tokens", self.room))
        if asked is None:
            most = self.limits.max_logprob_values // logprobs if logprobs else self.room
            return max(min(self.room - prompt, most, limit), 1)
        return min(asked, limit, max(self.engine.inputs.kv_tokens + 1 - prompt, 1))

    def priority(self, caller: Caller, asked: int | None) -> int:
        """As vLLM's: the lower goes first. Of several keys only an operator's goes ahead of others. Raises
        `InvalidRequest`.
        """
        lowest = 0 if self.keys.several and not caller.operator else -(2**31) + 1
        if asked is not None and not lowest <= asked < 2**31:
            raise InvalidRequest("priority", asked, f"must be from {lowest} to {2**31 - 1}")
        return -(asked or 0)
