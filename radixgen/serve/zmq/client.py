"""`Client` and `AsyncClient`: generate on workers, with token ids in and out."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

from msgspec import convert

from radixgen.core import (
    CacheHint,
    HintResult,
    RadixgenError,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    merge_outputs,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.serve.zmq import wire, wire_params
from radixgen.serve.zmq.client_base import BaseClient, ClientOptions, ClientRequest, Tokens, result_of
from radixgen.serve.zmq.front import FrontEnd, RemoteWorker
from radixgen.serve.zmq.inbox import CoroutineInbox, Courier, ThreadInbox

_WINDOW = 2_048
"""Maximum number of open requests of one `generate`"""


class Client(BaseClient):
    """Client of one or several workers, for use from threads. Takes and returns token ids, not text.

    ```python
    with Client() as client:
        print("radixgen worker --handshake", client.address)
        for output in client.generate([[1, 2, 3], [1, 2, 4]], SamplingParams(max_tokens=8)):
            print(output.outputs[0].token_ids)
    ```

    A request goes to the worker with index `worker`, by default to the one with the longest cached prefix of its prompt
    unless that is much busier than others (`radixgen.serve.routing`). A request that the worker rejects has the finish
    reason `error` and the reason as `stop_reason`. If a worker dies, its requests raise `EngineDead`.
    """

    def wait(self) -> None:
        """Wait until the workers are connected. Raises `EngineDead` after `timeout` seconds."""
        self._front.wait(self._workers, self._timeout)

    @refuses_adapters
    def generate(
        self, prompts: Sequence[Tokens], params: SamplingParams | None = None, **options: Unpack[ClientOptions]
    ) -> list[RequestOutput]:
        """Generate completions for a batch of prompts, given as token ids. Returns their outputs in order.

        Takes the options of `ClientOptions`; so do `stream` and `AsyncClient`.
        """
        streams: list[Stream] = []
        outputs: list[RequestOutput] = []
        try:
            for prompt in prompts:
                streams.append(self.stream(prompt, params, **options))
                if len(streams) - len(outputs) >= _WINDOW:
                    outputs.append(streams[len(outputs)].whole())
            while len(outputs) < len(streams):
                outputs.append(streams[len(outputs)].whole())
        finally:
            for stream in streams[len(outputs) :]:
                stream.close()
        return outputs

    @refuses_adapters
    def stream(
        self, prompt: Tokens, params: SamplingParams | None = None, **options: Unpack[ClientOptions]
    ) -> "Stream":
        """Generate for one prompt; iterate over its outputs. Closing the stream early aborts the request."""
        self._wait_once()
        request, message = self._make_request(prompt, params, **options)
        stream = Stream(self._front, request)
        self._front.add(request.worker, message, stream.inbox, request.blocks)
        return stream

    def fork(self, stream: "Stream", n: int = 1) -> "list[Stream]":
        """Fork a request as `Engine.fork`; the first output of each fork holds all tokens generated so far."""
        streams = [Stream(self._front, request) for request in self._make_forks(stream.request, n)]
        worker = stream.request.worker
        for fork in streams:
            self._front.expect(worker, fork.request_id, fork.inbox)
        try:
            self._call(worker, "fork", stream.request_id, [fork.request_id for fork in streams])
        except BaseException:
            for fork in streams:
                self._front.forget(worker, fork.request_id)
            raise
        return streams

    @refuses_adapters
    def score(
        self,
        prompt: Tokens,
        continuations: Sequence[Tokens],
        *,
        cache_salt: str | None = None,
        worker: int | None = None,
    ) -> list[list[float]]:
        """As `Engine.score`."""
        self._wait_once()
        chosen = self._front.choose(worker, self._front.blocks(prompt, cache_salt))
        scores: list[list[float]] = self._call(
            chosen, "score", list(prompt), [list(tokens) for tokens in continuations], cache_salt
        )
        return scores

    def call(self, method: str, *arguments: Any, worker: int | None = None) -> Any:
        """Call a utility of a worker; docs/wire.md lists them. Raises `RequestFailed`, `EngineDead`."""
        self._wait_once()
        return self._call(self._select_worker(worker), method, *arguments)

    def pin(
        self,
        prompt: Tokens,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        ttl: float | None = None,
        worker: int | None = None,
    ) -> int | None:
        """As `Engine.pin`, on one worker. Closing the client releases its pins."""
        pin: int | None = self.call("pin", list(prompt), cache_salt, priority, ttl, worker=worker)
        return pin

    def unpin(self, pin: int, *, worker: int | None = None) -> bool:
        """As `Engine.unpin`, on the worker of the pin."""
        return bool(self.call("unpin", pin, worker=worker))

    def close(self) -> None:
        """Abort open requests; pending calls raise `EngineClosed`. May be called twice."""
        self._front.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait_once(self) -> None:
        if not self._waited:
            self.wait()
            self._waited = True

    def _call(self, worker: RemoteWorker, method: str, *arguments: Any) -> Any:
        inbox = ThreadInbox()
        call_id = self._front.call(worker, method, arguments, inbox)
        try:
            return result_of(inbox.get(self._timeout))
        except BaseException:
            self._front.forget_call(worker, call_id)
            raise


class Stream(Iterator[RequestOutput]):
    """Outputs of one request, as they arrive. Closed when it is garbage-collected."""

    def __init__(self, front: FrontEnd, request: ClientRequest) -> None:
        self.inbox = ThreadInbox()
        self.request = request
        self._front = front

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def __next__(self) -> RequestOutput:
        if self.request.finished:
            raise StopIteration
        try:
            item = self.inbox.get()
        except BaseException as error:
            self.request.finished = self.request.finished or isinstance(error, RadixgenError)
            raise
        assert isinstance(item, wire.Output)
        return self.request.decode(item)

    def whole(self) -> RequestOutput:
        """Merge all remaining outputs into one. Raises `RequestFailed` if there are none."""
        if self.request.finished:
            raise RequestFailed(f"request {self.request_id} was read to its end")
        return merge_outputs(list(self))

    def abort(self) -> None:
        """Abort the request; it still gets a last output."""
        self._front.abort(self.request.worker, [self.request_id])

    def close(self) -> None:
        """Abort the request unless it has finished, and drop further outputs."""
        self.request.close(self._front)

    def __del__(self) -> None:
        self.close()


class AsyncClient(BaseClient):
    """`Client` for the coroutines of one event loop."""

    _courier: Courier | None = None

    async def wait(self) -> None:
        """As `Client.wait`."""
        await asyncio.to_thread(self._front.wait, self._workers, self._timeout)
        self._waited = True

    @refuses_adapters
    async def generate(
        self, prompt: Tokens, params: SamplingParams | None = None, **options: Unpack[ClientOptions]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs, the last one with `finished=True`. Closing the generator early aborts the request."""
        outputs = await self.open(prompt, params, **options)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    @refuses_adapters
    async def open(
        self,
        prompt: Tokens,
        params: SamplingParams | None = None,
        *,
        beside: "AsyncStream | None" = None,
        **options: Unpack[ClientOptions],
    ) -> "AsyncStream":
        """Send a request, and return a stream of its outputs.

        beside: a stream with the same prompt, whose worker is used.
        """
        if not self._waited:
            await self.wait()
        sibling = None if beside is None else beside.request
        request, message = self._make_request(prompt, params, beside=sibling, **options)
        inbox = self._inbox()
        self._front.add(request.worker, message, inbox, request.blocks)
        return AsyncStream(self._front, request, inbox)

    async def call(self, method: str, *arguments: Any, worker: int | None = None) -> Any:
        """As `Client.call`."""
        if not self._waited:
            await self.wait()
        inbox, selected = self._inbox(), self._select_worker(worker)
        call_id = self._front.call(selected, method, arguments, inbox)
        try:
            return result_of(await asyncio.wait_for(inbox.get(), self._timeout))
        except BaseException as error:
            self._front.forget_call(selected, call_id)
            if isinstance(error, TimeoutError):
                raise RequestFailed(f"no answer within {self._timeout:g} seconds") from None
            raise

    @refuses_adapters
    async def score(
        self,
        prompt: Tokens,
        continuations: Sequence[Tokens],
        *,
        cache_salt: str | None = None,
        worker: int | None = None,
    ) -> list[list[float]]:
        """As `Engine.score`."""
        if not self._waited:
            await self.wait()
        index = self._front.choose(worker, self._front.blocks(prompt, cache_salt)).index
        scores: list[list[float]] = await self.call(
            "score", list(prompt), [list(tokens) for tokens in continuations], cache_salt, worker=index
        )
        return scores

    async def apply_hints(
        self,
        prompt: Tokens,
        hints: Sequence[CacheHint],
        *,
        cache_salt: str | None = None,
        hint_owner: str | None = None,
        worker: int | None = None,
    ) -> tuple[HintResult, ...]:
        """As `Engine.apply_hints`, on the worker that a request with this prompt would go to."""
        if not self._waited:
            await self.wait()
        index = self._front.choose(worker, self._front.blocks(prompt, cache_salt)).index
        own = wire_params.from_hints(hints)
        answers = await self.call("apply_hints", list(prompt), own, cache_salt, hint_owner, worker=index)
        return wire_params.to_results(convert(answers, list[wire.HintAnswer]))

    async def close(self) -> None:
        """As `Client.close`."""
        await asyncio.to_thread(self._front.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _inbox(self) -> CoroutineInbox:
        if self._courier is None:
            self._courier = Courier(asyncio.get_running_loop())
        return CoroutineInbox(self._courier)


class AsyncStream(AsyncIterator[RequestOutput]):
    """Outputs of one request, as they arrive. Raises `EngineDead` if the worker dies.

    Close it with `aclose`, which aborts a request that has not finished; so does garbage collection.
    """

    def __init__(self, front: FrontEnd, request: ClientRequest, inbox: CoroutineInbox) -> None:
        self._front = front
        self.request = request
        self._inbox = inbox

    async def __anext__(self) -> RequestOutput:
        if self.request.finished:
            raise StopAsyncIteration
        try:
            item = await self._inbox.get()
        except RadixgenError:
            self.request.finished = True
            raise
        assert isinstance(item, wire.Output)
        return self.request.decode(item)

    async def aclose(self) -> None:
        """Abort the request unless it has finished. May be called twice."""
        self.request.close(self._front)

    def __del__(self) -> None:
        self.request.close(self._front)
