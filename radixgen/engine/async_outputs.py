"""Streams of outputs from the engine's thread to coroutines."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from radixgen.core import EngineClosed, RequestOutput, merge_outputs


class AsyncOutputs(AsyncIterator[RequestOutput]):
    """Stream of the outputs of one request. `aclose`, or dropping the last reference, aborts the request if it is
    still running.
    """

    def __init__(self, queue: "OutputQueue", leave: Callable[[], object]) -> None:
        self._queue = queue
        self._leave = leave
        self._open = True

    async def __anext__(self) -> RequestOutput:
        if not self._open:
            raise StopAsyncIteration
        output = await self._queue.get()
        self._open = not output.finished
        return output

    async def aclose(self) -> None:
        """Close the stream. May be called twice."""
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._leave()


class OutputQueue:
    """Queue of outputs from the engine's thread to one coroutine. Outputs that wait are merged."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cumulative: bool) -> None:
        self.cumulative = cumulative
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: list[RequestOutput] = []
        """Deltas, each with more tokens than the next, so that merging costs O(log tokens) per token"""
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
                    self._pending[-2:] = [merge_outputs(self._pending[-2:])]
        if not awake:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> RequestOutput:
        """Wait for the next output. Once the engine is closed, every call raises its `EngineClosed`."""
        await self._ready.wait()
        with self._lock:
            if not self._pending:
                assert self._end is not None
                raise self._end
            output = merge_outputs(self._pending)
            self._pending = []
            if self._end is None:
                self._ready.clear()
        return output


def _num_tokens(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in output.outputs)
