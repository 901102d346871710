"""What is done to a request before it is queued: read, decode, tokenize, compile. Tenants take turns."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request

from radixgen.core import Grammar, SamplingParams
from radixgen.input_processor import InputProcessor
from radixgen.serve.fair_pool import FairPool
from radixgen.serve.http.admission import Admission, Quota, Ticket
from radixgen.serve.http.body import SMALL_BODY_BYTES, decode, read_bytes
from radixgen.serve.http.stream import while_connected
from radixgen.serve.http.warnings import warner

T = TypeVar("T")
Body = TypeVar("Body", bound=msgspec.Struct)

_SHORT_THREADS = 4
_LONG_THREADS = 3
_COMPILERS = 2


class Intake:
    """Prepares requests in threads: long bodies, short ones and grammars have threads of their own. Bodies that are
    still being read count apart from admitted requests: slow senders take no capacity from those who generate.
    """

    def __init__(
        self, inputs: InputProcessor, admission: Admission, bodies: Quota, *, ignore_unknown: bool = False
    ) -> None:
        """
        admission: its bounds hold for the number of bodies being read too.
        bodies: the bytes of these.
        ignore_unknown: ignore fields that are not served, with a warning for each.
        """
        max_open = admission.max_open
        self.reading = Admission(max_open, admission.max_open_per_key)
        self._bodies = bodies
        self._inputs = inputs
        self._ignore_unknown = ignore_unknown
        self._short = FairPool(_SHORT_THREADS, "radixgen-short", most_waiting=max_open)
        self._long = FairPool(_LONG_THREADS, "radixgen-long", most_waiting=max_open)
        self._compilers = FairPool(_COMPILERS, "radixgen-grammar", most_waiting=inputs.limits.max_compiling)

    async def receive(self, request: Request, kind: type[Body], admission: Admission) -> tuple[Ticket, Body]:
        """Read and decode the body, then admit the request. Raises `QueueFull`, before the body is read where nothing
        could be admitted now, `InvalidRequest` with the first field that is wrong, `Refused`, `ClientGone`.
        """
        begin, tenant = time.monotonic(), request.state.caller.tenant
        admission.check(1, tenant)
        with self.reading.enter(tenant), self._bodies.held_by(tenant) as take:
            data = await read_bytes(request, self._inputs.limits, take)
            request.state.body_size = len(data)
            decoding = partial(decode, data, kind, self._ignore(request))
            body = decoding() if len(data) <= SMALL_BODY_BYTES else await self.run(request, decoding)
        return admission.enter(tenant, begin), body

    async def run(self, request: Request, work: Callable[[], T]) -> T:
        """What `work` returns, in a thread; dropped where the client goes before it begins. Raises `QueueFull`,
        `ClientGone`, `EngineClosed`, and what `work` raises.
        """
        pool = self._short if request.state.body_size <= SMALL_BODY_BYTES else self._long
        return await _result(request, pool.submit(request.state.caller.tenant, work))

    async def compile(self, request: Request, params: SamplingParams) -> Grammar | None:
        """The grammar that `params`, which were checked, ask for. Whoever holds it keeps it from being compiled again.
        Raises `InvalidRequest`, and what `run` raises.
        """
        if not params.structured:
            return None
        work = partial(self._inputs.grammar, params)
        return await _result(request, self._compilers.submit(request.state.caller.tenant, work))

    async def finish(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work`, of a request of `tenant` that is being answered, returns, in a thread. Raises `QueueFull`,
        `EngineClosed`, and what `work` raises.
        """
        return await asyncio.wrap_future(self._long.submit(tenant, work))

    def stalled(self, seconds: float) -> bool:
        """Whether requests wait for a thread, and no work has begun or ended for so long."""
        return any(pool.stalled(seconds) for pool in self._pools)

    def close(self) -> None:
        """What waits ends with `EngineClosed`."""
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
