"""What grammars take of the steps that others share is counted, and ends the request that takes too much."""

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from test_structured import asking, run, serve

from radixgen import Engine
from radixgen.sampling.grammar_budget import LEAST_SECONDS, MOST_ALONE, MOST_DEBT, GrammarBudget
from radixgen.sampling.structured import MatcherState


@dataclass(eq=False)
class Asker:
    """A request, and what each mask of it costs."""

    cost: float
    grammar_debt: float = 0.0


@dataclass
class Steps:
    """A budget on clocks that only masks move."""

    own: float = 0.001
    now: float = 0.0
    walls: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget: Any = GrammarBudget(lambda: self.now, lambda: self.walls.pop(0))

    def step(self, *askers: tuple[Asker, int], alone: bool = False) -> dict[int, str]:
        """So many sequences of each."""
        self.walls = [0.0, self.own]
        self.budget.begin_step()
        sequences = [self._sequence(asker) for asker, count in askers for _ in range(count)]
        faults: dict[int, str] = self.budget.compute_masks(sequences, alone=alone)
        self.budget.end_step(alone=alone)
        return faults

    def _sequence(self, asker: Asker) -> Any:
        def allowed() -> None:
            self.now += asker.cost

        grammar = SimpleNamespace(allowed=allowed) if asker.cost else None
        return SimpleNamespace(request=asker, finish_reason=None, sampling=SimpleNamespace(grammar=grammar))


def test_cheap_grammars_go_on_for_ever() -> None:
    steps, askers = Steps(), [Asker(LEAST_SECONDS / 200), Asker(LEAST_SECONDS / 400), Asker(0.0)]
    for _ in range(1_000):
        assert not steps.step(*((asker, 100) for asker in askers))
    assert not any(asker.grammar_debt for asker in askers)


def test_a_costly_grammar_ends_alone() -> None:
    """Every sequence of it, once it has taken 100 ms more than its share."""
    steps, costly, cheap = Steps(), Asker(0.004), Asker(0.0001)
    ended: dict[int, str] = {}
    count = 0
    while not ended:
        count += 1
        ended = steps.step((cheap, 2), (costly, 4))
    share = LEAST_SECONDS / 2
    assert count == pytest.approx(1 + MOST_DEBT / (0.016 - share), abs=1)
    ended |= steps.step((cheap, 2), (costly, 4))
    assert set(ended) == {2, 3, 4, 5}
    assert all("GrammarFailed" in one and "at most 100 ms" in one for one in ended.values())
    assert not steps.step((cheap, 2)) and not cheap.grammar_debt


def test_no_step_waits_for_all_sequences_of_a_costly_grammar() -> None:
    steps, costly = Steps(), Asker(0.02)
    ended = steps.step((costly, 128))
    assert steps.now <= MOST_DEBT + LEAST_SECONDS + 0.02 + 1e-9
    assert set(ended) == set(range(6, 128))


def test_long_steps_have_room_for_more() -> None:
    steps, costly = Steps(own=0.05), Asker(0.01)
    for _ in range(1_000):
        assert not steps.step((costly, 5))


def test_debts_are_paid_off() -> None:
    steps, asker = Steps(), Asker(0.05)
    assert not steps.step((asker, 1))
    assert asker.grammar_debt == pytest.approx(0.05 - LEAST_SECONDS)
    asker.cost = 0.0001
    for _ in range(5):
        assert not steps.step((asker, 1))
    assert asker.grammar_debt == 0.0


def test_who_is_alone_harms_nobody() -> None:
    steps, asker = Steps(), Asker(0.02)
    for _ in range(100):
        assert not steps.step((asker, 5), alone=True)
    assert not asker.grammar_debt
    ended = steps.step((asker, 64), alone=True)
    assert ended and min(ended) == pytest.approx(MOST_ALONE / 0.02, abs=1) and "at most 250 ms" in ended[63]


def slow_masks(engine: Engine, monkeypatch: pytest.MonkeyPatch, cost: dict[str, float]) -> None:
    """Masks of a regular expression take so long, on the engine's clock."""
    now = [0.0]
    allowed = MatcherState.allowed
    texts: dict[int, float] = defaultdict(float)
    for regex, seconds in cost.items():
        grammar = engine.inputs.grammar(asking(regex=regex))
        texts[id(grammar)] = seconds

    def slowly(self: MatcherState) -> Any:
        now[0] += texts[id(self._grammar)] if self._place.allowed is None else 0.0
        return allowed(self)

    monkeypatch.setattr(MatcherState, "allowed", slowly)
    engine._core.grammars = GrammarBudget(lambda: now[0], lambda: 0.0)


def test_others_get_what_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [asking(regex="[ab]{20}", seed=1), asking(max_tokens=20, logprobs=2)]
    with serve() as engine:
        expected = run(engine, *others)
    with serve() as engine:
        slow_masks(engine, monkeypatch, {"[a-z]{40}": 0.03, "[ab]{20}": 0.0001})
        [first, costly, last] = run(engine, others[0], asking(regex="[a-z]{40}", n=4, seed=2), others[1])
        assert [first, last] == expected
        assert {one.finish_reason for one in costly} == {"error"}
        assert all("more than its share" in str(one.stop_reason) for one in costly)
        assert not engine.has_unfinished
        engine.check()


def test_a_fork_has_the_debt_of_its_origin() -> None:
    with serve() as engine:
        name = engine.submit([1, 2], asking(regex="[ab]{20}"))
        engine.step()
        engine._core.requests[name].grammar_debt = 0.05
        (fork,) = engine.fork(name)
        assert engine._core.requests[fork].grammar_debt == 0.05
