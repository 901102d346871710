"""What the server needs of an engine; `AsyncEngine` has it."""

from collections.abc import AsyncIterator
from typing import Protocol

from radixgen.cache import TokenArray
from radixgen.core import RequestOutput, SamplingParams, Stats
from radixgen.input_processor import InputProcessor
from radixgen.request_loop import Progress


class Outputs(Protocol):
    """What is new of one request, as it comes, text and all; the last one has `finished=True`."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def aclose(self) -> None:
        """Abort the request if it has not ended. May be called twice."""


class Backend(Protocol):
    """Serves one model. Its errors are radixgen's."""

    @property
    def inputs(self) -> InputProcessor:
        """Tokenizer and bounds. Used from several threads."""

    @property
    def model_name(self) -> str: ...

    @property
    def progress(self) -> tuple[int, bool]:
        """How often it did something, and whether there is work. Waits for nothing."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""

    async def open(
        self, prompt: TokenArray, params: SamplingParams, *, priority: int, namespace: str, timeout: float | None
    ) -> Outputs:
        """Queue a request. Raises `InvalidRequest`, `QueueFull`, `EngineClosed`."""

    async def warm_up(self, progress: Progress | None = None) -> None:
        """Do all that makes first requests slow. `progress(done, total)` is called now and then."""

    async def stats(self) -> Stats: ...

    async def reset_prefix_cache(self) -> int:
        """Tokens dropped."""

    async def close(self) -> None: ...
