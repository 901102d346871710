"""`search`: a tree of thoughts, grown by a strategy, each of whose bursts goes to the engine as one."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from radixgen.core import InvalidRequest, PromptTooLong, RadixgenError, RequestFailed, check_integer
from radixgen.thoughts.asks import (
    Asking,
    Choose,
    Evaluate,
    Evaluator,
    Propose,
    Proposer,
    check_evaluator,
    derive_seed,
    most_tokens,
    score_of,
    steps_after,
)
from radixgen.thoughts.budget import Budget, Ended
from radixgen.thoughts.result import Result
from radixgen.thoughts.server import Server, called, drop, serving
from radixgen.thoughts.strategies import BreadthFirst, Strategy
from radixgen.thoughts.thought import Cost, Step, Thought

if TYPE_CHECKING:
    from radixgen.async_engine import AsyncEngine
    from radixgen.engine import Engine
    from radixgen.input_processor import Prompt

    Root = Prompt | Step

T = TypeVar("T")
Goal = Callable[[Thought], bool | Awaitable[bool]]
Progress = Callable[[Result], object]
Stop = Callable[[], bool]


def search(
    engine: "Engine",
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
    """Grow a tree of thoughts from `root`, the problem: text, token ids as of `Engine.chat_tokens`, or a `Step`
    that tells its state too.

    propose, evaluate: what to ask the model about a thought (`Propose`; `Evaluate`, `Choose`), or functions of the
        thought. One that returns an awaitable never stalls the engine; another runs between two steps.
    strategy: `BreadthFirst` (the default), `DepthFirst`, `BestFirst`, `MonteCarlo`, or a `Strategy` of your own.
    goal: whether a thought is a solution; one that is, is not expanded.
    seed: fixes the draws of every request, with the path to the thought that it asks about.
    progress: called with the result so far whenever an answer has come and whenever the tree has grown.
    stop: asked as often; once it says True, the search ends with what it has.
    resume: go on from a result, which is extended: what it knows is not asked again.

    All proposals of a burst go to the engine at once, and so do the evaluations of what they proposed. A state that
    was reached before is not added again. A thought whose request fails, or grew too long, is a dead end with an
    `error`; an exception of a function given here ends the search. However it ends, Ctrl-C included, no request of it
    is left, and it pins nothing. Raises `InvalidRequest`, and `RequestFailed` where the root's request fails.
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
    engine: "AsyncEngine | Engine | Server",
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
    """As `search`, for coroutines: on an `AsyncEngine`; on an `Engine` of this thread, which is then stepped between
    whatever else the event loop does; or on a `Server` of your own. A task that is cancelled leaves nothing behind.
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
    async with serving(engine, namespace) as server:
        result = resume or Result([await root_of(root, server)], seed)
        if resume is not None:
            await _check_resumed(resume, root, seed, server)
        searching = _Search(server, result, propose, evaluate, goal, budget or Budget(), progress, stop)
        await searching.run(strategy or BreadthFirst())
    return result


def run_alone(job: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, in an event loop of its own. Ctrl-C cancels it between two of its steps."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        job.close()
        raise RadixgenError("an event loop runs in this thread already: await the function's `_async` twin")
    return asyncio.run(job)


async def root_of(root: "Root", server: Server, field: str = "root") -> Thought:
    """The thought that a tree begins with. Raises `InvalidRequest`."""
    if isinstance(root, str):
        root = Step(root)
    if not isinstance(root, Step):
        ids = np.asarray(root)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            limit = "must be text, token ids (of messages: `engine.chat_tokens(messages)`) or a Step"
            raise InvalidRequest(field, root, limit)
        root = Step(await server.decode(ids.tolist()), token_ids=tuple(ids.tolist()))
    token_ids = None if root.token_ids is None else list(root.token_ids)
    return Thought(root.text, root.state or "", id=0, token_ids=token_ids)


def _check_callable(field: str, value: object, kinds: str) -> None:
    if not callable(value):
        raise InvalidRequest(field, value, f"must be {kinds}")


async def _check_resumed(result: Result, root: "Root", seed: int, server: Server) -> None:
    wanted = await root_of(root, server)
    for field, found, given in (("root", result.root.text, wanted.text), ("seed", result.seed, seed)):
        if found != given:
            raise InvalidRequest(field, given, f"the search that is resumed has {found!r:.80}")


class _Ended(Exception):
    """Unwinds a search that is over."""

    def __init__(self, reason: Ended) -> None:
        super().__init__(reason)
        self.reason: Ended = reason


class _Search:
    """Grows a result. Every change of it is made here, in the order of the thoughts, however answers arrive."""

    def __init__(
        self,
        server: Server,
        result: Result,
        propose: Propose | Proposer,
        evaluate: Evaluate | Choose | Evaluator,
        goal: Goal | None,
        budget: Budget,
        progress: Progress | None,
        stop: Stop | None,
    ) -> None:
        self._server = server
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
        result = self._result
        result.ended = "cancelled"
        before = await self._server.computed_rows() - result.computed_rows
        for thought in result.thoughts:
            thought.visits, thought.total, thought.pruned = 0, 0.0, False
        try:
            await self._follow(strategy)
            result.ended = "complete"
        except _Ended as end:
            result.ended = end.reason
        finally:
            result.seconds = time.monotonic() - self._began
        result.computed_rows = await self._server.computed_rows() - before

    async def _follow(self, strategy: Strategy) -> None:
        self._tell()
        for burst in strategy.plan(self._result.root):
            await self._expand([thought for thought in burst if not thought.expanded])
            if self._solved >= self._budget.solutions:
                raise _Ended("solved")
            children = [child for thought in burst for child in thought.children]
            await self._judge([child for child in children if child.score is None and child.error is None])

    async def _expand(self, thoughts: list[Thought]) -> None:
        """Give them children; where the budget ends, the first of them."""
        if thoughts and len(self._result.thoughts) >= self._budget.thoughts:
            raise _Ended("thoughts")
        asked = self._affordable(thoughts, self._propose)
        for thought, grown in zip(asked, await self._burst([self._proposed(one) for one in asked]), strict=False):
            self._grow(thought, grown)
        self._tell()
        if len(asked) < len(thoughts):
            raise _Ended("tokens")

    async def _judge(self, thoughts: list[Thought]) -> None:
        """Give them scores."""
        asked = self._affordable(thoughts, self._evaluate)
        for thought, judged in zip(asked, await self._burst([self._scored(one) for one in asked]), strict=False):
            thought.score, thought.error, cost = judged
            thought.cost += cost
        self._tell()
        if len(asked) < len(thoughts):
            raise _Ended("tokens")

    async def _proposed(self, thought: Thought) -> tuple[list[Thought], str | None, Cost]:
        """What may follow `thought`, none of it in the tree yet; or why there is nothing."""
        asking = self._asking(thought, "propose")
        try:
            steps = await steps_after(self._propose, thought, asking)
        except (PromptTooLong, RequestFailed) as error:
            if thought.parent is None:
                raise
            return [], str(error), asking.cost
        children = [thought.follow(step) for step in steps]
        if self._goal is not None:
            for child in children:
                child.solved = bool(await called(self._goal, child))
        return children, None, asking.cost

    async def _scored(self, thought: Thought) -> tuple[float | None, str | None, Cost]:
        asking = self._asking(thought, "evaluate")
        try:
            return await score_of(self._evaluate, thought, asking), None, asking.cost
        except (PromptTooLong, RequestFailed) as error:
            return None, str(error), asking.cost

    def _grow(self, thought: Thought, grown: tuple[list[Thought], str | None, Cost]) -> None:
        """Take children into the tree, all or none; those known already are counted only."""
        children, thought.error, cost = grown
        new = {child.state: child for child in reversed(children) if child.state not in self._known}
        tree = self._result.thoughts
        if len(tree) + len(new) > self._budget.thoughts:
            raise _Ended("thoughts")
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
        """Run all at once, until all have ended, one has failed, or the time is up; then none is left running. Their
        results in order, up to the first that has none.
        """
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            if tasks:
                left = self._seconds_left()
                await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await drop(tasks)
        return self._settled(tasks)

    def _settled(self, tasks: "Sequence[asyncio.Task[T]]") -> Iterator[T]:
        """Raises what the first that failed has raised, or `_Ended`."""
        for task in tasks:
            if not task.cancelled():
                yield task.result()
                continue
            for other in tasks:
                if not other.cancelled():
                    other.result()
            raise _Ended("seconds" if self._seconds_left() == 0 else "cancelled")

    def _affordable(self, thoughts: list[Thought], what: object) -> list[Thought]:
        """Those whose requests can't exceed the budget of tokens."""
        tokens, each = self._budget.tokens, most_tokens(what)
        if tokens is None or not each:
            return thoughts
        return thoughts[: max(tokens - self._result.cost.generated_tokens, 0) // each]

    def _seconds_left(self) -> float | None:
        if self._budget.seconds is None:
            return None
        return max(self._budget.seconds - (time.monotonic() - self._began), 0.0)

    def _asking(self, thought: Thought, purpose: str) -> Asking:
        return Asking(self._server, derive_seed(self._result.seed, thought, purpose), self._answered)

    def _answered(self, cost: Cost) -> None:
        self._result.cost += cost
        self._tell()

    def _tell(self) -> None:
        self._result.seconds = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(self._result)
        if self._stop is not None and self._stop():
            raise _Ended("stopped")
        if self._seconds_left() == 0:
            raise _Ended("seconds")
