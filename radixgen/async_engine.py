"""`AsyncEngine`: one thread steps the engine; coroutines submit to it and receive from it."""

import asyncio
import gc
import logging
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from collections.abc import Sequence as Seq
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from uuid import uuid4

import numpy as np

from radixgen.async_conversation import AsyncConversation
from radixgen.cache import RadixTree, TokenArray
from radixgen.core import (
    BeamSearchParams,
    EngineClosed,
    EngineDead,
    InvalidRequest,
    OutputKind,
    RequestOutput,
    SamplingParams,
    Stats,
    UnknownRequest,
    joined,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.dialogue import Options
from radixgen.engine import PRELOADING, Engine, Progress, scores_of
from radixgen.input_processor import InputProcessor, Params, Prompt, as_prompts

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STALL_SECONDS = 0.01
"""How long to wait for a command where requests are open and none can run."""


class AsyncEngine:
    """Serves an `Engine` to the coroutines of any number of event loops. It owns the engine and closes it. What the
    process holds when it begins is left out of garbage collections until it ends (`gc.freeze`).

    ```python
    async with AsyncEngine(Engine("smollm2")) as engine:
        async for delta in engine.generate("Hello", SamplingParams(max_tokens=8)):
            print(delta.outputs[0].text, end="")
    ```

    Back-pressure: a request beyond the engine's `Limits` is refused at once with `QueueFull`; what a slow reader
    has not taken is merged into one output, so that it holds no more memory than its answer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._closing = False
        self._end: EngineClosed | None = None
        """Why no more commands are taken. Written once, under the gate."""
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="radixgen-engine", daemon=True)
        self._thread.start()

    # -- requests -----------------------------------------------------------------------------------------

    @refuses_adapters
    async def generate(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        timeout: float | None = None,
        cumulative: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield what is new since the last output (or, `cumulative`, everything so far), the last one with
        `finished=True`. Leaving the generator early aborts the request.

        The arguments are those of `Engine.submit`, and so are the errors. Raises `EngineDead` where the engine
        fails as a whole.
        """
        outputs = await self.open(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            namespace=namespace,
            timeout=timeout,
            cumulative=cumulative,
        )
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    @refuses_adapters
    async def open(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        timeout: float | None = None,
        cumulative: bool = False,
    ) -> "AsyncOutputs":
        """As `generate`, but the request is queued, or refused, before anything is received."""
        request_id = request_id or self._new_id()
        if isinstance(prompt, np.ndarray) and not (isinstance(params, SamplingParams) and params.structured):
            tokens = self._engine.tokenize(prompt)  # quick, and requests are queued in the order of their calls
        else:
            tokens = await asyncio.to_thread(self._prepare, prompt, params)
        kind: OutputKind = "cumulative" if cumulative else "delta"

        def submit() -> None:
            self._engine.submit(
                tokens,
                params,
                request_id=request_id,
                priority=priority,
                namespace=namespace,
                timeout=timeout,
                output_kind=kind,
            )

        stream = await self._begin(request_id, submit, cumulative)
        return AsyncOutputs(stream, partial(self._drop, request_id, stream))

    @refuses_adapters
    async def score(self, prompt: Prompt, continuations: Seq[Prompt], *, namespace: str = "") -> list[list[float]]:
        """As `Engine.score`; other requests go on meanwhile."""
        tokens = await self.tokenize(prompt)
        each = as_prompts(continuations)
        return [scores_of(one) for one in await _gather(self.score_one(tokens, c, namespace=namespace) for c in each)]

    @refuses_adapters
    async def beam_search(self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """As `Engine.beam_search`; other requests go on meanwhile. `generate` takes `BeamSearchParams` too, and gives
        one output.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest("params", params, "must be BeamSearchParams")

        async def search(prompt: Prompt) -> RequestOutput:
            return [output async for output in self.generate(prompt, params)][-1]

        return await _gather(search(one) for one in as_prompts(prompts))

    async def score_one(self, prompt: Prompt, continuation: Prompt, *, namespace: str = "") -> RequestOutput:
        """The whole output of scoring one continuation, of which `scores_of` reads the log-probabilities."""
        name, tokens = self._new_id(), await self.tokenize(prompt)
        rest = await asyncio.to_thread(self._engine.inputs.tokenize_continuation, continuation)
        submit = partial(self._engine.submit_score, tokens, rest, request_id=name, namespace=namespace)
        stream = await self._begin(name, submit, cumulative=True)
        return [output async for output in self._receive(name, stream)][-1]

    async def tokenize(self, prompt: Prompt, *, special: bool = True) -> TokenArray:
        """As `Engine.tokenize`."""
        return await asyncio.to_thread(partial(self._engine.tokenize, prompt, special=special))

    async def decode(self, token_ids: Seq[int]) -> str:
        """As `Engine.decode`."""
        return await asyncio.to_thread(self._engine.decode, token_ids)

    async def fork(self, request_id: str, n: int = 1) -> "list[AsyncOutputs]":
        """As `Engine.fork`: for each fork its outputs, the first of which tells what was generated before. They
        run whether or not they are read, until they are dropped.
        """
        loop = asyncio.get_running_loop()
        streams: list[tuple[str, _Stream]] = []

        def fork() -> None:
            names = self._engine.fork(request_id, n)
            streams.extend((name, _Stream(loop, self._streams[request_id].cumulative)) for name in names)
            self._streams.update(streams)

        def leave() -> None:
            for name, stream in streams:
                self._leave(name, stream)

        await self._call(fork, leave)
        return [AsyncOutputs(stream, partial(self._drop, name, stream)) for name, stream in streams]

    async def abort(self, request_id: str) -> bool:
        """End a request with `abort`. False where it has ended already or never was."""
        return await self._call(partial(self._cancel, request_id))

    async def pin(
        self,
        prompt: Prompt,
        *,
        namespace: str = "",
        priority: int = 0,
        ttl: float | None = None,
        replaces: int | None = None,
    ) -> int | None:
        """As `Engine.pin`."""
        tokens = await asyncio.to_thread(self._engine.tokenize, prompt)
        make = partial(self._engine.pin, tokens, namespace=namespace, priority=priority, ttl=ttl, replaces=replaces)
        made: list[int | None] = []

        def pin() -> int | None:
            made.append(make())
            return made[0]

        return await self._call(pin, partial(self._unpin, made))

    @refuses_adapters
    async def preload(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        namespace: str = "",
        priority: int = 0,
        ttl: float | None = None,
    ) -> list[int | None]:
        """As `Engine.preload`; other requests go on meanwhile. Where they take the last pins, none of these stays."""
        asked = as_prompts(prompts)
        self.inputs.check_seconds("ttl", ttl)
        pins: list[int | None] = [None] * len(asked)

        async def preload_one(index: int, prompt: Prompt) -> None:
            tokens = await asyncio.to_thread(self._engine.tokenize, prompt)
            async with aclosing(self.generate(tokens, PRELOADING, namespace=namespace, priority=priority)) as outputs:
                async for _ in outputs:
                    pass

            def pin() -> None:
                pins[index] = self._engine.pin(tokens, namespace=namespace, priority=priority, ttl=ttl)

            await self._call(pin)

        tasks = [asyncio.create_task(preload_one(index, prompt)) for index, prompt in enumerate(asked)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            self._post(_Command(partial(self._unpin, pins)))
            raise
        return pins

    def conversation(self, system: str | None = None, **options: Unpack[Options]) -> AsyncConversation:
        """As `Engine.conversation`; `AsyncConversation.load` brings a saved one back."""
        return AsyncConversation(self, system, **options)

    async def unpin(self, pin: int) -> bool:
        """As `Engine.unpin`."""
        return await self._call(partial(self._engine.unpin, pin))

    # -- the engine itself --------------------------------------------------------------------------------

    def with_tree(self, function: Callable[[RadixTree], object]) -> None:
        """As `Engine.with_tree`, in the engine's thread between two steps; returns at once. An engine that was closed
        calls nothing.
        """
        self._post(_Command(partial(self._engine.with_tree, function)))

    async def inspect(self, function: Callable[[Engine], T]) -> T:
        """The result of `function`, given the engine in its thread between two steps, which wait for it. It may read
        everything and change nothing.
        """
        return await self._call(lambda: function(self._engine))

    @property
    def inputs(self) -> InputProcessor:
        """What tokenizes and checks requests."""
        return self._engine.inputs

    @property
    def model_name(self) -> str:
        return self._engine.model_name

    @property
    def progress(self) -> tuple[int, bool]:
        """Steps that ran or failed, and whether there is work; it waits for no step."""
        return self._engine.num_steps, self._engine.has_unfinished

    @property
    def closed(self) -> bool:
        """Whether the engine was closed or died, and takes no more requests."""
        return self._end is not None

    async def warm_up(self, progress: Progress | None = None) -> None:
        """As `Engine.warm_up`; requests are served meanwhile, between its steps."""
        steps = await self._call(self._engine.warm_up_steps)
        for done, step in enumerate(steps, 1):
            await self._call(step)
            if progress is not None:
                progress(done, len(steps))

    async def stats(self) -> Stats:
        return await self._call(self._engine.stats)

    async def check(self) -> None:
        """As `Engine.check`."""
        await self._call(self._engine.check)

    async def reset_prefix_cache(self) -> int:
        """As `Engine.reset_prefix_cache`."""
        return await self._call(self._engine.reset_prefix_cache)

    async def close(self) -> None:
        """Stop the thread after the step that runs, and close the engine. Whoever still waits gets `EngineClosed`.
        May be called twice.
        """
        self._closing = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- in the callers' threads --------------------------------------------------------------------------

    def _prepare(self, prompt: Prompt, params: Params | None) -> TokenArray:
        """What takes time and needs no step to wait for it."""
        tokens = self._engine.tokenize(prompt)
        if params is not None:
            self._engine.compile_grammar(params)
        return tokens

    async def _begin(self, request_id: str, submit: Callable[[], object], cumulative: bool) -> "_Stream":
        """Submit; a caller that is cancelled meanwhile leaves nothing behind."""
        stream = _Stream(asyncio.get_running_loop(), cumulative)

        def begin() -> None:
            submit()
            self._streams[request_id] = stream

        await self._call(begin, partial(self._leave, request_id, stream))
        return stream

    async def _receive(self, request_id: str, stream: "_Stream") -> AsyncGenerator[RequestOutput, None]:
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._post(_Command(partial(self._leave, request_id, stream)))

    async def _call(self, function: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
        """The result of `function`, run in the engine's thread between two steps. Where the caller is cancelled
        meanwhile it runs all the same, and `undo` after it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._post(_Command(function, loop, future))
        try:
            return await future
        except asyncio.CancelledError:
            if undo is not None:
                self._post(_Command(undo))
            raise

    def _post(self, command: "_Command") -> None:
        with self._gate:
            if self._end is None:
                self._commands.put(command)
                return
        command.fail(self._end)

    def _drop(self, request_id: str, stream: "_Stream") -> None:
        """Nobody reads it any more. The garbage collector calls this too, in whatever thread and holding whatever lock:
        a `SimpleQueue` takes what is put without one. After the engine's end nobody takes it.
        """
        self._commands.put(_Command(partial(self._leave, request_id, stream)))

    def _new_id(self) -> str:
        return f"async-{uuid4().hex}"

    # -- in the engine's thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        # A full garbage collection walks all of torch and transformers, in the middle of a step.
        gc.collect()
        gc.freeze()
        end: EngineClosed = EngineClosed("the engine is closed")
        try:
            self._serve()
        except BaseException as error:
            logger.critical("the engine failed; every open request ends", exc_info=error)
            end = EngineDead(f"the engine failed: {error!r}")
            end.__cause__ = error
        with self._gate:
            self._end = end
        for stream in self._streams.values():
            stream.put(end)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command.fail(end)
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine could not be closed in order")
        gc.unfreeze()

    def _serve(self) -> None:
        idle = True
        while not self._closing:
            self._take_commands(_STALL_SECONDS if self._engine.has_unfinished else None, wait=idle)
            steps = self._engine.num_steps
            outputs = self._engine.step()
            for output in outputs:
                self._deliver(output)
            idle = not self._engine.has_unfinished or (not outputs and steps == self._engine.num_steps)

    def _take_commands(self, timeout: float | None, *, wait: bool) -> None:
        """Run what was posted; with `wait`, for up to `timeout` seconds until there is something."""
        try:
            command = self._commands.get(block=wait, timeout=timeout)
            while command is not None:
                command.run()
                command = self._commands.get(block=False)
        except queue.Empty:
            return

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is not None:
            stream.put(output)
        if output.finished:
            self._streams.pop(output.request_id, None)

    def _leave(self, request_id: str, stream: "_Stream") -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._cancel(request_id)

    def _unpin(self, pins: Seq[int | None]) -> None:
        """Those that nobody will hear of."""
        for pin in pins:
            if pin is not None:
                self._engine.unpin(pin)

    def _cancel(self, request_id: str) -> bool:
        try:
            self._engine.cancel(request_id)
        except UnknownRequest:
            return False
        return True


class AsyncOutputs(AsyncIterator[RequestOutput]):
    """Streams the outputs of one request. `aclose` aborts the request if it is still running; so does dropping the
    last reference to this object.
    """

    def __init__(self, stream: "_Stream", leave: Callable[[], object]) -> None:
        self._stream = stream
        self._leave = leave
        self._open = True

    async def __anext__(self) -> RequestOutput:
        if not self._open:
            raise StopAsyncIteration
        output = await self._stream.get()
        self._open = not output.finished
        return output

    async def aclose(self) -> None:
        """May be called twice."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._leave()


class _Command:
    """A function for the engine's thread, and the future that waits for its result."""

    def __init__(
        self,
        function: Callable[[], Any],
        loop: asyncio.AbstractEventLoop | None = None,
        future: "asyncio.Future[Any] | None" = None,
    ) -> None:
        self._function = function
        self._loop = loop
        self._future = future

    def run(self) -> None:
        """An exception belongs to the caller; a failed assertion is also the engine's."""
        try:
            result = self._function()
        except AssertionError as error:
            self.fail(error)
            raise
        except Exception as error:
            self.fail(error)
        else:
            self._settle(lambda future: future.set_result(result))

    def fail(self, error: BaseException) -> None:
        self._settle(lambda future: future.set_exception(error))

    def _settle(self, settle: "Callable[[asyncio.Future[Any]], None]") -> None:
        loop, future = self._loop, self._future
        if loop is None or future is None:
            return
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(lambda: None if future.done() else settle(future))


class _Stream:
    """Outputs on their way from the engine's thread to one coroutine, merged while nobody takes them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cumulative: bool) -> None:
        self.cumulative = cumulative
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: list[RequestOutput] = []
        """Deltas, each with more tokens than the next: joining costs O(log tokens) a token"""
        self._end: EngineClosed | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput | EngineClosed) -> None:
        with self._lock:
            awake = bool(self._pending)
            if isinstance(output, EngineClosed):
                self._end = output
            elif self.cumulative:
                self._pending = [output]
            else:
                self._pending.append(output)
                while len(self._pending) > 1 and _num_tokens(self._pending[-2]) <= _num_tokens(self._pending[-1]):
                    self._join_last()
        if not awake:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> RequestOutput:
        """The next output. Raises the `EngineClosed` that ended the stream, again and again."""
        await self._ready.wait()
        with self._lock:
            if not self._pending:
                assert self._end is not None
                raise self._end
            while len(self._pending) > 1:
                self._join_last()
            (output,) = self._pending
            self._pending = []
            if self._end is None:
                self._ready.clear()
        return output

    def _join_last(self) -> None:
        last = self._pending.pop()
        self._pending[-1] = _merge(self._pending[-1], last)


async def _gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; where one raises or the caller is cancelled, the others are too."""
    tasks = [asyncio.create_task(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _num_tokens(output: RequestOutput) -> int:
    return sum(len(one.token_ids) for one in output.outputs)


def _merge(first: RequestOutput, then: RequestOutput) -> RequestOutput:
    """Two deltas of one request as one."""
    merged = {one.index: one for one in first.outputs}
    for new in then.outputs:
        old = merged.get(new.index)
        merged[new.index] = new if old is None else joined([old, new])
    return replace(then, outputs=list(merged.values()), prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs)
