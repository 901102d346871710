"""`search`: tree-of-thoughts search, in which a strategy chooses bursts of thoughts to expand."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from radixgen.core import InvalidRequest, PromptTooLong, RadixgenError, RequestFailed, check_integer
from radixgen.thoughts.backend import SearchBackend, call, cancel_all, serving
from radixgen.thoughts.budget import Budget, EndReason
from radixgen.thoughts.questions import (
    Choose,
    Evaluate,
    Evaluator,
    ModelCalls,
    Propose,
    Proposer,
    check_evaluator,
    derive_seed,
    most_tokens,
    score_of,
    steps_after,
)
from radixgen.thoughts.result import Result
from radixgen.thoughts.strategies import BreadthFirst, Strategy
from radixgen.thoughts.thought import Cost, Step, Thought

if TYPE_CHECKING:
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.engine.input_processor import Prompt
    from radixgen.thoughts.remote import RemoteEngine

    Root = Prompt | Step

T = TypeVar("T")
Goal = Callable[[Thought], bool | Awaitable[bool]]
Progress = Callable[[Result], object]
Stop = Callable[[], bool]


def search(
    engine: "Engine | RemoteEngine",
    root: "Root",
    *,
    propose: Propose | Proposer,
    evaluate: Evaluate | Choose | Evaluator,
    strategy: Strategy | None = None,
    goal: Goal | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    namespace: str = "",
    progress: Progress | None = None,
    stop: Stop | None = None,
    resume: Result | None = None,
) -> Result:
    """Search a tree of thoughts. Raises `InvalidRequest`, and `RequestFailed` if the root's request fails.

    engine: a local engine, or a `RemoteEngine`: a server's.
    root: the problem, as text, token ids (of `Engine.chat_tokens`), or a `Step` with a state.
    propose, evaluate: questions to the model about a thought (`Propose`; `Evaluate`, `Choose`), or functions of the
        thought. Functions that return an awaitable do not block the engine; others run between two steps.
    strategy: `BreadthFirst` (the default), `DepthFirst`, `BestFirst`, `MonteCarlo`, or your own `Strategy`.
    goal: function that returns whether a thought is a solution; solutions are not expanded.
    budget: limits of the search.
    seed: seed of all requests, together with the path to their thought.
    namespace: namespace of all requests.
    progress: called with the result so far after each answer and each change of the tree.
    stop: called as often; once it returns True, the search ends.
    resume: result to continue, which is modified; known answers are not requested again.

    All proposals of a burst are submitted at once, and then all evaluations of what they proposed. A thought with a
    known state is not added again. A thought whose request fails or exceeds the context is a dead end, with an `error`.
    Exceptions of the functions end the search. When the search ends, also by Ctrl-C, all its requests are aborted.
    """
    return run_alone(
        search_async(
            engine,
            root,
            propose=propose,
            evaluate=evaluate,
            strategy=strategy,
            goal=goal,
            budget=budget,
            seed=seed,
            namespace=namespace,
            progress=progress,
            stop=stop,
            resume=resume,
        )
    )


async def search_async(
    engine: "AsyncEngine | Engine | RemoteEngine | SearchBackend",
    root: "Root",
    *,
    propose: Propose | Proposer,
    evaluate: Evaluate | Choose | Evaluator,
    strategy: Strategy | None = None,
    goal: Goal | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    namespace: str = "",
    progress: Progress | None = None,
    stop: Stop | None = None,
    resume: Result | None = None,
) -> Result:
    """`search` for coroutines, on an `AsyncEngine`, an `Engine` of this thread, or your own `SearchBackend`.

    An `Engine` is stepped by a task of the event loop. Cancelling the search aborts its requests.
    """
    check_integer("seed", seed, 0, 2**64 - 1)
    if not isinstance(propose, Propose):
        _check_callable("propose", propose, "Propose or a callable")
    check_evaluator("evaluate", evaluate)
    if strategy is not None and (isinstance(strategy, type) or not callable(getattr(strategy, "plan", None))):
        raise InvalidRequest("strategy", strategy, "must be a strategy, such as BreadthFirst()")
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidRequest("budget", budget, "must be a Budget, such as Budget(thoughts=10)")
    if resume is not None and not isinstance(resume, Result):
        raise InvalidRequest("resume", resume, "must be a Result: of text, `Result.from_json(text)`")
    for name, function in (("goal", goal), ("progress", progress), ("stop", stop)):
        if function is not None:
            _check_callable(name, function, "a callable")
    async with serving(engine, namespace) as backend:
        result = resume or Result([await root_of(root, backend)], seed)
        if resume is not None:
            await _check_resumed(resume, root, seed, backend)
        searching = _Search(backend, result, propose, evaluate, goal, budget or Budget(), progress, stop)
        await searching.run(strategy or BreadthFirst())
    return result


def run_alone(job: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop. Ctrl-C cancels it between two steps."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        job.close()
        raise RadixgenError("this thread already runs an event loop: await the `_async` variant of the function")
    return asyncio.run(job)


async def root_of(root: "Root", backend: SearchBackend, field: str = "root") -> Thought:
    """Create the root of a tree. Raises `InvalidRequest`."""
    if isinstance(root, str):
        root = Step(root)
    if not isinstance(root, Step):
        ids = np.asarray(root)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            limit = "must be text, token ids (of messages: `engine.chat_tokens(messages)`) or a Step"
            raise InvalidRequest(field, root, limit)
        root = Step(await backend.decode(ids.tolist()), token_ids=tuple(ids.tolist()))
    token_ids = None if root.token_ids is None else list(root.token_ids)
    return Thought(root.text, root.state or "", id=0, token_ids=token_ids)


def _check_callable(field: str, value: object, kinds: str) -> None:
    if not callable(value):
        raise InvalidRequest(field, value, f"must be {kinds}")


async def _check_resumed(result: Result, root: "Root", seed: int, backend: SearchBackend) -> None:
    wanted = await root_of(root, backend)
    for field, resumed, given in (("root", result.root.text, wanted.text), ("seed", result.seed, seed)):
        if resumed != given:
            raise InvalidRequest(field, given, f"must be that of the resumed search, {resumed!r:.80}")


class _EndSearch(Exception):
    """Ends a search for a reason."""

    def __init__(self, reason: EndReason) -> None:
        super().__init__(reason)
        self.reason: EndReason = reason


class _Search:
    """Runs a search. Changes the result in the order of its thoughts, in whatever order answers arrive."""

    def __init__(
        self,
        backend: SearchBackend,
        result: Result,
        propose: Propose | Proposer,
        evaluate: Evaluate | Choose | Evaluator,
        goal: Goal | None,
        budget: Budget,
        progress: Progress | None,
        stop: Stop | None,
    ) -> None:
        self._backend = backend
        self._result = result
        self._propose = propose
        self._evaluate = evaluate
        self._goal = goal
        self._budget = budget
        self._progress = progress
        self._stop = stop
        self._known = {thought.state for thought in result.thoughts}
        self._solved = len(result.solutions)
        self._began = time.monotonic() - result.seconds

    async def run(self, strategy: Strategy) -> None:
        """Run until the strategy is complete or the search ends otherwise."""
        result = self._result
        result.ended = "cancelled"
        before = await self._backend.computed_rows() - result.computed_rows
        for thought in result.thoughts:
            thought.visits, thought.total, thought.pruned = 0, 0.0, False
        try:
            await self._follow(strategy)
            result.ended = "complete"
        except _EndSearch as end:
            result.ended = end.reason
        finally:
            result.seconds = time.monotonic() - self._began
        result.computed_rows = await self._backend.computed_rows() - before

    async def _follow(self, strategy: Strategy) -> None:
        self._report()
        for burst in strategy.plan(self._result.root):
            await self._expand([thought for thought in burst if not thought.expanded])
            if self._solved >= self._budget.solutions:
                raise _EndSearch("solved")
            children = [child for thought in burst for child in thought.children]
            await self._judge([child for child in children if child.score is None and child.error is None])

    async def _expand(self, thoughts: list[Thought]) -> None:
        """Expand as many thoughts as the budget allows."""
        if thoughts and len(self._result.thoughts) >= self._budget.thoughts:
            raise _EndSearch("thoughts")
        affordable = self._affordable(thoughts, self._propose)
        proposals = await self._burst([self._get_children(thought) for thought in affordable])
        for thought, proposal in zip(affordable, proposals, strict=False):
            self._grow(thought, proposal)
        self._report()
        if len(affordable) < len(thoughts):
            raise _EndSearch("tokens")

    async def _judge(self, thoughts: list[Thought]) -> None:
        """Score as many thoughts as the budget allows."""
        affordable = self._affordable(thoughts, self._evaluate)
        scores = await self._burst([self._get_score(thought) for thought in affordable])
        for thought, (score, error, cost) in zip(affordable, scores, strict=False):
            thought.score, thought.error = score, error
            thought.cost += cost
        self._report()
        if len(affordable) < len(thoughts):
            raise _EndSearch("tokens")

    async def _get_children(self, thought: Thought) -> tuple[list[Thought], str | None, Cost]:
        """Request proposals. Returns new thoughts, not in the tree yet; an error; and the cost."""
        calls = self._calls(thought, "propose")
        try:
            steps = await steps_after(self._propose, thought, calls)
        except (PromptTooLong, RequestFailed) as error:
            if thought.parent is None:
                raise
            return [], str(error), calls.cost
        children = [thought.follow(step) for step in steps]
        if self._goal is not None:
            for child in children:
                child.solved = bool(await call(self._goal, child))
        return children, None, calls.cost

    async def _get_score(self, thought: Thought) -> tuple[float | None, str | None, Cost]:
        """Request a score. Returns it, an error, and the cost."""
        calls = self._calls(thought, "evaluate")
        try:
            return await score_of(self._evaluate, thought, calls), None, calls.cost
        except (PromptTooLong, RequestFailed) as error:
            return None, str(error), calls.cost

    def _grow(self, thought: Thought, proposal: tuple[list[Thought], str | None, Cost]) -> None:
        """Add children to the tree, all or none; those with known states are only counted."""
        children, thought.error, cost = proposal
        new = {child.state: child for child in reversed(children) if child.state not in self._known}
        tree = self._result.thoughts
        if len(tree) + len(new) > self._budget.thoughts:
            raise _EndSearch("thoughts")
        for child in children:
            if new.get(child.state) is child:
                child.id = len(tree)
                tree.append(child)
                thought.children.append(child)
                self._solved += child.solved
        self._known.update(new)
        thought.merged = len(children) - len(new)
        thought.expanded = True
        thought.cost += cost

    async def _burst(self, jobs: Sequence[Coroutine[Any, Any, T]]) -> Iterator[T]:
        """Run jobs concurrently until all have ended, one has failed, or the time is up; then cancel the rest.

        Yields results in order, up to the first job without a result.
        """
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            if tasks:
                left = self._seconds_left()
                await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await cancel_all(tasks)
        return self._settled(tasks)

    def _settled(self, tasks: "Sequence[asyncio.Task[T]]") -> Iterator[T]:
        """Yield results in order. Raises the first exception of a task, or `_EndSearch` if a task was cancelled."""
        for task in tasks:
            if not task.cancelled():
                yield task.result()
                continue
            for other in tasks:
                if not other.cancelled():
                    other.result()
            raise _EndSearch("seconds" if self._seconds_left() == 0 else "cancelled")

    def _affordable(self, thoughts: list[Thought], what: object) -> list[Thought]:
        """The first thoughts, as many as the token budget allows."""
        tokens, each = self._budget.tokens, most_tokens(what)
        if tokens is None or not each:
            return thoughts
        return thoughts[: max(tokens - self._result.cost.generated_tokens, 0) // each]

    def _seconds_left(self) -> float | None:
        if self._budget.seconds is None:
            return None
        return max(self._budget.seconds - (time.monotonic() - self._began), 0.0)

    def _calls(self, thought: Thought, purpose: str) -> ModelCalls:
        return ModelCalls(self._backend, derive_seed(self._result.seed, thought, purpose), self._answered)

    def _answered(self, cost: Cost) -> None:
        self._result.cost += cost
        self._report()

    def _report(self) -> None:
        """Report progress. Raises `_EndSearch` if the search is to stop."""
        self._result.seconds = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(self._result)
        if self._stop is not None and self._stop():
            raise _EndSearch("stopped")
        if self._seconds_left() == 0:
            raise _EndSearch("seconds")
