"""The examples run at toy size, and their checkers can tell right from wrong."""

import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import game24
import pytest
import word_problems

from radixgen.thoughts import Result, Thought

EXAMPLES = Path(__file__).parent.parent / "examples"


def numbers(*values: int) -> game24.Numbers:
    return tuple(map(Fraction, values))


def reachable(values: game24.Numbers) -> set[Fraction]:
    """Every value of an expression over all of `values`, negative ones on the way too."""
    if len(values) == 1:
        return set(values)
    found = set()
    for size in range(1, len(values)):
        for order in set(permutations(values)):
            for a, b in product(reachable(order[:size]), reachable(order[size:])):
                found |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return found


def test_the_solver_is_exact() -> None:
    assert game24.solution(numbers(1, 1, 1, 1)) is None and 24 not in reachable(numbers(1, 1, 1, 1))
    for puzzle in [numbers(3, 3, 8, 8), numbers(1, 5, 5, 5), *game24.puzzles(3, seed=1)]:
        assert 24 in reachable(puzzle)
        left: game24.Numbers | None = puzzle
        for line in game24.solution(puzzle):
            left = game24.after(left, line)
        assert left == (24,)
    assert game24.puzzles(5) == game24.puzzles(5) and len(set(game24.puzzles(20))) == 20


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("4 + 8 = 12 (left: 6 12 13)", True),
        ("8 + 4 = 12 (left: 13 6 12)", True),
        ("4 / 8 = 1/2 (left: 1/2 6 13)", True),
        ("4 + 8 = 13 (left: 6 13 13)", False),
        ("4 + 8 = 12 (left: 6 12)", False),
        ("4 + 8 = 12 (left: 6 12 24)", False),
        ("4 + 4 = 8 (left: 6 8 13)", False),
        ("12 * 2 = 24 (left: 24)", False),
        ("4 / 0 = 4 (left: 4 6 13)", False),
        ("1/0 + 4 = 4 (left: 4)", False),
        ("4 + 8 = 12", False),
        ("", False),
    ],
)
def test_every_line_is_checked(line: str, right: bool) -> None:
    assert (game24.after(numbers(4, 6, 8, 13), line) is not None) == right


def test_a_solution_is_checked_from_the_first_line() -> None:
    """A last line that claims to reach 24 from numbers that were never there is none."""
    root = Thought("", "4 4 6 8")
    good = ["4 + 8 = 12 (left: 4 6 12)", "6 - 4 = 2 (left: 2 12)", "2 * 12 = 24 (left: 24)"]
    for lines, right in ((good, True), (good[:2], False), (good[1:], False), (good[2:], False), ([], False)):
        thought = root
        for line in lines:
            thought = Thought(line, "24", thought)
        assert game24.reaches_24(thought) == right


@pytest.mark.parametrize("strategy", game24.STRATEGIES)
def test_game24_with_a_script(strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn = tmp_path / "tree.json", tmp_path / "tree.svg"
    options = ["--puzzles", "1", "--breadth", "3", "--proposals", "12", "--json", str(kept), "--svg", str(drawn)]
    (result,) = game24.main(["--strategy", strategy, *options])
    assert game24.reaches_24(result.best) and result.ended == "solved"
    assert all(game24.after(game24.numbers_of(t.parent.state), t.text) for t in result.thoughts[1:])
    assert Result.from_json(kept.read_text()).best.steps == result.best.steps
    assert drawn.read_text().startswith("<svg")
    assert "1 of 1 solved" in capsys.readouterr().out


def test_game24_with_a_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = game24.main(["--model", "smollm2", "--puzzles", "1", "--breadth", "1", "--proposals", "2"])
    assert result.cost.prompt_tokens > 0 and result.computed_rows > 0
    assert "requests" in capsys.readouterr().out


def test_word_problems(capsys: pytest.CaptureFixture[str]) -> None:
    for problem in word_problems.problems(50):
        assert problem.answer >= 0
        (true,) = (line for line, weight in word_problems.script(problem.prompt, "Answer:").items() if weight == 5)
        assert word_problems.last_number(true) == str(problem.answer)
    single, voted = word_problems.main(["--problems", "2", "--answers", "24"])
    assert 0 < single < 1 and voted == 1
    assert "the vote 100%" in capsys.readouterr().out


def test_the_examples_are_programs() -> None:
    """As from a checkout, in which radixgen is installed."""
    command = [sys.executable, EXAMPLES / "game24.py", "--help"]
    environment = {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "--strategy" in done.stdout
