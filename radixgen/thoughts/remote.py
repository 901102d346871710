"""`RemoteEngine`: an engine behind radixgen's HTTP server, for searches."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from radixgen.core import (
    CompletionOutput,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    RequestOutput,
    SamplingParams,
)
from radixgen.core.outputs import PromptTokens

if TYPE_CHECKING:
    from httpx import AsyncClient

_FULL_SECONDS = 0.1
"""Time to wait before a full queue is tried again"""
_STRUCTURED = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Fields of `SamplingParams` with a grammar, and their names in `structured_outputs`"""
_LOCAL = {"logprobs", "prompt_logprobs", "end_token_ids"}
"""Fields of `SamplingParams` that searches do not use, or that the server sets"""


@dataclass(frozen=True, slots=True)
class RemoteEngine:
    """Engine behind radixgen's HTTP server at `url`, which `search` and `sample` can use. Needs httpx.

    url: address of the server, without `/v1`.
    api_key: key of the caller, if the server requires one.
    model: name of the model; by default the server's.
    timeout: seconds that a request may take; None: no limit.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    timeout: float | None = None

    @asynccontextmanager
    async def connect(self, namespace: str) -> AsyncIterator["RemoteBackend"]:
        """Context manager of a connection. `namespace`: cache salt of all requests."""
        from httpx import AsyncClient

        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        async with AsyncClient(base_url=self.url.rstrip("/"), headers=headers, timeout=self.timeout) as client:
            common = {"model": self.model, "cache_salt": namespace or None}
            backend = RemoteBackend(client, {name: value for name, value in common.items() if value is not None})
            await backend.read_model()
            yield backend


class RemoteBackend:
    """`SearchBackend` on a server."""

    def __init__(self, client: "AsyncClient", common: dict[str, Any]) -> None:
        """common: fields of all requests that generate or score."""
        self._client = client
        self._common = common
        self._model = {name: value for name, value in common.items() if name == "model"}
        self._eos_token_ids: frozenset[int] = frozenset()
        self._computed = 0

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    async def read_model(self) -> None:
        """Read the end tokens of the model. Raises `InvalidRequest`, `RequestFailed`."""
        (card, *_) = (await self._send("GET", "/v1/models"))["data"]
        self._eos_token_ids = frozenset(card["eos_token_ids"])

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        body = {"prompt": text, "add_special_tokens": special, **self._model}
        tokens: list[int] = (await self._send("POST", "/tokenize", body))["tokens"]
        return tokens

    async def decode(self, token_ids: Sequence[int]) -> str:
        return str((await self._send("POST", "/detokenize", {"tokens": list(token_ids), **self._model}))["prompt"])

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        body = {"prompt": list(prompt), "return_token_ids": True, **_fields_of(params), **self._common}
        answer = await self._send("POST", "/v1/completions", body)
        outputs = [
            CompletionOutput(
                choice["index"], choice["text"], choice["token_ids"], choice["finish_reason"], choice["stop_reason"]
            )
            for choice in answer["choices"]
        ]
        return self._output(answer, list(prompt), outputs)

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        body = {"prompt": list(prompt), "continuations": [list(continuation)], **self._common}
        answer = await self._send("POST", "/v1/score", body)
        (entry,) = answer["data"]
        output = self._output(answer, [*prompt, *continuation][: answer["usage"]["prompt_tokens"]], [])
        pairs = zip(entry["token_ids"], entry["token_logprobs"], strict=True)
        output.prompt_logprobs = [{token: logprob} for token, logprob in pairs]
        return output

    async def computed_rows(self) -> int:
        """Number of tokens that the requests of this search computed; at most, where they shared prompts."""
        return self._computed

    def _output(self, answer: dict[str, Any], prompt: list[int], outputs: list[CompletionOutput]) -> RequestOutput:
        usage = answer["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._computed += usage["total_tokens"] - cached
        exact = usage.get("exact", True)
        return RequestOutput(answer["id"], PromptTokens(prompt), outputs, True, cached, exact=exact)

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, again while the queue is full. Raises `InvalidRequest`, `RequestFailed`."""
        while True:
            answer = await self._client.request(method, path, json=body)
            if answer.status_code != 429:
                break
            await asyncio.sleep(_FULL_SECONDS)
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            error = {"message": f"{path}: status {answer.status_code}"}
        if answer.status_code == 400 and error.get("param"):
            kind = PromptTooLong if error.get("code") == "context_length_exceeded" else InvalidRequest
            raise kind(error["param"], error.get("value"), str(error.get("limit") or error["message"]))
        raise RequestFailed(str(error["message"]))


def _fields_of(params: SamplingParams) -> dict[str, Any]:
    """Fields of a completion request with these parameters, so that no default of the server counts."""
    given = {item.name: getattr(params, item.name) for item in fields(params) if item.name not in _LOCAL}
    structured = {_STRUCTURED[name]: given.pop(name) for name in _STRUCTURED}
    reading = given.pop("reading")
    structured = {name: value for name, value in structured.items() if value is not None}
    body = {name: value for name, value in given.items() if value is not None and value != ()}
    if structured:
        body["structured_outputs"] = structured
    if reading is not None:
        body["reading"] = {"policy": reading.policy, **asdict(reading)}
    return body
