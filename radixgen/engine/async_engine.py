"""`AsyncEngine`: one thread steps the engine; coroutines submit requests and receive outputs."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar, Unpack
from uuid import uuid4

import numpy as np

from radixgen.cache import TokenArray
from radixgen.chat.async_conversation import AsyncConversation
from radixgen.chat.dialogue import Options
from radixgen.core import (
    BeamSearchParams,
    CacheHint,
    EngineClosed,
    HintResult,
    InvalidRequest,
    OutputKind,
    RequestOutput,
    SamplingParams,
    Stats,
    UnknownRequest,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.engine.async_outputs import AsyncOutputs, OutputQueue
from radixgen.engine.core import EngineCore
from radixgen.engine.engine import Engine
from radixgen.engine.input_processor import InputProcessor, Params, Prompt, as_prompts
from radixgen.engine.output_processor import scores_of
from radixgen.engine.pins import PRELOADING
from radixgen.engine.request_loop import Progress
from radixgen.engine.request_options import PinOptions, RequestOptions
from radixgen.engine.thread import EngineThread

T = TypeVar("T")


class AsyncEngine:
    """Serves an `Engine` to coroutines of any number of event loops. Owns the engine and closes it.

    Objects that exist when it starts are excluded from garbage collection until it ends (`gc.freeze`).

    ```python
    async with AsyncEngine(Engine("smollm2")) as engine:
        async for delta in engine.generate("Hello", SamplingParams(max_tokens=8)):
            print(delta.outputs[0].text, end="")
    ```

    Back-pressure: requests beyond the engine's `Limits` are rejected at once with `QueueFull`. Outputs that a slow
    reader has not taken are merged into one, so they need no more memory than the whole answer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queues: dict[str, OutputQueue] = {}
        """Queue of each open request; used in the engine's thread only"""
        self._thread = EngineThread(engine, self._deliver, self._finish)
        self._thread.start()

    # -- requests -----------------------------------------------------------------------------------------

    @refuses_adapters
    async def generate(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        cumulative: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield what is new since the last output, or with `cumulative` everything so far.

        The last output has `finished=True`. Leaving the generator early aborts the request. Takes the options of
        `Engine.submit` and raises its errors, and `EngineDead` if the engine fails.
        """
        outputs = await self.open(prompt, params, cumulative=cumulative, **options)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    @refuses_adapters
    async def open(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        cumulative: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncOutputs:
        """As `generate`, but return the stream once the request is queued. Raises the errors of `Engine.submit`."""
        request_id = options["request_id"] = options.get("request_id") or self._new_id()
        if isinstance(prompt, np.ndarray) and not (isinstance(params, SamplingParams) and params.structured):
            tokens = self._engine.tokenize(prompt)  # quick, and requests are queued in the order of their calls
        else:
            tokens = await asyncio.to_thread(self._prepare, prompt, params)
        kind: OutputKind = "cumulative" if cumulative else "delta"
        submit = partial(self._engine.submit, tokens, params, output_kind=kind, **options)
        return await self._begin(request_id, submit, cumulative=cumulative)

    @refuses_adapters
    async def score(self, prompt: Prompt, continuations: Seq[Prompt], *, namespace: str = "") -> list[list[float]]:
        """As `Engine.score`; other requests continue meanwhile."""
        tokens = await self.tokenize(prompt)
        scoring = [self.score_continuation(tokens, rest, namespace=namespace) for rest in as_prompts(continuations)]
        return [scores_of(output) for output in await _gather(scoring)]

    @refuses_adapters
    async def beam_search(self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """As `Engine.beam_search`; other requests continue meanwhile. `generate` accepts `BeamSearchParams` too, and
        yields one output.
        """
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest("params", params, "must be BeamSearchParams")

        async def search(prompt: Prompt) -> RequestOutput:
            return await _last(await self.open(prompt, params))

        return await _gather(search(prompt) for prompt in as_prompts(prompts))

    async def score_continuation(self, prompt: Prompt, continuation: Prompt, *, namespace: str = "") -> RequestOutput:
        """Score one continuation. Returns the whole output; `scores_of` reads the log-probabilities."""
        name, tokens = self._new_id(), await self.tokenize(prompt)
        rest = await asyncio.to_thread(self._engine.inputs.tokenize_continuation, continuation)
        submit = partial(self._engine.submit_score, tokens, rest, request_id=name, namespace=namespace)
        return await _last(await self._begin(name, submit, cumulative=True))

    async def tokenize(self, prompt: Prompt, *, special: bool = True) -> TokenArray:
        """As `Engine.tokenize`."""
        return await asyncio.to_thread(partial(self._engine.tokenize, prompt, special=special))

    async def decode(self, token_ids: Seq[int]) -> str:
        """As `Engine.decode`."""
        return await asyncio.to_thread(self._engine.decode, token_ids)

    async def fork(self, request_id: str, n: int = 1) -> list[AsyncOutputs]:
        """As `Engine.fork`, but return the stream of each fork. Its first output has all that was generated before.
        Forks run even if nobody reads them, until their streams are dropped.
        """
        loop = asyncio.get_running_loop()

        def fork() -> dict[str, OutputQueue]:
            names, cumulative = self._engine.fork(request_id, n), self._queues[request_id].cumulative
            queues = {name: OutputQueue(loop, cumulative) for name in names}
            self._queues.update(queues)
            return queues

        def leave(queues: dict[str, OutputQueue]) -> None:
            for name, queue in queues.items():
                self._leave(name, queue)

        queues = await self._call(fork, leave)
        return [self._outputs(name, queue) for name, queue in queues.items()]

    async def apply_hints(
        self, prompt: Prompt, hints: Seq[CacheHint], *, namespace: str = "", hint_owner: str | None = None
    ) -> tuple[HintResult, ...]:
        """As `Engine.apply_hints`."""
        tokens = await asyncio.to_thread(self._engine.tokenize, prompt)
        apply = partial(self._engine.apply_hints, tokens, hints, namespace=namespace, hint_owner=hint_owner)
        return await self._call(apply)

    async def abort(self, request_id: str) -> bool:
        """End a request with `abort`. Returns False if it has already ended or never existed."""
        return await self._call(partial(self._cancel, request_id))

    async def pin(self, prompt: Prompt, *, replaces: int | None = None, **options: Unpack[PinOptions]) -> int | None:
        """As `Engine.pin`."""
        tokens = await asyncio.to_thread(self._engine.tokenize, prompt)
        pin = partial(self._engine.pin, tokens, replaces=replaces, **options)
        return await self._call(pin, lambda pin: self._unpin([pin]))

    @refuses_adapters
    async def preload(self, prompts: Prompt | Seq[Prompt], **options: Unpack[PinOptions]) -> list[int | None]:
        """As `Engine.preload`; other requests continue meanwhile. If no pins are left, all pins made by this call are
        released.
        """
        each = as_prompts(prompts)
        self.inputs.check_seconds("ttl", options.get("ttl"))
        namespace, priority = options.get("namespace", ""), options.get("priority", 0)
        params = replace(PRELOADING, reading=options.get("reading"))
        pins: list[int | None] = [None] * len(each)

        async def preload_prompt(index: int, prompt: Prompt) -> None:
            tokens = await asyncio.to_thread(self._engine.tokenize, prompt)
            await _last(await self.open(tokens, params, namespace=namespace, priority=priority))

            def pin() -> None:
                pins[index] = self._engine.pin(tokens, **options)

            await self._call(pin)

        try:
            await _gather(preload_prompt(index, prompt) for index, prompt in enumerate(each))
        except BaseException:
            self._thread.post(partial(self._unpin, pins))
            raise
        return pins

    def conversation(self, system: str | None = None, **options: Unpack[Options]) -> AsyncConversation:
        """As `Engine.conversation`; `AsyncConversation.load` restores a saved one."""
        return AsyncConversation(self, system, **options)

    async def unpin(self, pin: int) -> bool:
        """As `Engine.unpin`."""
        return await self._call(partial(self._engine.unpin, pin))

    # -- the engine itself --------------------------------------------------------------------------------

    def inspect(self, function: Callable[[EngineCore], T]) -> "Future[T]":
        """As `Engine.inspect`, in the engine's thread between two steps. Returns at once; the future raises
        `EngineClosed` if the engine was closed.
        """
        return self._thread.call(partial(self._engine.inspect, function))

    @property
    def inputs(self) -> InputProcessor:
        """Tokenizes and checks requests."""
        return self._engine.inputs

    @property
    def model_name(self) -> str:
        return self._engine.model_name

    @property
    def progress(self) -> tuple[int, bool]:
        """Number of steps that ran or failed, and whether there is work. Waits for no step."""
        return self._engine.num_steps, self._engine.has_unfinished

    @property
    def closed(self) -> bool:
        """Whether the engine was closed or is dead, and accepts no more requests."""
        return self._thread.end is not None

    async def warm_up(self, progress: Progress | None = None) -> None:
        """As `Engine.warm_up`; requests are served between its steps."""
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
        """Stop the thread after the current step, and close the engine. Waiting callers get `EngineClosed`. May be
        called twice.
        """
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # -- in the callers' threads --------------------------------------------------------------------------

    def _prepare(self, prompt: Prompt, params: Params | None) -> TokenArray:
        """Tokenize the prompt and compile the grammar, in the caller's thread, so that no step waits for it."""
        tokens = self._engine.tokenize(prompt)
        if params is not None:
            self._engine.compile_grammar(params)
        return tokens

    async def _begin(self, request_id: str, submit: Callable[[], object], *, cumulative: bool) -> AsyncOutputs:
        """Submit a request; abort it if the caller is cancelled meanwhile."""
        queue = OutputQueue(asyncio.get_running_loop(), cumulative)

        def begin() -> None:
            submit()
            self._queues[request_id] = queue

        await self._call(begin, lambda _: self._leave(request_id, queue))
        return self._outputs(request_id, queue)

    def _outputs(self, request_id: str, queue: OutputQueue) -> AsyncOutputs:
        return AsyncOutputs(queue, partial(self._thread.post, partial(self._leave, request_id, queue)))

    async def _call(self, function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run `function` in the engine's thread between two steps, and return its result. If the caller is cancelled
        meanwhile, `function` still runs, then `undo` with its result.
        """
        future = self._thread.call(function)
        result = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            result.add_done_callback(asyncio.Future.exception)  # else asyncio logs that nobody looked at it
            if undo is not None:
                self._thread.post(lambda: None if future.exception() else undo(future.result()))
            raise

    def _new_id(self) -> str:
        return f"async-{uuid4().hex}"

    # -- in the engine's thread ---------------------------------------------------------------------------

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:
                queue.put(output)
            if output.finished:
                self._queues.pop(output.request_id, None)

    def _finish(self, end: EngineClosed) -> None:
        for queue in self._queues.values():
            queue.put(end)

    def _leave(self, request_id: str, queue: OutputQueue) -> None:
        """Abort a request whose outputs are no longer read."""
        if self._queues.get(request_id) is queue:
            del self._queues[request_id]
            self._cancel(request_id)

    def _unpin(self, pins: Seq[int | None]) -> None:
        """Release pins whose caller was cancelled."""
        for pin in pins:
            if pin is not None:
                self._engine.unpin(pin)

    def _cancel(self, request_id: str) -> bool:
        try:
            self._engine.cancel(request_id)
        except UnknownRequest:
            return False
        return True


async def _gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all coroutines. If one raises or the caller is cancelled, cancel the others."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _last(outputs: AsyncOutputs) -> RequestOutput:
    """Return the last output of a request. If the caller is cancelled, abort the request."""
    async with aclosing(outputs):
        return [output async for output in outputs][-1]
