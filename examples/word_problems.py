"""Self-consistency on arithmetic word problems: many answers to each, and the number that most of them end with.

    python examples/word_problems.py                    # a script that is right about half of the time
    python examples/word_problems.py --model smollm2    # a real model of 135M parameters, which is bad at this

The method is that of arXiv 2203.11171; problems and prompt are made here. The same answers are counted twice: one by
one (how often a single answer is right), and by their vote.
"""

import argparse
import random
import re
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track
from rich.table import Table
from scripted_model import ScriptedModel, tokenizer

from radixgen import Engine, SamplingParams, thoughts
from radixgen.progress import announce_loading, waiting
from radixgen.thoughts import Samples

HEADER = """\
Question: Tom has 3 bags with 4 marbles in each and finds 5 more. How many marbles does he have?
Answer: 3 * 4 = 12. 12 + 5 = 17. The answer is 17.

Question: Eva has 2 boxes with 9 pens in each and gives 6 away. How many pens does she have?
Answer: 2 * 9 = 18. 18 - 6 = 12. The answer is 12.

"""
PEOPLE = (("Ana", "she"), ("Ben", "he"), ("Lea", "she"), ("Max", "he"))
THINGS = (("bags", "apples"), ("jars", "beans"), ("trays", "eggs"), ("sets", "cards"))
QUESTION = re.compile(r"(\d+) \w+ with (\d+) \w+ in each and (finds|gives) (\d+)")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, and the number that answers it."""

    question: str
    answer: int

    @property
    def prompt(self) -> str:
        return f"{HEADER}Question: {self.question}\nAnswer:"


def problems(count: int, seed: int = 0) -> list[Problem]:
    draw = random.Random(seed)
    return [_problem(draw) for _ in range(count)]


def _problem(draw: random.Random) -> Problem:
    (name, pronoun), (groups, things) = draw.choice(PEOPLE), draw.choice(THINGS)
    number, size, change = draw.randint(2, 9), draw.randint(3, 9), draw.randint(1, 5)
    more = draw.random() < 0.5
    deed = f"finds {change} more" if more else f"gives {change} away"
    question = f"{name} has {number} {groups} with {size} {things} in each and {deed}. "
    question += f"How many {things} does {pronoun} have?"
    return Problem(question, number * size + (change if more else -change))


def last_number(answer: str) -> str | None:
    """What an answer votes for."""
    numbers = re.findall(r"-?\d+", answer)
    return str(int(numbers[-1])) if numbers else None


def script(before: str, line: str) -> dict[str, float]:
    """What the scripted model answers: right about half of the time, else wrong in one of five ways."""
    number, size, deed, change = QUESTION.findall(before)[-1]
    product, change = int(number) * int(size), int(change)
    sign, true = ("+", product + change) if deed == "finds" else ("-", product - change)
    answers = {true: 5.0} | {true + error: 1.0 for error in (-2, -1, 1, 2, 10)}
    return {
        f"Answer: {number} * {size} = {product}. {product} {sign} {change} = {answer}. The answer is {answer}.": weight
        for answer, weight in answers.items()
    }


def ask(engine: Engine, problem: Problem, count: int, seed: int) -> Samples:
    params = SamplingParams(temperature=0.7, max_tokens=64, stop="\n")
    return thoughts.sample(engine, problem.prompt, count, params=params, vote=last_number, seed=seed)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns how often one answer was right, and how often the vote was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scripted", help="scripted, or whatever `Engine` takes")
    parser.add_argument("--problems", type=int, default=5)
    parser.add_argument("--answers", type=int, default=16, help="drawn for each problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-tokens", type=int, default=8192)
    chosen = parser.parse_args(arguments)
    console = Console()
    with waiting(console) as say:
        if chosen.model == "scripted":
            engine = Engine(ScriptedModel(script), tokenizer=tokenizer(), kv_tokens=chosen.kv_tokens)
        else:
            announce_loading(say, chosen.model)
            engine = Engine(chosen.model, kv_tokens=chosen.kv_tokens)
    table = Table("question", "answer", "voted", "votes")
    single = voted = 0.0
    with engine:
        for problem in track(problems(chosen.problems, chosen.seed), "asking", console=console, transient=True):
            found = ask(engine, problem, chosen.answers, chosen.seed)
            right = [one.vote == str(problem.answer) for one in found.answers]
            single += sum(right) / len(right)
            voted += found.best.vote == str(problem.answer)
            votes = ", ".join(f"{vote}: {count:g}" for vote, count in sorted(found.votes.items(), key=lambda v: -v[1]))
            table.add_row(problem.question, str(problem.answer), str(found.best.vote), votes)
        stats = engine.stats()
    console.print(table)
    single, voted = single / chosen.problems, voted / chosen.problems
    console.print(f"one answer is right {single:.0%} of the time, the vote {voted:.0%}")
    console.print(f"{stats.computed_rows:,} rows computed, {stats.generated_tokens:,} tokens generated")
    return single, voted


if __name__ == "__main__":
    main()
