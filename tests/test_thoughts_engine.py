"""Trees of thoughts on an engine: what is asked and shared, what it costs, and that nothing is left behind."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import StampModel
from scripted import ScriptedStamps, tokenizer

from radixgen import AsyncEngine, Engine, Limits, RequestFailed, RequestOutput, SamplingParams, thoughts
from radixgen.thoughts import (
    BestFirst,
    BreadthFirst,
    Budget,
    Choose,
    DepthFirst,
    Evaluate,
    MonteCarlo,
    Propose,
    Result,
    Step,
    Thought,
)
from radixgen.thoughts.backend import SteppedBackend

ROOT = "Spell it.\n"
WORD = "cab"
JUDGE = Choose(ask="Good?", values={" yes": 1.0, " no": 0.0})
LINES = dict.fromkeys("abc", 1.0)


def script(before: str, line: str) -> dict[str, float]:
    """Any letter may follow; the judge knows whether those so far begin the word."""
    letters = "".join(before.splitlines()[1:])
    if line.startswith("G"):
        return {"Good? yes" if WORD.startswith(letters) else "Good? no": 1.0}
    if line.startswith("R"):
        return {f"Rate: {len(letters) if WORD.startswith(letters) else 0}": 1.0}
    return LINES


def spelled(thought: Thought) -> bool:
    return "".join(thought.steps) == WORD


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(ScriptedStamps(script), tokenizer=tokenizer(), kv_tokens=2048, debug=True) as engine:
        yield engine
        check_clean(engine)


def check_clean(engine: Engine) -> None:
    """Nothing of a search is left but what anyone may evict."""
    engine.check()
    stats = engine.stats()
    assert not engine.has_unfinished and engine.num_unfinished_requests == 0
    assert (stats.num_running, stats.num_waiting, stats.num_pins, stats.kv_tokens_pinned) == (0, 0, 0, 0)
    assert stats.kv_tokens_used == stats.kv_tokens_cached
    engine.reset_prefix_cache()
    assert engine.stats().kv_tokens_used == 0
    engine.check()


def tree(result: Result) -> list[tuple[Any, ...]]:
    return [
        (one.parent and one.parent.id, one.text, one.score, one.expanded, one.solved, one.token_ids)
        for one in result.thoughts
    ]


def spell(engine: Engine, strategy: thoughts.Strategy, **options: Any) -> Result:
    chosen = {"propose": Propose(n=16), "evaluate": JUDGE, "goal": spelled} | options
    return thoughts.search(engine, ROOT, strategy=strategy, **chosen)


# -- a scripted model that knows the answer ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expansions"),
    [
        (BreadthFirst(breadth=1, depth=3), 3),
        (BreadthFirst(breadth=2, depth=3), 1 + 2 + 2),
        (DepthFirst(depth=3), 3),
        (DepthFirst(depth=3, threshold=0.5), 3),
        (BestFirst(depth=3), 3),
        (MonteCarlo(depth=3, exploration=0.0), 3),
    ],
)
@pytest.mark.parametrize(
    "evaluate", [JUDGE, Evaluate(ask="Rate:", parse=lambda text, _: float(text), params=SamplingParams(stop="\n"))]
)
def test_the_planted_word_is_found(engine: Engine, strategy: Any, expansions: int, evaluate: Any) -> None:
    result = spell(engine, strategy, evaluate=evaluate)
    assert result.ended == "solved" and spelled(result.best) and result.expansions == expansions
    assert sorted(one.text for one in result.root.children) == ["a", "b", "c"]
    assert result.root.merged == 16 - 3
    good = [one for one in result.thoughts[1:] if one.score is not None and one.score > 0.5]
    assert {"".join(one.steps) for one in good} <= {"c", "ca"}
    assert result.computed_rows == engine.stats().computed_rows


def test_wrong_values_are_backtracked(engine: Engine) -> None:
    """A judge that praises what is wrong makes depth-first search look at everything else first."""
    liar = Choose(ask="Good?", values={" yes": 0.0, " no": 1.0})
    result = spell(engine, DepthFirst(depth=3), evaluate=liar)
    assert result.ended == "solved" and result.expansions == 1 + 2 * (1 + 3) + 1 + 2 + 1


def test_a_choice_is_weighed_by_probability() -> None:
    def unsure(before: str, line: str) -> dict[str, float]:
        return {"Good? yes": 3.0, "Good? maybe": 1.0, "Good? so": 4.0}

    with Engine(ScriptedStamps(unsure), tokenizer=tokenizer(), kv_tokens=512) as engine:
        choose = Choose(ask="Good?", values={" yes": 20.0, " maybe": 4.0})
        result = thoughts.search(engine, "", propose=lambda _: ["x"], evaluate=choose, strategy=BreadthFirst(depth=1))
        assert result.thoughts[1].score == pytest.approx((3 * 20 + 1 * 4) / 4)
        assert result.cost.requests == 2 and result.cost.generated_tokens == 0


def test_answers_without_a_number_count_as_nothing(engine: Engine) -> None:
    numbers = iter([None, 3.0, 1.0, None, None, None])
    evaluate = Evaluate(ask="Rate:", n=3, parse=lambda text, thought: next(numbers))
    result = spell(engine, BreadthFirst(depth=1), propose=lambda _: ["c", "d"], evaluate=evaluate)
    assert [one.score for one in result.thoughts[1:]] == [2.0, 0.0]


# -- prompts ----------------------------------------------------------------------------------------------


class Log:
    """Every request of a search on an `Engine`: its prompt, and the tokens that came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proposed: list[RequestOutput] = []
        self.scored: list[list[int]] = []
        self.seeds: list[int | None] = []
        generate, score = SteppedBackend.generate, SteppedBackend.score

        async def logged(server: SteppedBackend, prompt: list[int], params: SamplingParams) -> RequestOutput:
            self.seeds.append(params.seed)
            self.proposed.append(output := await generate(server, prompt, params))
            return output

        async def logged_score(server: SteppedBackend, prompt: list[int], rest: list[int]) -> RequestOutput:
            self.scored.append([*prompt, *rest])
            return await score(server, prompt, rest)

        monkeypatch.setattr(SteppedBackend, "generate", logged)
        monkeypatch.setattr(SteppedBackend, "score", logged_score)

    def paths(self) -> list[list[int]]:
        """What must be computed: all but the last token of everything."""
        whole = [[*out.prompt_token_ids, *one.token_ids] for out in self.proposed for one in out.outputs]
        return [path[:-1] for path in whole + self.scored]

    def texts(self) -> list[str]:
        return [tokenizer().decode(out.prompt_token_ids) for out in self.proposed]


@pytest.mark.parametrize("strategy", [BreadthFirst(breadth=3, depth=3), MonteCarlo(depth=3, iterations=9, width=3)])
def test_each_distinct_token_is_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, strategy: Any) -> None:
    """But for the last token of a path that is wholly cached, whose row is read again."""
    log = Log(monkeypatch)
    result = spell(engine, strategy, goal=None)
    distinct = len({tuple(path[: end + 1]) for path in log.paths() for end in range(len(path))})
    assert distinct <= result.computed_rows <= distinct + len(log.proposed)
    assert result.cost.requests == len(log.proposed) + len(log.scored)
    assert result.cost.prompt_tokens > 4 * result.computed_rows
    assert sum((one.cost for one in result.thoughts), thoughts.Cost()) == result.cost


@pytest.mark.parametrize("breadth", [1, 2, 9])
def test_a_level_is_two_bursts(engine: Engine, breadth: int) -> None:
    """However broad: a letter and an end of line are drawn in two steps, and all are judged in one."""
    spell(engine, BreadthFirst(breadth=breadth, depth=3), goal=None)
    assert engine.stats().steps == 3 * (2 + 1)


def test_questions_stand_behind_the_path(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    spell(engine, BreadthFirst(breadth=1, depth=2), goal=None)
    assert log.texts() == [ROOT, f"{ROOT}c\n"]
    judged = {tokenizer().decode(one) for one in log.scored}
    assert judged >= {f"{ROOT}c\nGood? yes", f"{ROOT}b\nGood? no", f"{ROOT}c\na\nGood? no"}


def test_templates_and_callables(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(monkeypatch)
    propose = Propose(ask="{not} {problem}|{steps}|{state}|{text}\n", params=SamplingParams(max_tokens=1))
    evaluate = Evaluate(ask=lambda one: [5, 6, one.id], parse=lambda *_: 1.0, params=SamplingParams(max_tokens=1))
    thoughts.search(
        engine, Step("{state}", state="s"), propose=propose, evaluate=evaluate, strategy=BreadthFirst(depth=2)
    )
    first, judged, second, *_ = log.proposed
    decode = tokenizer().decode
    assert decode(first.prompt_token_ids) == "{not} {state}||s|{state}\n"
    (letter,) = first.outputs[0].text
    assert judged.prompt_token_ids == [5, 6, 1]
    assert decode(second.prompt_token_ids) == f"{{not}} {{state}}|{letter}|s\n{letter}|{letter}\n"


def test_generated_tokens_are_kept(engine: Engine) -> None:
    """A step that continued the path is never tokenized again, whatever ended it."""
    choice = SamplingParams(max_tokens=9, choice=["a", "b"])
    newline = SamplingParams(stop_token_ids=[198])
    for params in (SamplingParams(stop="\n"), SamplingParams(max_tokens=1), newline, choice):
        result = spell(engine, BreadthFirst(depth=1), propose=Propose(n=4, params=params), evaluate=lambda _: 0.0)
        assert all(tokenizer().decode(one.token_ids) == f"{one.text}\n" for one in result.thoughts[1:])
    again = tokenizer()(ROOT)["input_ids"]
    chat = thoughts.search(engine, again, propose=Propose(n=16), evaluate=JUDGE, goal=spelled)
    assert chat.root.text == ROOT and tree(chat) == tree(spell(engine, BreadthFirst()))


@pytest.mark.parametrize("ends", [True, False])
def test_an_end_token_is_no_part_of_a_step(ends: bool) -> None:
    """The model's own, or none where a grammar ended the answer; what is scored is the same path."""
    model = ScriptedStamps(script)
    model.eos_token_ids = frozenset([198])
    params = SamplingParams(max_tokens=9, choice=None if ends else ["a", "b"])
    with Engine(model, tokenizer=tokenizer(), kv_tokens=2048, debug=True) as engine:
        result = spell(engine, BreadthFirst(depth=1), propose=Propose(n=4, params=params), evaluate=lambda _: 0.0)
        assert all(tokenizer().decode(one.token_ids) == f"{one.text}\n" for one in result.thoughts[1:])
        scored: list[Thought] = []
        drawn = thoughts.sample(engine, ROOT, 4, params=params, scorer=lambda one: scored.append(one) or 0.0)
        assert {one.text for one in scored} == {one.text for one in drawn.answers}
        assert all(tokenizer().decode(one.token_ids) == f"{one.text}\n" for one in scored)
        check_clean(engine)


def test_a_path_that_grows_too_long_is_a_dead_end() -> None:
    with Engine(ScriptedStamps(script, 20), tokenizer=tokenizer(), kv_tokens=512, debug=True) as engine:
        propose = Propose(n=4, params=SamplingParams(stop="\n", max_tokens=2))
        result = spell(engine, DepthFirst(depth=50), propose=propose, evaluate=lambda _: 0.0, goal=None)
        assert result.ended == "complete" and max(one.depth for one in result.thoughts) == 5
        deepest = [one for one in result.thoughts if one.depth == 5]
        assert all("context" in one.error and not one.children for one in deepest)
        check_clean(engine)


def test_one_answer_that_is_too_long_takes_the_others_along() -> None:
    """Pins that what a failed question had asked besides is cancelled."""
    model = ScriptedStamps(script, 40)
    with Engine(model, tokenizer=tokenizer(), kv_tokens=512, max_step_tokens=1, debug=True) as engine:
        judge = Choose(ask="Good?", values={" yes": 1.0, " no" * 20: 0.0})
        result = spell(engine, BreadthFirst(depth=2), propose=lambda _: ["c"], evaluate=judge)
        assert result.ended == "complete" and "context" in result.thoughts[1].error
        check_clean(engine)


# -- seeds, budgets, resumption ---------------------------------------------------------------------------

RANDOM = {"propose": Propose(n=3, params=SamplingParams(max_tokens=3)), "evaluate": JUDGE, "goal": None}
STRATEGIES = [
    BreadthFirst(breadth=2, depth=3),
    DepthFirst(depth=3, threshold=0.3),
    BestFirst(depth=3, width=2),
    MonteCarlo(depth=3, iterations=6, width=2),
]


@pytest.fixture
def noisy() -> Iterator[Engine]:
    """Random text of any bytes."""
    with Engine(StampModel(256, 256), tokenizer=tokenizer(), kv_tokens=1500, debug=True) as engine:
        yield engine
        check_clean(engine)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_seed_fixes_the_tree(noisy: Engine, strategy: Any) -> None:
    """Alone, beside other requests, from a warm cache, in an engine with a thread: the same tree."""
    first = spell(noisy, strategy, seed=5, **RANDOM)
    noisy.submit("something else", SamplingParams(max_tokens=200))
    assert tree(spell(noisy, strategy, seed=5, **RANDOM)) == tree(first)
    while noisy.has_unfinished:
        noisy.step()
    assert tree(spell(noisy, strategy, seed=6, **RANDOM)) != tree(first)

    async def whole() -> Result:
        small = Limits(max_waiting=2)
        own = Engine(StampModel(256, 256), tokenizer=tokenizer(), kv_tokens=1500, seed=9, limits=small)
        async with AsyncEngine(own) as engine:
            return await thoughts.search_async(engine, ROOT, strategy=strategy, seed=5, **RANDOM)

    assert tree(asyncio.run(whole())) == tree(first)


def test_every_request_has_a_seed_of_its_own(noisy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the search's seed, the problem, the path and the purpose; pins that siblings don't draw the same."""
    log = Log(monkeypatch)
    judge = Evaluate(ask="?", parse=lambda text, _: len(text))
    result = spell(noisy, STRATEGIES[0], **RANDOM | {"evaluate": judge})
    spell(noisy, STRATEGIES[0], seed=1, budget=Budget(thoughts=9), **RANDOM)
    thoughts.search(noisy, "Other.\n", strategy=BreadthFirst(depth=1), **RANDOM)
    assert len(log.seeds) == len(set(log.seeds)) > len(result.thoughts)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_are_bounded_and_the_rest_is_resumed(noisy: Engine, strategy: Any) -> None:
    options = RANDOM | {
        "evaluate": Evaluate(ask="?", parse=lambda text, _: len(text), params=SamplingParams(max_tokens=4))
    }
    whole = spell(noisy, strategy, **options)
    result, tokens = None, 0
    while result is None or result.ended == "tokens":
        tokens += 7
        result = result and Result.from_json(result.to_json())
        result = spell(noisy, strategy, budget=Budget(tokens=tokens), resume=result, **options)
        assert result.cost.generated_tokens <= tokens
    assert tree(result) == tree(whole) and result.ended == "complete"
    assert result.cost.requests == whole.cost.requests
    assert result.computed_rows <= noisy.stats().computed_rows


def test_what_a_search_knows_is_not_asked_again(noisy: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = spell(noisy, STRATEGIES[0], **RANDOM)
    log = Log(monkeypatch)
    again = spell(noisy, STRATEGIES[0], resume=Result.from_json(result.to_json()), **RANDOM)
    assert tree(again) == tree(result) and not log.proposed and not log.scored


# -- verifiers and tools ----------------------------------------------------------------------------------


def test_a_verifier_does_not_stall_the_engine(engine: Engine) -> None:
    """It answers only when another caller's request has come 50 tokens further: nothing else may wait for it."""
    other = engine.submit("aaaa", SamplingParams(max_tokens=400), output_kind="delta")
    steps: list[int] = []

    async def verify(thought: Thought) -> float:
        begun = engine.num_steps
        for _ in range(100_000):
            await asyncio.sleep(0)
            if engine.num_steps >= begun + 50:
                break
        steps.append(engine.num_steps - begun)
        return 1.0

    result = spell(engine, BreadthFirst(depth=1), evaluate=verify)
    assert result.ended == "complete" and steps == [50] * 3
    outputs = [output for output in iter_steps(engine) if output.request_id == other]
    assert sum(len(one.token_ids) for output in outputs for one in output.outputs) == 400


def iter_steps(engine: Engine) -> Iterator[RequestOutput]:
    while engine.has_unfinished:
        yield from engine.step()


def test_a_tool_may_use_the_engine() -> None:
    """On an `AsyncEngine`, a verifier that waits for requests of its own, while another stream goes on."""

    async def whole() -> None:
        own = Engine(ScriptedStamps(script), tokenizer=tokenizer(), kv_tokens=2048, debug=True)
        async with AsyncEngine(own) as engine:

            async def tool(thought: Thought) -> list[str]:
                params = SamplingParams(n=8, stop="\n", seed=len(thought.steps))
                outputs = [out async for out in engine.generate(ROOT + "x\n", params, cumulative=True)]
                return sorted({one.text for one in outputs[-1].outputs})

            async def verify(thought: Thought) -> float:
                scores = await engine.score(ROOT + "".join(f"{one}\n" for one in thought.steps) + "Good?", [" yes"])
                return sum(scores[0])

            result = await thoughts.search_async(engine, ROOT, propose=tool, evaluate=verify, goal=spelled)
            assert result.ended == "solved" and spelled(result.best) and result.cost.requests == 0
            assert result.computed_rows > 0
            await engine.check()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_callers_outputs_are_kept(engine: Engine) -> None:
    other = engine.submit("abc", SamplingParams(max_tokens=5), output_kind="delta")
    spell(engine, BreadthFirst(depth=2))
    outputs = engine.step()
    assert sum(len(one.token_ids) for out in outputs if out.request_id == other for one in out.outputs) == 5


# -- nothing is left --------------------------------------------------------------------------------------


def test_ctrl_c(engine: Engine) -> None:
    seen: list[Result] = []

    def interrupt(result: Result) -> None:
        seen.append(result)
        if len(seen) == 9:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        spell(engine, BreadthFirst(), progress=interrupt)
    check_clean(engine)
    assert seen[-1].ended == "cancelled" and len(seen[-1].thoughts) > 1
    whole = spell(engine, BreadthFirst(), resume=Result.from_json(seen[-1].to_json()))
    assert tree(whole) == tree(spell(engine, BreadthFirst()))


def test_an_error_of_a_callable_leaves_nothing(engine: Engine) -> None:
    def fail(thought: Thought) -> float:
        raise OSError("no verifier here")

    with pytest.raises(OSError, match="no verifier"):
        spell(engine, BreadthFirst(), evaluate=fail)
    check_clean(engine)


def test_a_model_that_fails(engine: Engine) -> None:
    """The root's request fails: so does the search. A later one fails: its thought is a dead end."""
    model: Any = engine._model

    def search(fail_at: int) -> Result:
        seen = 0

        def fail(result: Result) -> None:
            nonlocal seen
            seen += 1
            if seen == fail_at:
                plain = model.run

                def broken(*arguments: Any) -> Any:
                    model.run = plain if len(broken_at) else broken
                    broken_at.append(1)
                    raise ValueError("planted")

                broken_at: list[int] = []
                model.run = broken

        return spell(engine, DepthFirst(depth=2), propose=Propose(n=4), progress=fail, goal=None)

    with pytest.raises(RequestFailed, match="planted"):
        search(1)
    check_clean(engine)
    result = search(3)
    assert result.ended == "complete" and any("planted" in (one.error or "") for one in result.thoughts)


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 20, 50])
def test_a_cancelled_task_leaves_nothing(delay: int) -> None:
    """The search is one that no machine ends within the delay."""
    long = MonteCarlo(depth=30, iterations=1000)

    async def whole() -> None:
        own = Engine(StampModel(256, 256), tokenizer=tokenizer(), kv_tokens=1500, debug=True)
        async with AsyncEngine(own) as engine:
            task = asyncio.create_task(thoughts.search_async(engine, ROOT, strategy=long, **RANDOM))
            for _ in range(delay):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stats = await engine.stats()
            await engine.check()
            assert (stats.num_running, stats.num_waiting, stats.num_pins) == (0, 0, 0)
            assert not engine._queues

    asyncio.run(asyncio.wait_for(whole(), 60))


class Planted(Exception):
    pass


def raise_at(count: int, error: type[BaseException] | None) -> Callable[..., bool]:
    """Raises at its call number `count`, or without an error, says True from there on."""
    calls = iter(range(count))

    def call(*_: object) -> bool:
        if next(calls, None) is not None:
            return False
        if error is not None:
            raise error
        return True

    return call


strategies = st.one_of(
    st.builds(BreadthFirst, breadth=st.integers(1, 4), depth=st.integers(1, 3)),
    st.builds(DepthFirst, depth=st.integers(1, 3), threshold=st.sampled_from([None, 0.3, 0.6])),
    st.builds(BestFirst, depth=st.integers(1, 4), width=st.integers(1, 4)),
    st.builds(MonteCarlo, depth=st.integers(1, 4), iterations=st.integers(1, 9), width=st.integers(1, 3)),
)
budgets = st.builds(
    Budget,
    thoughts=st.integers(1, 40),
    tokens=st.none() | st.integers(0, 200),
    seconds=st.sampled_from([None, None, 0.02, 60]),
)


@st.composite
def proposals(draw: st.DrawFn) -> Propose:
    params = SamplingParams(max_tokens=draw(st.integers(1, 6)), temperature=draw(st.sampled_from([0.0, 1.0])), stop="a")
    return Propose(ask=draw(st.sampled_from(["", "?", "{state}!"])), n=draw(st.integers(1, 5)), params=params)


@st.composite
def evaluations(draw: st.DrawFn) -> Any:
    async def slow(thought: Thought) -> float:
        for _ in range(thought.id % 7):
            await asyncio.sleep(0)
        return thought.id % 3 / 2

    params = SamplingParams(max_tokens=draw(st.integers(1, 4)))
    judge = Evaluate(ask="?", n=draw(st.integers(1, 2)), parse=lambda text, _: len(text) / 4, params=params)
    return draw(st.sampled_from([JUDGE, judge, slow, lambda one: one.id % 3 / 2]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    strategy=strategies, propose=proposals(), evaluate=evaluations(), budget=budgets, seed=st.integers(0, 9),
    end=st.sampled_from([None, "stop", "raise", "cancel", "interrupt", "fail"]), at=st.integers(0, 30),
    slots=st.integers(80, 400), waiting=st.sampled_from([2, 100]), resumed=st.booleans(),
)  # fmt: skip
def test_random_searches_leave_the_pool_as_they_found_it(
    strategy: Any, propose: Any, evaluate: Any, budget: Budget, seed: int, end: str | None, at: int, slots: int,
    waiting: int, resumed: bool,
) -> None:  # fmt: skip
    model = StampModel(256, 80)
    limits = Limits(max_waiting=waiting, max_num_seqs=8)
    with Engine(model, tokenizer=tokenizer(), kv_tokens=slots, limits=limits, debug=True) as engine:
        options: dict[str, Any] = {"propose": propose, "evaluate": evaluate, "strategy": strategy, "seed": seed}
        latest: list[Result] = []
        ending = raise_at(at, {"raise": Planted, "cancel": asyncio.CancelledError}.get(end or ""))

        def progress(result: Result) -> None:
            latest.append(result)
            if end in ("raise", "cancel"):
                ending()
            elif end in ("interrupt", "fail") and len(latest) == at:
                if end == "interrupt":
                    signal.raise_signal(signal.SIGINT)
                else:
                    model.fail_next = ValueError("planted")

        stop = ending if end == "stop" else None
        try:
            latest.append(thoughts.search(engine, "root\n", budget=budget, progress=progress, stop=stop, **options))
        except (Planted, asyncio.CancelledError, KeyboardInterrupt, RequestFailed):
            assert end is not None
        model.fail_next = None
        check_clean(engine)
        if latest:
            result = latest[-1]
            assert len(result.thoughts) <= budget.thoughts
            assert budget.tokens is None or result.cost.generated_tokens <= budget.tokens
            if resumed and end != "fail":
                again = Result.from_json(result.to_json())
                bounded = Budget(thoughts=60)
                resumed_tree = tree(thoughts.search(engine, "root\n", budget=bounded, resume=again, **options))
                assert resumed_tree == tree(thoughts.search(engine, "root\n", budget=bounded, **options))
                check_clean(engine)


# -- many answers to one prompt ---------------------------------------------------------------------------


def answers(before: str, line: str) -> dict[str, float]:
    if line.startswith("x"):
        return {}
    if "Good" in line or before.count("\n") > 1:
        return {"Good? yes" if before.endswith("is 3\n") else "Good? no": 1.0}
    return {"Say: it is 1": 4.0, "Say: so it is 1": 4.0, "Say: it is 2": 5.0, "Say: it is 3": 3.0, "Say: none": 2.0}


def number(text: str) -> str | None:
    return text[-1] if text[-1].isdigit() else None


def test_votes_and_scorers() -> None:
    with Engine(ScriptedStamps(answers), tokenizer=tokenizer(), kv_tokens=2048, debug=True) as engine:
        params = SamplingParams(max_tokens=30, stop="\n")

        def sample(n: int = 64, **options: Any) -> thoughts.Samples:
            return thoughts.sample(engine, "Tell.\nSay:", n, params=params, **options)

        voted = sample(vote=number)
        assert len(voted.answers) == 64 and voted.cost.requests == 1
        counted = {str(i): sum(number(one.text) == str(i) for one in voted.answers) for i in (1, 2, 3)}
        assert voted.votes == counted and sum(counted.values()) < 64
        assert voted.best.vote == "1" == max(counted, key=counted.__getitem__)
        assert sample(vote=number) == voted or engine.stats().cached_prompt_tokens
        assert [one.text for one in sample(vote=number).answers] == [one.text for one in voted.answers]
        assert [one.text for one in sample(seed=1).answers] != [one.text for one in voted.answers]

        best = sample(scorer=JUDGE)
        assert best.best.text == " it is 3" and best.best.score == pytest.approx(1.0)
        assert {one.score > 0.5 for one in best.answers if one.text[-1] == "3"} == {True}
        assert best.cost.requests == 1 + 2 * 5
        weighed = sample(vote=number, scorer=JUDGE)
        assert weighed.best.vote == "3" and weighed.votes["1"] == pytest.approx(0.0, abs=1e-6)
        assert sample(vote=lambda text: None).best == sample().answers[0]
        check_clean(engine)

    async def whole() -> thoughts.Samples:
        async def vote(text: str) -> str | None:
            await asyncio.sleep(0)
            return number(text)

        own = Engine(ScriptedStamps(answers), tokenizer=tokenizer(), kv_tokens=2048)
        async with AsyncEngine(own) as engine:
            return await thoughts.sample_async(engine, "Tell.\nSay:", 64, params=params, vote=vote)

    assert asyncio.run(whole()).votes == voted.votes
