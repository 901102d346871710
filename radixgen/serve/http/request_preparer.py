"""Preparation of requests before they are queued: read, decode, tokenize, compile. API keys take turns."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request

from radixgen.core import Grammar, SamplingParams
from radixgen.engine.input_processor import InputProcessor
from radixgen.serve.fair_pool import FairPool
from radixgen.serve.http.body import SMALL_BODY_BYTES, decode, read_bytes
from radixgen.serve.http.open_limit import OpenCount, OpenLimit, Quota
from radixgen.serve.http.stream import while_connected
from radixgen.serve.http.warnings import warner

T = TypeVar("T")
Body = TypeVar("Body", bound=msgspec.Struct)

_SHORT_THREADS = 4
_LONG_THREADS = 3
_COMPILERS = 2


class RequestPreparer:
    """Prepares requests in three thread pools: for long bodies, short bodies and grammars.

    Requests whose body is still being read are counted separately, so that slow senders take no capacity from others.
    """

    def __init__(
        self, inputs: InputProcessor, open_limit: OpenLimit, bodies: Quota, *, ignore_unknown: bool = False
    ) -> None:
        """
        inputs: tokenizer and limits.
        open_limit: its limits apply to the number of bodies being read, too.
        bodies: limit on the bytes of bodies being read.
        ignore_unknown: whether to ignore unsupported fields, with a warning for each.
        """
        max_open = open_limit.max_open
        self.reading = OpenLimit(max_open, open_limit.max_open_per_key)
        self._bodies = bodies
        self._inputs = inputs
        self._ignore_unknown = ignore_unknown
        self._short = FairPool(_SHORT_THREADS, "radixgen-short", most_waiting=max_open)
        self._long = FairPool(_LONG_THREADS, "radixgen-long", most_waiting=max_open)
        self._compilers = FairPool(_COMPILERS, "radixgen-grammar", most_waiting=inputs.limits.max_compiling)

    async def receive(self, request: Request, kind: type[Body], open_limit: OpenLimit) -> tuple[OpenCount, Body]:
        """Read and decode the body, then admit the request.

        Raises `QueueFull` (before the body is read, if nothing can be admitted), `InvalidRequest`, `HTTPError`,
        `ClientGone`.
        """
        begin, key_id = time.monotonic(), request.state.caller.key_id
        open_limit.check(1, key_id)
        with self.reading.enter(key_id), self._bodies.held_by(key_id) as take:
            data = await read_bytes(request, self._inputs.limits, take)
            request.state.body_size = len(data)
            decoding = partial(decode, data, kind, self._ignore(request))
            body = decoding() if len(data) <= SMALL_BODY_BYTES else await self.run(request, decoding)
        return open_limit.enter(key_id, begin), body

    async def run(self, request: Request, work: Callable[[], T]) -> T:
        """Run `work` in a thread and return its result; it is dropped if the client disconnects before it starts.

        Raises `QueueFull`, `ClientGone`, `EngineClosed`, and whatever `work` raises.
        """
        pool = self._short if request.state.body_size <= SMALL_BODY_BYTES else self._long
        return await _result(request, pool.submit(request.state.caller.key_id, work))

    async def compile(self, request: Request, params: SamplingParams) -> Grammar | None:
        """Compile the grammar of checked `params`, if any. Hold on to it until the request is queued: it is cached.

        Raises `InvalidRequest`, and the errors of `run`.
        """
        if not params.structured:
            return None
        work = partial(self._inputs.grammar, params)
        return await _result(request, self._compilers.submit(request.state.caller.key_id, work))

    async def finish(self, key_id: str, work: Callable[[], T]) -> T:
        """Run `work` for a request that is being answered, in a thread, and return its result.

        Raises `QueueFull`, `EngineClosed`, and whatever `work` raises.
        """
        return await asyncio.wrap_future(self._long.submit(key_id, work))

    def stalled(self, seconds: float) -> bool:
        """Whether requests wait for a thread, and no work has started or ended for `seconds`."""
        return any(pool.stalled(seconds) for pool in self._pools)

    def close(self) -> None:
        """Fail waiting work with `EngineClosed`."""
        for pool in self._pools:
            pool.close()

    @property
    def _pools(self) -> tuple[FairPool, ...]:
        return self._short, self._long, self._compilers

    def _ignore(self, request: Request) -> Callable[[str], None] | None:
        if not self._ignore_unknown:
            return None
        warn = warner(request)
        return lambda field: warn(f"ignored: {field}")


async def _result(request: Request, future: "Future[T]") -> T:
    async def wait() -> T:
        return await asyncio.wrap_future(future)

    return await while_connected(request.receive, wait())
