"""Interface of the engines that a search can use, with implementations for `Engine` and `AsyncEngine`."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from radixgen.core import InvalidRequest, QueueFull, RequestFailed, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.thoughts.remote import RemoteEngine

T = TypeVar("T")

_FULL_SECONDS = 0.01
"""Time to wait before a full queue is tried again"""


@runtime_checkable
class SearchBackend(Protocol):
    """Engine that serves requests. Cancelled requests are aborted; if the queue is full, requests wait."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """End tokens of the model."""
        ...

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokenize text. `special`: whether to add special tokens. Raises `InvalidRequest`."""
        ...

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        """Generate, and return the whole output. Raises `InvalidRequest`."""
        ...

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        """Score a continuation, and return the output for `scores_of`. Raises `InvalidRequest`."""
        ...

    async def computed_rows(self) -> int:
        """Number of rows that the model has computed since the engine started."""
        ...

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""
        ...


@asynccontextmanager
async def serving(
    engine: "Engine | AsyncEngine | RemoteEngine | SearchBackend", namespace: str
) -> AsyncIterator[SearchBackend]:
    """Context manager that wraps an engine; a `SearchBackend` is used as it is. Raises `InvalidRequest`."""
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.thoughts.remote import RemoteEngine

    if isinstance(engine, AsyncEngine):
        yield ThreadedBackend(engine, namespace)
    elif isinstance(engine, Engine):
        backend = SteppedBackend(engine, namespace)
        try:
            yield backend
        finally:
            await backend.close()
    elif isinstance(engine, RemoteEngine):
        async with engine.connect(namespace) as remote:
            yield remote
    elif isinstance(engine, SearchBackend):
        yield engine
    else:
        raise InvalidRequest("engine", engine, "must be an Engine, an AsyncEngine or a RemoteEngine")


class ThreadedBackend:
    """`SearchBackend` on an `AsyncEngine`, which steps in its own thread."""

    def __init__(self, engine: "AsyncEngine", namespace: str) -> None:
        self._engine = engine
        self._namespace = namespace

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._engine.inputs.eos_token_ids

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        tokens: list[int] = (await self._engine.tokenize(text, special=special)).tolist()
        return tokens

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        while True:
            try:
                return await self._generate(prompt, params)
            except QueueFull:
                await asyncio.sleep(_FULL_SECONDS)

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        while True:
            try:
                return await self._engine.score_continuation(prompt, continuation, namespace=self._namespace)
            except QueueFull:
                await asyncio.sleep(_FULL_SECONDS)

    async def computed_rows(self) -> int:
        return (await self._engine.stats()).computed_rows

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self._engine.decode(token_ids)

    async def _generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        outputs = self._engine.generate(prompt, params, namespace=self._namespace, cumulative=True)
        async with aclosing(outputs):
            return [output async for output in outputs][-1]


class SteppedBackend:
    """`SearchBackend` on an `Engine` of this thread.

    A task of the event loop steps it while it has unfinished requests. Outputs of other callers' requests are kept.
    """

    def __init__(self, engine: "Engine", namespace: str) -> None:
        self._engine = engine
        self._namespace = namespace
        self._waiting: dict[str, asyncio.Future[RequestOutput]] = {}
        self._stepping = asyncio.create_task(self._step())

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._engine.inputs.eos_token_ids

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        tokens: list[int] = self._engine.tokenize(text, special=special).tolist()
        return tokens

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        submit = partial(self._engine.submit, namespace=self._namespace, output_kind="final")
        return await self._finish(partial(submit, prompt, params))

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        submit = partial(self._engine.submit_score, namespace=self._namespace)
        return await self._finish(partial(submit, prompt, continuation))

    async def computed_rows(self) -> int:
        return self._engine.stats().computed_rows

    async def decode(self, token_ids: Sequence[int]) -> str:
        return self._engine.decode(token_ids)

    async def close(self) -> None:
        """Stop stepping. No request may be open."""
        assert not self._waiting
        await cancel_all([self._stepping])

    async def _finish(self, submit: Callable[[], str]) -> RequestOutput:
        request_id = await self._submit(submit)
        future: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        if self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        try:
            return await future
        finally:
            if self._waiting.pop(request_id, None) is not None:
                self._engine._loop.abandon([request_id])

    async def _submit(self, submit: Callable[[], str]) -> str:
        while True:
            try:
                return submit()
            except QueueFull:
                if self._stepping.done():
                    raise
                await asyncio.sleep(0)

    async def _step(self) -> None:
        """Step and deliver outputs until all requests have finished. If the engine fails, all of them fail."""
        try:
            while self._waiting or self._engine.num_unfinished_requests:
                for output in self._engine._loop.receive(self._waiting):
                    if output.finished:
                        self._settle(self._waiting.pop(output.request_id), output)
                await asyncio.sleep(0)
        except Exception as error:
            for request_id in list(self._waiting):
                self._settle(self._waiting[request_id], error)

    def _settle(self, future: "asyncio.Future[RequestOutput]", result: RequestOutput | Exception) -> None:
        if future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def check_completed(output: RequestOutput) -> RequestOutput:
    """Return `output`. Raises `RequestFailed` if a sequence was aborted or failed."""
    for sequence in output.outputs:
        if sequence.finish_reason in ("abort", "error"):
            raise RequestFailed(f"request {output.request_id} failed: {sequence.stop_reason}")
    return output


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function or a coroutine function."""
    result = function(*arguments)
    return await result if inspect.isawaitable(result) else result


async def gather_all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results. If one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: "Sequence[asyncio.Task[T]]") -> None:
    """Cancel tasks and wait for them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
