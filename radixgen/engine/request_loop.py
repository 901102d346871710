"""`RequestLoop`: steps an engine's core for several callers on one thread, and keeps each caller's outputs."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from itertools import chain

from radixgen.core import EngineClosed, OutputKind, QueueFull, RadixgenError, RequestOutput, UnknownRequest
from radixgen.engine.core import EngineCore
from radixgen.engine.output_processor import OutputProcessor
from radixgen.engine.profiler import StepProfiler
from radixgen.scheduler.sequence import Request, Sequence

Progress = Callable[[int, int], None]


class RequestLoop:
    """Runs requests from submission to their last output. Makes every change under the core's guard."""

    def __init__(self, core: EngineCore, outputs: OutputProcessor, clock: Callable[[], float]) -> None:
        self.closed = False
        self.outputs = outputs
        self._core = core
        self._guard = core.guard
        self._clock = clock
        self._profiler: StepProfiler | None = None
        self._undelivered: dict[str, list[RequestOutput]] = {}
        """Outputs by request id, produced by another caller's step and not yet taken."""
        self._dropped: deque[str] = deque()
        """Requests whose streams were dropped. The garbage collector drops some in the middle of a step."""

    def begin_call(self) -> None:
        """Begin a call: cancel the requests of dropped streams. Raises `EngineClosed` and `EngineDead`."""
        if self.closed:
            raise EngineClosed("the engine is closed")
        self._guard.require()
        while self._dropped:
            self.abandon([self._dropped.popleft()])

    @property
    def has_unfinished(self) -> bool:
        """True if `step` has work or output left. Also true if the engine is dead, so that `step` raises."""
        return bool(self._core.requests or self._undelivered) or (self._guard.broken and not self.closed)

    def live(self, request_id: str) -> Request:
        """Return the live request with this id. Raises `UnknownRequest` if it has ended or never existed."""
        request = self._core.requests.get(request_id) if isinstance(request_id, str) else None
        if request is None or request.finished:
            raise UnknownRequest("request_id", request_id, "names no live request")
        return request

    def submit(self, request: Request, kind: OutputKind) -> str:
        """Queue a new request, and return its id."""
        with self._guard:
            self._core.add(request)
            fault = self.outputs.follow(request, kind)
            if fault is not None:
                self._core.abort(request, "error", fault)
            return request.id

    def fork(self, request: Request, n: int) -> list[str]:
        """Make `n` copies of a live request, and return their ids. The caller must call `require_room` first."""
        forks = []
        with self._guard:
            for _ in range(n):
                fork = self._core.fork(request)
                self.outputs.follow_fork(request, fork)
                forks.append(fork.id)
            return forks

    def cancel(self, request: Request) -> None:
        """End a live request. The next step returns its last output."""
        with self._guard:
            self._core.abort(request)

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns outputs that were not taken yet, then those of the step."""
        self.begin_call()
        with self._guard:
            new = self._step()
            kept, self._undelivered = self._undelivered, {}
            return [*chain.from_iterable(kept.values()), *new]

    def serve(self, submits: Seq[Callable[[], str]], progress: Progress | None = None) -> list[RequestOutput]:
        """Queue a request with each of `submits`, as the queue has room, and step until all have ended.

        Returns the last output of each, in the same order.
        """
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            while len(done) < len(submits):
                for submit in submits[len(ids) :]:
                    try:
                        ids.append(submit())
                    except QueueFull:
                        break
                done |= {output.request_id: output for output in self.receive(set(ids))}
                if progress is not None:
                    progress(len(done), len(submits))
        finally:
            self.abandon(set(ids) - done.keys())
        return [done[request_id] for request_id in ids]

    def receive(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """Return outputs of these requests: those that other callers' steps produced, or else those of one more step.

        Raises `RadixgenError` if the step did nothing, since the caller would wait forever.
        """
        self.begin_call()
        with self._guard:
            before, stuck = self._core.num_attempts, False
            if self._undelivered.keys().isdisjoint(request_ids):
                new = self._step()
                stuck = not new and before == self._core.num_attempts and not self._core.fetching
                self._keep(new)
            outputs = [output for request_id in request_ids for output in self._undelivered.pop(request_id, ())]
        if stuck:
            raise RadixgenError("no request can run: the KV pool is held by locks that no request owns")
        return outputs

    def abandon(self, request_ids: Collection[str]) -> None:
        """Cancel requests that no caller waits for any more, and drop their outputs."""
        if self.closed or self._guard.broken:
            return
        with self._guard:
            for request_id in request_ids:
                if request_id in self._core.requests:
                    self._core.abort(self._core.requests[request_id])
            self._keep(self._process(self._core.take_ended()))
            for request_id in request_ids:
                self._undelivered.pop(request_id, None)

    def drop(self, request_id: str) -> None:
        """Abandon a request when the next call begins. May be called by a finalizer."""
        self._dropped.append(request_id)

    def run_apart(self, function: Callable[[], None]) -> None:
        """Run a function that uses the model, between two steps."""
        self.begin_call()
        with self._guard:
            self._core.ahead.drop()
            function()

    def profile(self, profiler: StepProfiler) -> StepProfiler:
        """Profile the next steps, and return the profiler. The one before is closed."""
        self._close_profiler()
        self._profiler = profiler
        return profiler

    def check(self) -> None:
        """Assert that the output processor follows exactly the requests of the core."""
        self.outputs.check(self._core.requests.values())

    def close(self) -> None:
        """Abandon all requests, and accept no more calls."""
        try:
            self.abandon(list(self._core.requests))
        finally:
            self.closed = True
            self._undelivered.clear()
            self._close_profiler()

    def _step(self) -> list[RequestOutput]:
        before = self._core.num_attempts
        with self._profiler.span() if self._profiler else nullcontext():
            outputs = self._process(self._core.step(self._clock()))
        if self._profiler is not None and self._core.num_attempts > before:
            self._profiler.after_step()
        return outputs

    def _close_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.close()

    def _process(self, touched: Seq[Sequence]) -> list[RequestOutput]:
        """Return the outputs of sequences that got tokens or ended. Finished requests are removed from the core."""
        outputs, to_abort = self.outputs.process(touched)
        for sequence in to_abort:
            self._core.scheduler.drop(sequence)
        for request in dict.fromkeys(sequence.request for sequence in touched):
            if request.finished:
                self._core.forget(request)
        return outputs

    def _keep(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            self._undelivered.setdefault(output.request_id, []).append(output)


class OutputStream(Iterator[RequestOutput]):
    """Iterator over one request's outputs. Each `next` steps the engine if needed."""

    def __init__(self, loop: RequestLoop, request_id: str) -> None:
        self.request_id = request_id
        self._loop = loop
        self._waiting: list[RequestOutput] = []
        self._open = True

    def __next__(self) -> RequestOutput:
        if not self._open and not self._waiting:
            raise StopIteration
        while not self._waiting:
            self._waiting = self._loop.receive([self.request_id])
        self._open = not self._waiting[0].finished
        return self._waiting.pop(0)

    def close(self) -> None:
        """Cancel the request if it has not ended."""
        if self._open:
            self._open = False
            self._waiting.clear()
            self._loop.abandon([self.request_id])

    def __del__(self) -> None:
        if self._open:
            self._loop.drop(self.request_id)
