"""What a search needs of an engine, as coroutines; by an engine that the caller holds, or by a thread's."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from radixgen.core import InvalidRequest, QueueFull, RequestFailed, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from radixgen.async_engine import AsyncEngine
    from radixgen.engine import Engine

T = TypeVar("T")

_FULL_SECONDS = 0.01
"""How long to wait before a full queue is tried again."""


@runtime_checkable
class Server(Protocol):
    """Answers requests. One that is cancelled leaves nothing behind. A full queue is waited for."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens."""
        ...

    async def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Raises `InvalidRequest`."""
        ...

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        """The finished request. Raises `InvalidRequest`."""
        ...

    async def score(self, prompt: Sequence[int], continuation: Sequence[int]) -> RequestOutput:
        """The finished request, for `scores_of`. Raises `InvalidRequest`."""
        ...

    async def computed_rows(self) -> int:
        """Rows that went through the model since the engine began."""
        ...

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""
        ...


@asynccontextmanager
async def serving(engine: "Engine | AsyncEngine | Server", namespace: str) -> AsyncIterator[Server]:
    """A server over either engine; another is taken as it is. Raises `InvalidRequest`."""
    from radixgen.async_engine import AsyncEngine
    from radixgen.engine import Engine

    if isinstance(engine, AsyncEngine):
        yield ThreadedServer(engine, namespace)
    elif isinstance(engine, Engine):
        server = SteppedServer(engine, namespace)
        try:
            yield server
        finally:
            await server.close()
    elif isinstance(engine, Server):
        yield engine
    else:
        raise InvalidRequest("engine", engine, "must be an Engine or an AsyncEngine")


class ThreadedServer:
    """An `AsyncEngine`, whose own thread steps."""

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
                return await self._engine.score_one(prompt, continuation, namespace=self._namespace)
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


class SteppedServer:
    """An `Engine` that belongs to this thread. It is stepped while anything of it is unfinished, and between two steps
    everything else in the event loop goes on. What other callers' requests produce meanwhile is kept for them.
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
        """Stop stepping. Nobody may wait any more."""
        assert not self._waiting
        await drop([self._stepping])

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
        """Step and hand out, until nothing is unfinished; where the engine fails, everyone who waits is told."""
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


def completed(output: RequestOutput) -> RequestOutput:
    """`output`, of which every sequence ended by itself. Raises `RequestFailed`."""
    for one in output.outputs:
        if one.finish_reason in ("abort", "error"):
            raise RequestFailed(f"request {output.request_id} failed: {one.stop_reason}")
    return output


async def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function or of a coroutine function."""
    result = function(*arguments)
    return await result if inspect.isawaitable(result) else result


async def together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; where one fails, the others are cancelled before its error goes on."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await drop(tasks)


async def drop(tasks: "Sequence[asyncio.Task[T]]") -> None:
    """Cancel what still runs, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
