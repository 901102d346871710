"""Interface of the engines that the HTTP server can serve, such as `AsyncEngine`."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from radixgen.cache import TokenArray
from radixgen.core import CacheHint, HintResult, RequestOutput, SamplingParams, Stats
from radixgen.engine.input_processor import InputProcessor
from radixgen.engine.request_loop import Progress


class RequestStream(Protocol):
    """Outputs of one request with their text, as they arrive; the last one has `finished=True`."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def aclose(self) -> None:
        """Abort the request unless it has finished. May be called twice."""


class EngineBackend(Protocol):
    """Engine or engines that serve one model. Raises radixgen's errors."""

    @property
    def inputs(self) -> InputProcessor:
        """Tokenizer and limits. Used from several threads."""

    @property
    def model_name(self) -> str:
        """Name of the model."""

    @property
    def progress(self) -> tuple[int, bool]:
        """A counter of progress, and whether there is work. Does not block."""

    @property
    def closed(self) -> bool:
        """Whether new requests are rejected."""

    async def open(
        self,
        prompt: TokenArray,
        params: SamplingParams,
        *,
        priority: int,
        namespace: str,
        timeout: float | None,
        cache_hints: Sequence[CacheHint] = (),
        hint_owner: str | None = None,
    ) -> RequestStream:
        """Queue a request. Raises `InvalidRequest`, `QueueFull`, `EngineClosed`."""

    async def score_continuation(
        self, prompt: TokenArray, continuation: TokenArray, *, namespace: str
    ) -> RequestOutput:
        """Score a checked continuation; `scores_of` reads the result. Raises `InvalidRequest` if it cannot."""

    async def apply_hints(
        self, prompt: TokenArray, hints: Sequence[CacheHint], *, namespace: str, hint_owner: str | None
    ) -> Sequence[HintResult]:
        """Apply cache hints to what is cached of `prompt`. Returns an answer to each. Raises `InvalidRequest`."""

    async def warm_up(self, progress: Progress | None = None) -> None:
        """Compile and capture what would slow down first requests. Calls `progress(done, total)` as it goes."""

    async def stats(self) -> Stats:
        """Statistics of the engine."""

    async def reset_prefix_cache(self) -> int:
        """Drop the cached prefixes that nothing locks. Returns the number of dropped tokens."""

    async def close(self) -> None:
        """Abort open requests and release all resources."""
