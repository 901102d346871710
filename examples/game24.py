"""Game of 24 by a tree of thoughts: combine four numbers by + - * / to 24, each used once.

    python examples/game24.py                         # a script that knows the answers: what the search does and costs
    python examples/game24.py --model smollm2         # a real model of 135M parameters, which is bad at this

The task is that of the Tree of Thoughts paper (arXiv 2305.10601, section 4.1); the prompts are ours. A thought is one
line, such as `4 + 8 = 12 (left: 6 12 13)`; up to 8 are drawn for each, lines that are wrong arithmetic are thrown away,
and the model judges what is left by the odds of the words sure, likely and impossible. SmolLM2-135M rarely adds up, so
few of its lines survive: with it, look at the costs rather than at the answers.
"""

import argparse
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from scripted_model import ScriptedModel, tokenizer

from radixgen import Engine, SamplingParams, thoughts
from radixgen.progress import announce_loading, waiting
from radixgen.thoughts import Choose, Propose, Result, Step, Thought

Numbers = tuple[Fraction, ...]
LINE = re.compile(r"(\d+(?:/\d+)?) ([-+*/]) (\d+(?:/\d+)?) = (\d+(?:/\d+)?) \(left: ([\d/ ]+)\)")
HEADER = """\
Reach 24. Each line takes two of the numbers, combines them by + - * or /, and tells which numbers are left.

Numbers: 4 4 6 8
4 + 8 = 12 (left: 4 6 12)
6 - 4 = 2 (left: 2 12)
2 * 12 = 24 (left: 24)

Numbers: 2 9 10 12
12 * 2 = 24 (left: 9 10 24)
10 - 9 = 1 (left: 1 24)
24 * 1 = 24 (left: 24)

"""
JUDGE = Choose(ask="Can these reach 24? Verdict:", values={" sure": 20.0, " likely": 1.0, " impossible": 0.001})


# -- the game ---------------------------------------------------------------------------------------------


def show(numbers: Numbers) -> str:
    return " ".join(map(str, sorted(numbers)))


def moves(numbers: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Every correct line from `numbers`, with the numbers that it leaves; none below 0."""
    for i, j in combinations(range(len(numbers)), 2):
        rest = tuple(number for place, number in enumerate(numbers) if place not in (i, j))
        high, low = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        results = [(high, "+", low, high + low), (high, "*", low, high * low), (high, "-", low, high - low)]
        results += [(a, "/", b, a / b) for a, b in {(high, low), (low, high)} if b]
        for a, sign, b, value in results:
            left = (*rest, value)
            yield f"{a} {sign} {b} = {value} (left: {show(left)})", left


@cache
def solution(numbers: Numbers) -> list[str] | None:
    """Lines that lead to 24, or None where there are none; tries everything."""
    if len(numbers) == 1:
        return [] if numbers[0] == 24 else None
    for line, left in moves(numbers):
        rest = solution(tuple(sorted(left)))
        if rest is not None:
            return [line, *rest]
    return None


def puzzles(count: int, seed: int = 0) -> list[Numbers]:
    """`count` draws of four numbers from 1 to 13 that have a solution."""
    draw = random.Random(seed)
    found: list[Numbers] = []
    while len(found) < count:
        numbers = tuple(sorted(Fraction(draw.randint(1, 13)) for _ in range(4)))
        if numbers not in found and solution(numbers) is not None:
            found.append(numbers)
    return found


def after(numbers: Numbers, line: str) -> Numbers | None:
    """What `line` leaves of `numbers`; None unless it uses two of them and all of its arithmetic is right."""
    match = LINE.fullmatch(line)
    if match is None:
        return None
    try:
        a, b, value = (Fraction(match[group]) for group in (1, 3, 4))
        left = [Fraction(number) for number in match[5].split()]
        true = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[match[2]]
    except ZeroDivisionError:
        return None
    rest = list(numbers)
    for number in (a, b):
        if number not in rest:
            return None
        rest.remove(number)
    kept = tuple(sorted([*rest, value]))
    return kept if value == true and kept == tuple(sorted(left)) else None


def numbers_of(state: str) -> Numbers:
    return tuple(Fraction(number) for number in state.split())


def reaches_24(thought: Thought) -> bool:
    """Whether the lines of a thought, each checked from the first on, use up the numbers and end with 24."""
    root = list(thought.lineage())[-1]
    numbers: Numbers | None = numbers_of(root.state)
    for line in thought.steps:
        numbers = None if numbers is None else after(numbers, line)
    return numbers == (24,)


# -- the search -------------------------------------------------------------------------------------------


def root_of(numbers: Numbers) -> Step:
    return Step(f"{HEADER}Numbers: {show(numbers)}\n", state=show(numbers))


def correct_lines(answer: str, thought: Thought) -> list[Step]:
    """The answer as a step, where its arithmetic is right. Equal numbers left are equal states."""
    left = after(numbers_of(thought.state), answer.strip())
    return [] if left is None else [Step(answer.strip(), state=show(left))]


def proposals(count: int) -> Propose:
    params = SamplingParams(temperature=1.0, max_tokens=48, stop="\n")
    return Propose(n=count, params=params, parse=correct_lines)


def script(before: str, line: str) -> dict[str, float]:
    """What the scripted model writes: of the correct lines, the one that leads to 24 four times as likely; now and
    then a wrong one; and a verdict that is always right.
    """
    last = before.rstrip("\n").rpartition("\n")[2]
    numbers = numbers_of(last.partition("left: ")[2].rstrip(")") or last.removeprefix("Numbers: "))
    steps = solution(numbers)
    if line.startswith(JUDGE.ask[: len(line)]) and line:
        verdict = "impossible" if steps is None else "sure"
        return {f"{JUDGE.ask} {verdict}": 1.0}
    lines = {text: 1.0 for text, _ in moves(numbers)}
    if steps:
        lines[steps[0]] = 4.0
    return lines | {f"{numbers[0]} + {numbers[-1]} = 99 (left: 24)": 1.0}


STRATEGIES = {
    "breadth-first": lambda breadth: thoughts.BreadthFirst(breadth=breadth, depth=3),
    "depth-first": lambda breadth: thoughts.DepthFirst(depth=3, threshold=0.5),
    "best-first": lambda breadth: thoughts.BestFirst(depth=3),
    "monte-carlo": lambda breadth: thoughts.MonteCarlo(depth=3, iterations=32, width=breadth),
}


def play(
    engine: Engine, numbers: Numbers, strategy: thoughts.Strategy, count: int, seed: int, console: Console
) -> Result:
    """Search for one puzzle, and show how it goes."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(show(numbers), total=None)

        def progress(result: Result) -> None:
            text = f"{show(numbers)}: {len(result.thoughts)} thoughts, {result.cost.requests} requests"
            bar.update(task, description=text)

        return thoughts.search(
            engine,
            root_of(numbers),
            propose=proposals(count),
            evaluate=JUDGE,
            strategy=strategy,
            goal=reaches_24,
            seed=seed,
            progress=progress,
        )


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scripted", help="scripted, or whatever `Engine` takes")
    parser.add_argument("--strategy", choices=STRATEGIES, default="breadth-first")
    parser.add_argument("--puzzles", type=int, default=3)
    parser.add_argument("--breadth", type=int, default=5)
    parser.add_argument("--proposals", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path, help="keep the last tree here")
    parser.add_argument("--svg", type=Path, help="draw the last tree here")
    chosen = parser.parse_args(arguments)
    console = Console()
    with waiting(console) as say:
        if chosen.model == "scripted":
            engine = Engine(ScriptedModel(script), tokenizer=tokenizer(), kv_tokens=chosen.kv_tokens)
        else:
            announce_loading(say, chosen.model)
            engine = Engine(chosen.model, kv_tokens=chosen.kv_tokens)
    results = []
    with engine:
        strategy = STRATEGIES[chosen.strategy](chosen.breadth)
        for numbers in puzzles(chosen.puzzles, chosen.seed):
            results.append(result := play(engine, numbers, strategy, chosen.proposals, chosen.seed, console))
            console.print(thoughts.picture(result))
            cost = result.cost
            console.print(
                f"{show(numbers)}: {'solved' if result.solutions else 'not solved'}, {result.expansions} expansions, "
                f"{cost.requests} requests, {cost.prompt_tokens:,} prompt and {cost.generated_tokens:,} generated "
                f"tokens, {result.computed_rows:,} computed, {result.seconds:.1f} s"
            )
    solved = sum(bool(result.solutions) for result in results)
    console.print(f"[bold]{solved} of {len(results)} solved")
    if results and chosen.json is not None:
        chosen.json.write_text(results[-1].to_json(), encoding="utf-8")
    if results and chosen.svg is not None:
        chosen.svg.write_text(thoughts.svg(results[-1]), encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
