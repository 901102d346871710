"""What to ask about a thought: which steps follow it, and how good it is.

A question is a callable from the thought to a prompt, or text. Text without fields is put behind the thought's path,
so that all that is asked of a thought, and of those below it, shares that path; text with any of the fields
`{problem}`, `{steps}`, `{state}`, `{text}` is the whole prompt. The path is the root's text, then each step on a line
of its own; each is tokenized by itself, once, and a step that continued the path is kept as it was generated.
"""

import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from radixgen.core import CompletionOutput, InvalidRequest, RequestOutput, SamplingParams, check_integer, end_token
from radixgen.thoughts.server import Server, called, completed, together
from radixgen.thoughts.thought import Cost, Step, Thought, cost_of

Question = str | Callable[[Thought], str | Sequence[int]]
Steps = Iterable[str | Step]
Proposer = Callable[[Thought], Steps | Awaitable[Steps]]
Evaluator = Callable[[Thought], float | Awaitable[float]]
_FIELD = re.compile(r"\{(problem|steps|state|text)\}")
_END = "\n"
"""What ends a step on a path."""


def lines(text: str, thought: Thought) -> list[str]:
    """Each line of an answer about a thought that is not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Ask the model for steps.

    ask: the question; by default none, so that the model goes on with the path.
    n: answers, drawn independently.
    params: how to draw them; `n` and `seed` are set by the search.
    parse: the steps that one answer about a thought holds.
    """

    ask: Question = ""
    n: int = 1
    params: SamplingParams = field(default=SamplingParams(max_tokens=32, stop="\n"))
    parse: Callable[[str, Thought], Steps] = lines

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        _check(self.ask, self.n, self.params)

    @property
    def most_tokens(self) -> int:
        return self.n * self.params.max_tokens

    async def steps(self, thought: Thought, asking: "Asking") -> list[Step]:
        prompt = await asking.prompt(self.ask, thought)
        output = await asking.generate(prompt, self.n, self.params)
        found: list[Step] = []
        for one in output.outputs:
            steps = as_steps(self.parse(one.text, thought))
            if not self.ask and len(steps) == 1 and steps[0].text == one.text.strip():
                steps = [replace(steps[0], token_ids=await asking.line(one))]
            found += steps
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Ask the model for a judgement, and read a number out of it.

    n: answers, drawn independently; the score is the mean of the numbers in them, and 0 where there is none.
    parse: the number that one answer about a thought holds, or None.
    """

    ask: Question
    parse: Callable[[str, Thought], float | None]
    n: int = 1
    params: SamplingParams = field(default=SamplingParams(max_tokens=16, stop="\n"))

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        _check(self.ask, self.n, self.params)

    @property
    def most_tokens(self) -> int:
        return self.n * self.params.max_tokens

    async def score(self, thought: Thought, asking: "Asking") -> float:
        output = await asking.generate(await asking.prompt(self.ask, thought), self.n, self.params)
        numbers = [number for one in output.outputs if (number := self.parse(one.text, thought)) is not None]
        return math.fsum(numbers) / len(numbers) if numbers else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choose:
    """Ask the model to judge by one of a few words, and weigh the words' values by their probabilities.

    Nothing is drawn: `score = sum(p * value) / sum(p)`, with `p` the probability of the whole word after the question.
    values: what each answer is worth, as it would be generated (after a question that ends with a colon it begins
    with a space, as a rule).
    """

    ask: Question
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        _check(self.ask, 1, SamplingParams())
        if not self.values or not all(self.values):
            raise InvalidRequest("values", self.values, "must hold at least one answer, none of them empty")

    @property
    def most_tokens(self) -> int:
        return 0

    async def score(self, thought: Thought, asking: "Asking") -> float:
        prompt = await asking.prompt(self.ask, thought)
        logs = await asking.log_probabilities(prompt, list(self.values))
        most = max(logs)
        weights = [math.exp(log - most) for log in logs]
        return math.fsum(map(float.__mul__, weights, map(float, self.values.values()))) / math.fsum(weights)


@dataclass(slots=True)
class Asking:
    """One thought's questions to the engine, and what they cost.

    seed: of its draws. answered: called with the cost of each answer as it comes.
    """

    server: Server
    seed: int
    answered: Callable[[Cost], None]
    cost: Cost = field(default=Cost())

    async def prompt(self, ask: Question, thought: Thought) -> list[int]:
        """The question about `thought` as token ids."""
        if callable(ask):
            prompt = ask(thought)
        elif _FIELD.search(ask):
            values = {"problem": thought.problem, "steps": "\n".join(thought.steps)}
            values |= {"state": thought.state, "text": thought.text}
            prompt = _FIELD.sub(lambda match: values[match[1]], ask)
        else:
            path = await self.path(thought)
            return path + (await self.server.tokenize(ask, special=False) if ask else [])
        return await self.server.tokenize(prompt, special=True) if isinstance(prompt, str) else list(prompt)

    async def path(self, thought: Thought) -> list[int]:
        """All that leads to `thought`, as token ids."""
        ids: list[int] = []
        for each in reversed(list(thought.lineage())):
            if each.token_ids is None:
                text = each.text if each.parent is None else each.text + _END
                each.token_ids = await self.server.tokenize(text, special=each.parent is None)
            ids += each.token_ids
        return ids

    async def line(self, one: CompletionOutput) -> tuple[int, ...]:
        """The tokens of an answer that continues a path, up to the end of its line."""
        ended = isinstance(one.stop_reason, str) and one.stop_reason.endswith(_END)
        if ended:
            return tuple(one.token_ids)
        ids = one.token_ids if end_token(one, self.server.eos_token_ids) is None else one.token_ids[:-1]
        return (*ids, *await self.server.tokenize(_END, special=False))

    async def generate(self, prompt: Sequence[int], n: int, params: SamplingParams) -> RequestOutput:
        """Raises `RequestFailed`, `InvalidRequest`."""
        output = await self.server.generate(prompt, replace(params, n=n, seed=self.seed))
        self._count(output)
        return completed(output)

    async def log_probabilities(self, prompt: Sequence[int], answers: Sequence[str]) -> list[float]:
        """Natural-log probability of each answer after `prompt`, as one burst. Raises `RequestFailed`."""
        from radixgen.output_processor import scores_of

        each = [await self.server.tokenize(answer, special=False) for answer in answers]
        outputs = await together([self.server.score(prompt, answer) for answer in each])
        for output in outputs:
            self._count(output)
        return [math.fsum(scores_of(output)) for output in outputs]

    def _count(self, output: RequestOutput) -> None:
        cost = cost_of(output)
        self.cost += cost
        self.answered(cost)


async def steps_after(what: Propose | Proposer, thought: Thought, asking: Asking) -> list[Step]:
    """The steps that may follow `thought`."""
    if isinstance(what, Propose):
        return await what.steps(thought, asking)
    return as_steps(await called(what, thought))


async def score_of(what: "Evaluate | Choose | Evaluator", thought: Thought, asking: Asking) -> float:
    """How good `thought` is. Raises `InvalidRequest` where that is no finite number; NumPy's are numbers."""
    score: Any = await (what.score(thought, asking) if isinstance(what, Evaluate | Choose) else called(what, thought))
    number = score.item() if getattr(score, "ndim", None) == 0 else score
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise InvalidRequest("score", score, "must be a finite number")
    return float(number)


def as_steps(found: object) -> list[Step]:
    """Raises `InvalidRequest`."""
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise InvalidRequest("steps", found, "must be a list of texts or Steps")
    return [_step(one) for one in found]


def _step(step: object) -> Step:
    if isinstance(step, str):
        return Step(step)
    if not isinstance(step, Step) or not isinstance(step.text, str):
        raise InvalidRequest("step", step, "must be text or a Step")
    return step


def check_evaluator(name: str, what: object) -> None:
    """Raises `InvalidRequest`."""
    if not isinstance(what, Evaluate | Choose) and not callable(what):
        raise InvalidRequest(name, what, "must be Evaluate, Choose or a callable")


def most_tokens(what: object) -> int:
    """How many tokens one such question may generate."""
    return what.most_tokens if isinstance(what, Propose | Evaluate | Choose) else 0


def derive_seed(seed: int, thought: Thought, purpose: str) -> int:
    """64 bits out of a search's seed, the whole path to a thought, and what is asked of it."""
    parts = [str(seed), purpose, thought.problem, *thought.steps]
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _check(ask: object, n: int, params: object) -> None:
    if not isinstance(ask, str) and not callable(ask):
        raise InvalidRequest("ask", ask, "must be text or a callable")
    check_integer("n", n, 1, 2**31 - 1)
    if not isinstance(params, SamplingParams):
        raise InvalidRequest("params", params, "must be SamplingParams")
