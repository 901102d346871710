"""`Client` and `AsyncClient`: drive workers as a front end does, tokens in and tokens out."""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

from radixgen.core import (
    CompletionOutput,
    InvalidRequest,
    Limits,
    PromptTokens,
    RadixgenError,
    RequestFailed,
    RequestOutput,
    SamplingParams,
    check_integer,
    check_texts,
    merge_outputs,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.serve import wire
from radixgen.serve.balancer import Blocks
from radixgen.serve.endpoint import Curve
from radixgen.serve.front import Engine, FrontEnd

Item = wire.Output | wire.Reply | RadixgenError
Tokens = Sequence[int]

_WINDOW = 2_048
"""Requests of one `generate` that are open at the same time."""


@dataclass(eq=False)
class _Asked:
    """A request that was sent: what its outputs are read by."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    engine: Engine
    blocks: Blocks
    """What it is routed by"""
    eos: frozenset[int]
    cached: int = 0
    cumulative_logprob: float = 0.0
    finished: bool = False

    def leave(self, front: FrontEnd) -> None:
        """Abort the request if it has not ended, and hear no more of it."""
        if not self.finished:
            self.finished = True
            with suppress(RadixgenError):
                front.abort(self.engine, [self.request_id])
                front.forget(self.engine, self.request_id)

    def read(self, output: wire.Output) -> RequestOutput:
        """What is new, as the engine itself would have told it."""
        logprobs = prompt_logprobs = None
        if output.prefill_stats is not None:
            self.cached = output.prefill_stats.num_cached_tokens
        if self.params.logprobs is not None:
            logprobs = wire.unpack_logprobs(output.new_logprobs) if output.new_logprobs else []
            self.cumulative_logprob += sum(next(iter(one.values())) for one in logprobs)
        if output.new_prompt_logprobs is not None:
            prompt_logprobs = [None, *wire.unpack_logprobs(output.new_prompt_logprobs)]
        finish, stop = output.finish_reason, output.stop_reason
        if finish == 0 and stop in self.eos:
            stop = None
        self.finished = finish is not None
        one = CompletionOutput(
            index=0,
            text="",
            token_ids=output.new_token_ids,
            finish_reason=None if finish is None else wire.FINISH[finish],
            stop_reason=stop,
            cumulative_logprob=self.cumulative_logprob if logprobs is not None else None,
            logprobs=logprobs,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt_tokens=PromptTokens(self.prompt),
            outputs=[one],
            finished=self.finished,
            num_cached_tokens=self.cached,
            prompt_logprobs=prompt_logprobs,
        )


class _Queue:
    """An inbox for a thread that waits."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        self._items.put(item)

    def get(self, timeout: float | None = None) -> wire.Output | wire.Reply:
        """The next item. Raises the error that came, and `RequestFailed` where nothing came in time."""
        try:
            item = self._items.get(timeout=timeout)
        except queue.Empty:
            raise RequestFailed(f"no answer within {timeout:g} seconds") from None
        if isinstance(item, RadixgenError):
            raise item
        return item


class _Courier:
    """Brings what the front end's thread has for coroutines to their event loop, one wake for many items."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._called = False

    def bring(self, inbox: "asyncio.Queue[Item]", item: Item) -> None:
        self._items.append((inbox, item))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._items:
            inbox, item = self._items.popleft()
            inbox.put_nowait(item)


class _Waiter:
    """An inbox for a coroutine."""

    def __init__(self, courier: _Courier) -> None:
        self._courier = courier
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        self._courier.bring(self._items, item)

    async def get(self) -> wire.Output | wire.Reply:
        item = await self._items.get()
        if isinstance(item, RadixgenError):
            raise item
        return item


class _BaseClient:
    """What the two clients have in common."""

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int = 1,
        curve: Curve | None = None,
        insecure_tcp: bool = False,
        limits: Limits | None = None,
        timeout: float = 60.0,
        own_salts: bool = False,
    ) -> None:
        """
        address: where workers say HELLO, `ipc://…` or `tcp://…`; by default ipc in a new folder. What a worker is to be
            given is `client.address`.
        workers: how many are waited for before the first request is sent.
        curve: keys, without which TCP is loopback only, unless `insecure_tcp`.
        timeout: seconds to wait for the workers, and for the answer to a call.
        own_salts: requests with a cache salt are routed by what is cached, too; they share with no other front end's.

        Raises `InvalidRequest`, `InsecureEndpoint`.
        """
        check_integer("workers", workers, 1, 2**16)
        self._front = FrontEnd(
            address, curve=curve, insecure_tcp=insecure_tcp, limits=limits or Limits(), own_salts=own_salts
        )
        self._workers = workers
        self._timeout = timeout
        self._tag = uuid4().hex[:12]
        self._waited = False

    @property
    def address(self) -> str:
        """What to give to `radixgen worker --handshake`."""
        return self._front.address

    @property
    def workers(self) -> dict[int, wire.Ready]:
        """The workers that are there, by index, and what they said of themselves."""
        return {one.index: one.ready for one in self._front.live() if one.ready is not None}

    def fail(self, error: RadixgenError) -> None:
        """Close, with `error` for whoever waits. May be called from any thread."""
        self._front.close(error)

    def _ask(
        self,
        prompt: Tokens,
        params: SamplingParams | None,
        cache_salt: str | None,
        priority: int,
        worker: int | None,
        beside: _Asked | None = None,
    ) -> tuple[_Asked, wire.Add]:
        """A request, and what is sent of it. `beside`: one of the same prompt, for the same worker. Raises
        `InvalidRequest`, `EngineDead`.
        """
        params = params if params is not None else SamplingParams()
        check_texts("cache_salt", cache_salt)
        if beside is None:
            tokens = [int(token) for token in prompt]
            blocks = self._front.blocks(tokens, cache_salt)
            engine = self._front.choose(worker, blocks)
        else:
            tokens, blocks, engine = beside.prompt, beside.blocks, beside.engine
        eos = engine.ready.eos_token_ids if engine.ready is not None else []
        sampling = wire.from_params(params, eos)
        request_id = self._new_id()
        add = wire.Add(request_id, tokens, sampling_params=sampling, cache_salt=cache_salt, priority=-priority)
        unseen = frozenset([*eos, *params.end_token_ids]) - frozenset(params.stop_token_ids)
        return _Asked(request_id, tokens, params, engine, blocks, unseen), add

    def _forks(self, asked: _Asked, n: int) -> list[_Asked]:
        check_integer("n", n, 1, self._front.limits.max_n)
        # The first output of a fork has all tokens so far, and their log-probabilities.
        fork = replace(asked, finished=False, cumulative_logprob=0.0)
        return [replace(fork, request_id=self._new_id()) for _ in range(n)]

    def _one(self, worker: int | None) -> Engine:
        """The worker of this index, or the only one. Raises `InvalidRequest`, `EngineDead`."""
        if worker is None and len(self._front.live()) > 1:
            raise InvalidRequest("worker", worker, f"must be one of {sorted(self.workers)}")
        return self._front.choose(worker)

    def _new_id(self) -> str:
        return f"{self._tag}-{self._front.new_serial()}"


class Client(_BaseClient):
    """Drives one worker or several, from threads. Token ids in, token ids out; text is its caller's.

    ```python
    with Client() as client:
        print("radixgen worker --handshake", client.address)
        for output in client.generate([[1, 2, 3], [1, 2, 4]], SamplingParams(max_tokens=8)):
            print(output.outputs[0].token_ids)
    ```

    A request goes to the `worker` of that index, or where the longest prefix of its prompt is, unless that worker is
    much busier (`radixgen.serve.routing`). What a worker refuses ends with `error`, and its `stop_reason` says why;
    where a worker dies, its requests raise `EngineDead`.
    """

    def wait(self) -> None:
        """Wait until the workers are there. Raises `EngineDead` where they don't come in time."""
        self._front.wait(self._workers, self._timeout)

    @refuses_adapters
    def generate(
        self,
        prompts: Sequence[Tokens],
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        worker: int | None = None,
    ) -> list[RequestOutput]:
        """Serve prompts, given as token ids, as one burst; whole outputs in their order.

        cache_salt: requests share their prefixes with those of the same salt alone.
        priority: higher goes first.
        """
        streams: list[Stream] = []
        outputs: list[RequestOutput] = []
        try:
            for prompt in prompts:
                streams.append(self.stream(prompt, params, cache_salt=cache_salt, priority=priority, worker=worker))
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
        self,
        prompt: Tokens,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        worker: int | None = None,
    ) -> "Stream":
        """Serve one prompt and iterate over what is new. Closing the stream early aborts the request."""
        self._wait_once()
        asked, add = self._ask(prompt, params, cache_salt, priority, worker)
        stream = Stream(self._front, asked)
        self._front.add(asked.engine, add, stream.inbox, asked.blocks)
        return stream

    def fork(self, stream: "Stream", n: int = 1) -> "list[Stream]":
        """As `Engine.fork`: the first output of each tells what was generated before."""
        streams = [Stream(self._front, asked) for asked in self._forks(stream.asked, n)]
        engine = stream.asked.engine
        for one in streams:
            self._front.expect(engine, one.request_id, one.inbox)
        try:
            self._call(engine, "fork", stream.request_id, [one.request_id for one in streams])
        except BaseException:
            for one in streams:
                self._front.forget(engine, one.request_id)
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
        engine = self._front.choose(worker, self._front.blocks(prompt, cache_salt))
        found: list[list[float]] = self._call(
            engine, "score", list(prompt), [list(c) for c in continuations], cache_salt
        )
        return found

    def call(self, method: str, *arguments: Any, worker: int | None = None) -> Any:
        """Call a utility of a worker; docs/wire.md lists them. Raises `RequestFailed`, `EngineDead`."""
        self._wait_once()
        return self._call(self._one(worker), method, *arguments)

    def pin(
        self,
        prompt: Tokens,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        ttl: float | None = None,
        worker: int | None = None,
    ) -> int | None:
        """As `Engine.pin`, on one worker; the pins of a client that is closed are let go of."""
        pin: int | None = self.call("pin", list(prompt), cache_salt, priority, ttl, worker=worker)
        return pin

    def unpin(self, pin: int, *, worker: int | None = None) -> bool:
        """As `Engine.unpin`, on the worker that it was pinned on."""
        return bool(self.call("unpin", pin, worker=worker))

    def close(self) -> None:
        """Open requests are aborted by the workers, and whoever waits gets `EngineClosed`. May be called twice."""
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

    def _call(self, engine: Engine, method: str, *arguments: Any) -> Any:
        inbox = _Queue()
        call = self._front.call(engine, method, arguments, inbox)
        try:
            return _result(inbox.get(self._timeout))
        except BaseException:
            self._front.forget_call(engine, call)
            raise


class Stream(Iterator[RequestOutput]):
    """What is new of one request, as it comes. One that is dropped is closed."""

    def __init__(self, front: FrontEnd, asked: _Asked) -> None:
        self.inbox = _Queue()
        self.asked = asked
        self._front = front

    @property
    def request_id(self) -> str:
        return self.asked.request_id

    def __next__(self) -> RequestOutput:
        if self.asked.finished:
            raise StopIteration
        try:
            item = self.inbox.get()
        except BaseException as error:
            self.asked.finished = self.asked.finished or isinstance(error, RadixgenError)
            raise
        assert isinstance(item, wire.Output)
        return self.asked.read(item)

    def whole(self) -> RequestOutput:
        """All that is left, as one output. Raises `RequestFailed` where nothing is."""
        if self.asked.finished:
            raise RequestFailed(f"request {self.request_id} was read to its end")
        return merge_outputs(list(self))

    def abort(self) -> None:
        """Ask for the request's end; its last output still comes."""
        self._front.abort(self.asked.engine, [self.request_id])

    def close(self) -> None:
        """Abort the request if it has not ended, and hear no more of it."""
        self.asked.leave(self._front)

    def __del__(self) -> None:
        self.close()


class AsyncClient(_BaseClient):
    """As `Client`, for the coroutines of one event loop."""

    _courier: _Courier | None = None

    async def wait(self) -> None:
        """As `Client.wait`."""
        await asyncio.to_thread(self._front.wait, self._workers, self._timeout)
        self._waited = True

    @refuses_adapters
    async def generate(
        self,
        prompt: Tokens,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        worker: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield what is new, the last one with `finished=True`. Leaving the generator early aborts the request."""
        outputs = await self.open(prompt, params, cache_salt=cache_salt, priority=priority, worker=worker)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    @refuses_adapters
    async def open(
        self,
        prompt: Tokens,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
        priority: int = 0,
        worker: int | None = None,
        beside: "AsyncStream | None" = None,
    ) -> "AsyncStream":
        """As `generate`, but the request is sent, or refused, before anything is received.

        beside: a stream of the same prompt, to whose worker this one goes too.
        """
        if not self._waited:
            await self.wait()
        asked, add = self._ask(prompt, params, cache_salt, priority, worker, None if beside is None else beside.asked)
        inbox = self._inbox()
        self._front.add(asked.engine, add, inbox, asked.blocks)
        return AsyncStream(self._front, asked, inbox)

    async def call(self, method: str, *arguments: Any, worker: int | None = None) -> Any:
        """As `Client.call`."""
        if not self._waited:
            await self.wait()
        inbox, engine = self._inbox(), self._one(worker)
        call = self._front.call(engine, method, arguments, inbox)
        try:
            return _result(await asyncio.wait_for(inbox.get(), self._timeout))
        except BaseException as error:
            self._front.forget_call(engine, call)
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
        found: list[list[float]] = await self.call(
            "score", list(prompt), [list(c) for c in continuations], cache_salt, worker=index
        )
        return found

    async def close(self) -> None:
        """As `Client.close`."""
        await asyncio.to_thread(self._front.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _inbox(self) -> _Waiter:
        if self._courier is None:
            self._courier = _Courier(asyncio.get_running_loop())
        return _Waiter(self._courier)


class AsyncStream(AsyncIterator[RequestOutput]):
    """What is new of one request, as it comes. Leave it by `aclose`, which aborts a request that has not ended; so
    does dropping it.

    Where the worker dies, `EngineDead` is raised.
    """

    def __init__(self, front: FrontEnd, asked: _Asked, inbox: _Waiter) -> None:
        self._front = front
        self.asked = asked
        self._inbox = inbox

    async def __anext__(self) -> RequestOutput:
        if self.asked.finished:
            raise StopAsyncIteration
        try:
            item = await self._inbox.get()
        except RadixgenError:
            self.asked.finished = True
            raise
        assert isinstance(item, wire.Output)
        return self.asked.read(item)

    async def aclose(self) -> None:
        """May be called twice."""
        self.asked.leave(self._front)

    def __del__(self) -> None:
        self.asked.leave(self._front)


def _result(item: wire.Output | wire.Reply) -> Any:
    """What a call returned. Raises `RequestFailed`."""
    assert isinstance(item, wire.Reply)
    if item.failure_message is not None:
        raise RequestFailed(item.failure_message)
    return item.result[1] if item.result is not None else None
