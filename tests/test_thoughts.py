"""Trees of thoughts without a model: what each strategy expands, budgets, stops, merges, resumes, pictures."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from heapq import heappop, heappush
from itertools import product
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from oracle import StampModel
from rich.console import Console

from radixgen import Engine, InvalidRequest, RadixgenError, thoughts
from radixgen.thoughts import BestFirst, BreadthFirst, Budget, DepthFirst, MonteCarlo, Result, Step, Strategy, Thought

BRANCHES, DEPTH = 3, 3
INNER = sum(BRANCHES**depth for depth in range(DEPTH))
"""Thoughts above the last level of a whole tree"""
GOALS = list(product(range(BRANCHES), repeat=DEPTH))
Path = tuple[int, ...]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(StampModel(8, 64), kv_tokens=64) as engine:
        yield engine


def path_of(thought: Thought) -> Path:
    return tuple(map(int, thought.steps))


def branch(thought: Thought) -> list[str]:
    return [str(i) for i in range(BRANCHES)]


def closeness(goal: Path) -> Callable[[Path], float]:
    """How many steps of a path lead to the goal; nothing beyond the first that does not."""

    def score(path: Path) -> float:
        right = 0
        while right < len(path) and path[right] == goal[right]:
            right += 1
        return float(right) if right == len(path) else 0.0

    return score


def noise(path: Path) -> float:
    return float(np.random.default_rng([7, *path]).random())


def grow(
    engine: Engine, strategy: Strategy, score: Callable[[Path], float], goal: Path | None = None, **options: Any
) -> Result:
    def is_goal(thought: Thought) -> bool:
        return path_of(thought) == goal

    result = thoughts.search(
        engine,
        "problem",
        propose=options.pop("propose", branch),
        evaluate=lambda thought: score(path_of(thought)),
        strategy=strategy,
        goal=is_goal,
        **options,
    )
    check_tree(result)
    return result


def check_tree(result: Result) -> None:
    assert [thought.id for thought in result.thoughts] == list(range(len(result.thoughts)))
    states = [thought.state for thought in result.thoughts]
    assert len(set(states)) == len(states)
    for thought in result.thoughts[1:]:
        assert thought in thought.parent.children and thought.parent.id < thought.id
        assert thought.parent.expanded and thought.depth == thought.parent.depth + 1


def order(result: Result) -> list[Path]:
    """The thoughts in the order in which they were expanded, as their children's numbers tell."""
    expanded = [thought for thought in result.thoughts if thought.children]
    return [path_of(thought) for thought in sorted(expanded, key=lambda thought: thought.children[0].id)]


# -- what theory says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("breadth", [1, 2, 4, 100])
def test_breadth_first_expands_the_beam(engine: Engine, breadth: int) -> None:
    frontier, expected = 1, 0
    for _ in range(DEPTH):
        expected += frontier
        frontier = min(breadth, BRANCHES * frontier)
    for goal in GOALS:
        result = grow(engine, BreadthFirst(breadth=breadth, depth=DEPTH), closeness(goal), goal)
        assert result.ended == "solved" and [path_of(one) for one in result.solutions] == [goal]
        assert result.expansions == expected and result.best is result.solutions[0]


def test_a_beam_finds_what_ranks_within_it(engine: Engine) -> None:
    """The planted path has the worst score at each level: only a beam of the whole level keeps it."""
    goal = (2, 2, 2)
    worst = lambda path: -closeness(goal)(path)  # noqa: E731
    for breadth in (8, 9):
        result = grow(engine, BreadthFirst(breadth=breadth, depth=DEPTH), worst, goal)
        assert bool(result.solutions) == (breadth == 9)
    assert [path_of(one) for one in grow(engine, BreadthFirst(breadth=2, depth=2), worst).thoughts if one.pruned] == [
        (2,), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("goal", GOALS)
def test_depth_first_backtracks_in_order(engine: Engine, goal: Path) -> None:
    """Of whole subtrees before the goal, all that can be expanded was; with a true value, only the path."""
    subtree = [sum(BRANCHES**level for level in range(DEPTH - depth)) for depth in range(1, DEPTH + 1)]
    expected = DEPTH + sum(step * size for step, size in zip(goal[:-1], subtree, strict=False))
    blind = grow(engine, DepthFirst(depth=DEPTH), lambda path: 0.0, goal)
    assert blind.ended == "solved" and blind.expansions == expected
    assert order(blind) == sorted(order(blind))
    assert grow(engine, DepthFirst(depth=DEPTH), closeness(goal), goal).expansions == DEPTH


@pytest.mark.parametrize("goal", GOALS)
def test_depth_first_prunes_at_its_threshold(engine: Engine, goal: Path) -> None:
    """The right thought has the lowest score that passes, so each of its level is looked at, and none below."""
    right = closeness(goal)
    result = grow(engine, DepthFirst(depth=DEPTH, threshold=0.0), right, goal=None)
    assert result.ended == "complete" and result.expansions == DEPTH
    assert sum(one.pruned for one in result.thoughts) == DEPTH * (BRANCHES - 1)
    assert path_of(result.best) == goal


def best_first_order(score: Callable[[Path], float]) -> list[Path]:
    heap, found, serial = [(0.0, 0, ())], [], 1
    while heap:
        path = heappop(heap)[2]
        found.append(path)
        children = [(*path, step) for step in range(BRANCHES)]
        if len(path) + 1 < DEPTH:
            for child in children:
                heappush(heap, (-score(child), serial + child[-1], child))
        serial += BRANCHES
    return found


def test_best_first_takes_the_best_anywhere(engine: Engine) -> None:
    for goal in GOALS:
        assert grow(engine, BestFirst(depth=DEPTH), closeness(goal), goal).expansions == DEPTH
    assert order(grow(engine, BestFirst(depth=DEPTH), lambda path: 0.0)) == sorted(
        (path for size in range(DEPTH) for path in product(range(BRANCHES), repeat=size)), key=len
    )
    assert order(grow(engine, BestFirst(depth=DEPTH), noise)) == best_first_order(noise)
    wide = grow(engine, BestFirst(depth=DEPTH, width=4), noise)
    assert wide.ended == "complete" and wide.expansions == INNER


def uct_order(score: Callable[[Path], float], iterations: int, exploration: float) -> list[Path]:
    """A plain twin of Monte Carlo tree search, on paths."""
    visits: dict[Path, int] = {(): 0}
    totals: dict[Path, float] = {(): 0.0}
    children: dict[Path, list[Path]] = {}
    seen: list[float] = []
    found: list[Path] = []

    def dead(path: Path) -> bool:
        return len(path) == DEPTH or (path in children and all(map(dead, children[path])))

    def worth(path: Path) -> float:
        spread = max(seen) - min(seen)
        mean = (totals[path] / visits[path] - min(seen)) / spread if spread else 0.5
        return mean + exploration * math.sqrt(math.log(visits[path[:-1]]) / visits[path])

    while len(found) < iterations and not dead(()):
        path: Path = ()
        while path in children:
            path = max((child for child in children[path] if not dead(child)), key=worth)
        found.append(path)
        children[path] = [(*path, step) for step in range(BRANCHES)]
        for child in children[path]:
            seen.append(score(child))
            for size in range(DEPTH + 1):
                if size <= len(child):
                    visits[child[:size]] = visits.get(child[:size], 0) + 1
                    totals[child[:size]] = totals.get(child[:size], 0.0) + score(child)
    return found


@pytest.mark.parametrize("exploration", [0.0, 0.3, math.sqrt(2), 10.0])
@pytest.mark.parametrize("iterations", [1, 5, 100])
def test_monte_carlo_walks_by_uct(engine: Engine, exploration: float, iterations: int) -> None:
    strategy = MonteCarlo(depth=DEPTH, iterations=iterations, exploration=exploration)
    result = grow(engine, strategy, noise)
    assert order(result) == uct_order(noise, iterations, exploration)
    assert result.expansions == min(iterations, INNER)
    assert result.root.visits == len(result.thoughts) - 1
    for thought in result.thoughts:
        below = [one for one in result.thoughts if thought in one.lineage() and one.parent is not None]
        assert thought.visits == len(below)
        assert thought.total == pytest.approx(sum(one.score for one in below))


def test_monte_carlo_goes_straight_by_a_true_value(engine: Engine) -> None:
    for goal in GOALS:
        result = grow(engine, MonteCarlo(depth=DEPTH, exploration=0.0), closeness(goal), goal)
        assert result.ended == "solved" and result.expansions == DEPTH
    wide = grow(engine, MonteCarlo(depth=DEPTH, iterations=INNER, width=4), noise)
    assert wide.ended == "complete" and wide.expansions == INNER and wide.root.visits == len(wide.thoughts) - 1


STRATEGIES = [
    BreadthFirst(breadth=3, depth=DEPTH),
    DepthFirst(depth=DEPTH, threshold=0.2),
    BestFirst(depth=DEPTH, width=2),
    MonteCarlo(depth=DEPTH, iterations=9, width=2),
]


# -- merged -----------------------------------------------------------------------------------------------


def sums(thought: Thought) -> list[Step]:
    total = int(thought.state)
    return [Step(f"+{i}", state=str(total + i)) for i in (1, 2, 3, 1)]


def test_equal_states_are_one_thought(engine: Engine) -> None:
    """Of 3 ** 4 paths of steps 1 to 3, there are as many thoughts as sums."""
    judged: list[str] = []

    def evaluate(thought: Thought) -> float:
        judged.append(thought.state)
        return 0.0

    strategy = BreadthFirst(breadth=1000, depth=4)
    result = thoughts.search(engine, Step("from 0", state="0"), propose=sums, evaluate=evaluate, strategy=strategy)
    check_tree(result)
    assert sorted(map(int, judged)) == list(range(1, 13))
    assert sum(one.merged for one in result.thoughts) == 4 * result.expansions - 12
    assert result.root.merged == 1


def test_a_step_back_is_no_thought(engine: Engine) -> None:
    """A search in a graph with cycles ends by itself."""
    strategy = BestFirst(depth=1000)
    propose = lambda thought: [Step(d, state=str((int(thought.state) + int(d)) % 10)) for d in ("3", "7")]  # noqa: E731
    result = thoughts.search(engine, Step("", state="0"), propose=propose, evaluate=lambda _: 0.0, strategy=strategy)
    assert result.ended == "complete" and len(result.thoughts) == result.expansions == 10


# -- budgets, stops, resumption ---------------------------------------------------------------------------


def tree(result: Result) -> list[tuple[Any, ...]]:
    """All of a tree but what it cost."""
    return [
        (one.parent and one.parent.id, one.text, one.state, one.score, one.expanded, one.pruned, one.solved, one.visits)
        for one in result.thoughts
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_thoughts_are_bounded_and_the_rest_is_resumed(engine: Engine, strategy: Strategy) -> None:
    whole = grow(engine, strategy, noise)
    result: Result | None = None
    for most in range(1, len(whole.thoughts) + 1):
        if result is not None:
            result = Result.from_json(result.to_json())
        result = grow(engine, strategy, noise, budget=Budget(thoughts=most), resume=result)
        assert len(result.thoughts) <= most and result.thoughts[0].text == "problem"
        fresh = grow(engine, strategy, noise, budget=Budget(thoughts=most))
        assert tree(fresh) == tree(result)
    assert result.ended == ("thoughts" if most == len(whole.thoughts) and whole.ended != result.ended else whole.ended)
    result = grow(engine, strategy, noise, resume=result)
    assert tree(result) == tree(whole) and result.ended == whole.ended == "complete"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_stopped_search_goes_on(engine: Engine, strategy: Strategy, after: int) -> None:
    whole = grow(engine, strategy, noise)
    result: Result | None = None
    for _ in range(100):
        asked = iter(range(after))
        result = grow(engine, strategy, noise, stop=lambda asked=asked: next(asked, None) is None, resume=result)
        if result.ended == "complete":
            break
        assert result.ended == "stopped"
        result = Result.from_json(result.to_json())
        if after == 1:
            break
    result = grow(engine, strategy, noise, resume=result)
    assert tree(result) == tree(whole)


def test_more_solutions(engine: Engine) -> None:
    def search(solutions: int, resume: Result | None = None) -> Result:
        budget = Budget(solutions=solutions)
        return thoughts.search(
            engine, "", propose=branch, evaluate=lambda one: noise(path_of(one)), strategy=DepthFirst(depth=DEPTH),
            goal=lambda one: one.text == "2", budget=budget, resume=resume,
        )  # fmt: skip

    first = search(1)
    assert first.ended == "solved" and first.expansions == 1 and first.solutions == [first.thoughts[3]]
    assert tree(search(3, first)) == tree(search(3))
    everything = search(1000)
    assert everything.ended == "complete" and len(everything.solutions) == 1 + 2 + 4
    assert not any(one.children for one in everything.solutions)


def test_no_time(engine: Engine) -> None:
    result = grow(engine, BreadthFirst(), noise, budget=Budget(seconds=0))
    assert result.ended == "seconds" and len(result.thoughts) == 1


def test_a_verifier_that_never_answers_ends_with_the_time(engine: Engine) -> None:
    cancelled: list[Thought] = []

    async def never(thought: Thought) -> float:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(thought)
            raise
        return 1.0

    result = thoughts.search(engine, "", propose=branch, evaluate=never, budget=Budget(seconds=0.2))
    assert result.ended == "seconds" and len(cancelled) == BRANCHES
    assert [one.score for one in result.thoughts] == [None] * 4
    assert result.best is result.thoughts[1]


def test_the_best_has_a_score(engine: Engine) -> None:
    """A budget that ended between proposals and scores made the first of those that nobody judged the best."""
    result = grow(engine, BreadthFirst(breadth=3, depth=2), lambda path: float(path[-1]), budget=Budget(thoughts=7))
    assert result.ended == "thoughts" and [one.depth for one in result.thoughts] == [0, 1, 1, 1, 2, 2, 2]
    assert result.best is result.thoughts[3]
    result.thoughts[5].score = -1.0
    assert result.best is result.thoughts[5]
    result.thoughts[2].solved, result.thoughts[2].score = True, None
    assert result.best is result.thoughts[2]
    for thought in result.thoughts:
        thought.solved, thought.score = False, None
    assert result.best is result.thoughts[4]


def test_progress_tells_of_the_same_tree(engine: Engine) -> None:
    seen: list[tuple[int, str]] = []
    kept: set[int] = set()

    def progress(result: Result) -> None:
        seen.append((len(result.thoughts), result.ended))
        kept.add(id(result))

    result = grow(engine, BreadthFirst(breadth=2, depth=2), noise, progress=progress)
    assert kept == {id(result)} and {ended for _, ended in seen} == {"cancelled"}
    assert [size for size, _ in seen] == sorted(size for size, _ in seen) and seen[-1][0] == len(result.thoughts) == 10


# -- what callers do wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: BreadthFirst(breadth=0), lambda: BreadthFirst(depth=-1), lambda: DepthFirst(depth=0),
        lambda: BestFirst(width=0), lambda: MonteCarlo(iterations=0), lambda: MonteCarlo(exploration=math.nan),
        lambda: MonteCarlo(exploration=-1.0), lambda: Budget(thoughts=0), lambda: Budget(thoughts=1 << 40),
        lambda: Budget(tokens=-1), lambda: Budget(seconds=math.nan), lambda: Budget(seconds=True),
        lambda: Budget(solutions=0), lambda: thoughts.Propose(n=0), lambda: thoughts.Propose(ask=5),
        lambda: thoughts.Propose(params=5), lambda: thoughts.Choose(ask="?", values={}),
        lambda: thoughts.Choose(ask="?", values={"": 1.0}),
    ],
)  # fmt: skip
def test_bad_options_are_named(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidRequest):
        make()


def test_bad_arguments_are_named(engine: Engine) -> None:
    good: dict[str, Any] = {"engine": engine, "root": "", "propose": branch, "evaluate": lambda _: 0.0}
    for bad in (
        {"seed": -1}, {"engine": 5}, {"propose": 5}, {"propose": thoughts.Choose(ask="?", values={"a": 1.0})},
        {"evaluate": thoughts.Propose()}, {"root": []}, {"root": 5}, {"root": [[1]]},
        {"strategy": BreadthFirst}, {"strategy": "bfs"}, {"budget": 10}, {"budget": 0}, {"resume": "{}"},
        {"resume": {}}, {"goal": "24"}, {"progress": True}, {"stop": 5},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as error:
            thoughts.search(**(good | bad))
        assert [error.value.field] == list(bad)
    for bad, field in (
        ({"propose": lambda _: [5]}, "step"), ({"propose": lambda _: None}, "steps"),
        ({"propose": lambda _: "a"}, "steps"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest) as error:
            thoughts.search(**(good | bad))
        assert error.value.field == field
    result = thoughts.search(**good)
    for bad in ({"root": "other"}, {"seed": 1}):
        with pytest.raises(InvalidRequest, match="resumed"):
            thoughts.search(**(good | bad), resume=result)
    with pytest.raises(ZeroDivisionError) as own:
        thoughts.search(**(good | {"evaluate": lambda _: 1 / 0}))
    assert own.value.__context__ is None, "it once came with `no running event loop`"


@pytest.mark.parametrize("score", [2, np.float32(2), np.float64(2), np.int8(2), np.array(2.0), Fraction(2)])
def test_any_real_number_is_a_score(engine: Engine, score: Any) -> None:
    result = thoughts.search(engine, "", propose=branch, evaluate=lambda _: score, strategy=BreadthFirst(depth=1))
    assert {repr(one.score) for one in result.thoughts[1:]} == {"2.0"}
    assert Result.from_json(result.to_json()).thoughts[1].score == 2.0


@pytest.mark.parametrize(
    "score", [True, np.True_, None, "2", 2j, math.nan, -math.inf, np.float32("inf"), np.array(math.nan), np.ones(1)]
)
def test_what_is_no_finite_number_is_no_score(engine: Engine, score: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^score="):
        thoughts.search(engine, "", propose=branch, evaluate=lambda _: score)


@pytest.mark.parametrize("prompt", [[], 5, [[1]], [{"role": "user", "content": "Hello"}]])
def test_a_prompt_is_named_as_its_caller_does(engine: Engine, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt=.*engine\.chat_tokens\(messages\)"):
        thoughts.sample(engine, prompt, 2)
    with pytest.raises(InvalidRequest, match=r"^root=.*engine\.chat_tokens\(messages\)"):
        thoughts.search(engine, prompt, propose=branch, evaluate=lambda _: 0.0)


def test_within_a_loop_the_twin_is_named(engine: Engine) -> None:
    async def whole() -> Result:
        with pytest.raises(RadixgenError, match="_async"):
            grow(engine, BreadthFirst(), noise)
        return await thoughts.search_async(engine, "", propose=branch, evaluate=lambda _: 0.0)

    assert asyncio.run(whole()).ended == "complete"


def good_record() -> dict[str, Any]:
    one = Thought("root", "", id=0)
    return json.loads(Result([one, Thought("a", "a", one, 1, score=0.5)], 3).to_json())


def test_json_keeps_everything(engine: Engine) -> None:
    result = grow(engine, MonteCarlo(depth=DEPTH, iterations=5), noise, goal=(1,))
    result.thoughts[2].error, result.thoughts[3].token_ids = "lost", [1, 2]
    again = Result.from_json(result.to_json())
    check_tree(again)
    assert again.to_json() == result.to_json() and tree(again) == tree(result)
    assert json.loads(result.to_json())["ended"] == result.ended


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop("seed"), lambda r: r.update(version=2), lambda r: r.update(thoughts=[]),
        lambda r: r.update(thoughts=[5]), lambda r: r.update(ended="never"), lambda r: r.update(ended=[]),
        lambda r: r.update(seconds="1"), lambda r: r.update(cost={}), lambda r: r["cost"].update(requests=-1),
        lambda r: r["thoughts"][0].update(parent=0), lambda r: r["thoughts"][1].update(parent=1),
        lambda r: r["thoughts"][1].update(parent=None), lambda r: r["thoughts"][1].update(parent=True),
        lambda r: r["thoughts"][1].update(text=None), lambda r: r["thoughts"][1].update(score=math.inf),
        lambda r: r["thoughts"][1].update(expanded=1), lambda r: r["thoughts"][1].update(token_ids=["1"]),
        lambda r: r["thoughts"][1].update(cost=5), lambda r: r["thoughts"][1].pop("state"),
    ],
)  # fmt: skip
def test_bad_json_is_named(spoil: Callable[[dict[str, Any]], object]) -> None:
    record = good_record()
    Result.from_json(json.dumps(record))
    spoil(record)
    with pytest.raises(InvalidRequest):
        Result.from_json(json.dumps(record))


@pytest.mark.parametrize("text", ["", "5", "[]", "{", "null", "[" * 100_000, '{"version": 1}'])
def test_no_json_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Result.from_json(text)


# -- pictures ---------------------------------------------------------------------------------------------

NASTY = "<b>&amp;\"' [red]x[/] [/] \x00\x1b[31m\n ]]> é漢😀"


def test_pictures_show_any_text(engine: Engine) -> None:
    result = thoughts.search(
        engine, NASTY, propose=lambda one: [NASTY + str(i) for i in range(3)], evaluate=lambda one: 0.5,
        goal=lambda one: one.depth == 2, strategy=BreadthFirst(depth=3, breadth=2),
    )  # fmt: skip
    result.thoughts[1].error = NASTY
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(thoughts.picture(result))
    shown = console.export_text()
    assert shown.count("[red]x[/]") == len(result.thoughts) and "solved" in shown and "dead end" in shown
    assert "\x00" not in shown and "\x1b" not in shown
    drawn = ElementTree.fromstring(thoughts.svg(result))
    boxes = [one for one in drawn.iter() if one.tag.endswith("}g")]
    assert len(boxes) == len(result.thoughts)
    assert all("<b>&amp;" in "".join(box.itertext()) for box in boxes)
    assert not [one for one in drawn.iter() if one.tag.endswith("}b")]
