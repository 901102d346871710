"""Questions to the model about a thought: which steps follow it, and how good it is.

A question is text, or a function from the thought to a prompt. Text without fields is appended to the thought's path,
so that all requests about the thought and its descendants share that prefix; text with any of the fields `{problem}`,
`{steps}`, `{state}`, `{text}` is the whole prompt. The path is the root's text, then each step on a line of its own.
Each is tokenized separately, once; a step that continued the path keeps the tokens that were generated.
"""

import hashlib
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from radixgen.core import CompletionOutput, InvalidRequest, RequestOutput, SamplingParams, check_integer, end_token
from radixgen.thoughts.backend import SearchBackend, call, check_completed, gather_all
from radixgen.thoughts.thought import Cost, Step, Thought, cost_of

Question = str | Callable[[Thought], str | Sequence[int]]
Steps = Iterable[str | Step]
Proposer = Callable[[Thought], Steps | Awaitable[Steps]]
Evaluator = Callable[[Thought], float | Awaitable[float]]
_FIELD = re.compile(r"\{(problem|steps|state|text)\}")
_END = "\n"
"""End of a step on a path"""


def lines(text: str, thought: Thought) -> list[str]:
    """Default of `Propose.parse`: the stripped lines of an answer that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Ask the model for steps.

    ask: the question; by default empty, so that the model continues the path.
    n: number of answers, sampled independently.
    params: sampling parameters; the search sets `n` and `seed`.
    parse: function that extracts the steps from an answer.
    """

    ask: Question = ""
    n: int = 1
    params: SamplingParams = field(default=SamplingParams(max_tokens=32, stop="\n"))
    parse: Callable[[str, Thought], Steps] = lines

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(self.ask, self.n, self.params)

    @property
    def most_tokens(self) -> int:
        """Maximum number of tokens that one question may generate."""
        return self.n * self.params.max_tokens

    async def steps(self, thought: Thought, calls: "ModelCalls") -> list[Step]:
        """Ask for the steps after a thought."""
        prompt = await calls.prompt(self.ask, thought)
        output = await calls.generate(prompt, self.n, self.params)
        proposals: list[Step] = []
        for answer in output.outputs:
            steps = as_steps(self.parse(answer.text, thought))
            if not self.ask and len(steps) == 1 and steps[0].text == answer.text.strip():
                steps = [replace(steps[0], token_ids=await calls.line(answer))]
            proposals += steps
        return proposals


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Ask the model for a judgement, and extract a number from it.

    n: number of answers, sampled independently; the score is the mean of their numbers, or 0 if there are none.
    parse: function that extracts a number from an answer, or None.
    """

    ask: Question
    parse: Callable[[str, Thought], float | None]
    n: int = 1
    params: SamplingParams = field(default=SamplingParams(max_tokens=16, stop="\n"))

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(self.ask, self.n, self.params)

    @property
    def most_tokens(self) -> int:
        """Maximum number of tokens that one question may generate."""
        return self.n * self.params.max_tokens

    async def score(self, thought: Thought, calls: "ModelCalls") -> float:
        """Ask for the score of a thought."""
        output = await calls.generate(await calls.prompt(self.ask, thought), self.n, self.params)
        numbers = [number for answer in output.outputs if (number := self.parse(answer.text, thought)) is not None]
        return math.fsum(numbers) / len(numbers) if numbers else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choose:
    """Score a thought by the probabilities of a few possible answers, without sampling.

    `score = sum(p * value) / sum(p)`, where `p` is the probability of a whole answer after the question.

    values: value of each answer. Write answers as they would be generated: after a question that ends with a colon,
        they usually start with a space.
    """

    ask: Question
    values: Mapping[str, float]

    def __post_init__(self) -> None:
        """Check the fields. Raises `InvalidRequest`."""
        _check(self.ask, 1, SamplingParams())
        if not self.values or not all(self.values):
            raise InvalidRequest("values", self.values, "must hold at least one answer, none of them empty")

    @property
    def most_tokens(self) -> int:
        """Maximum number of tokens that one question may generate: none."""
        return 0

    async def score(self, thought: Thought, calls: "ModelCalls") -> float:
        """Compute the score of a thought."""
        prompt = await calls.prompt(self.ask, thought)
        logs = await calls.log_probabilities(prompt, list(self.values))
        most = max(logs)
        weights = [math.exp(log - most) for log in logs]
        return math.fsum(map(float.__mul__, weights, map(float, self.values.values()))) / math.fsum(weights)


@dataclass(slots=True)
class ModelCalls:
    """Requests to the engine about one thought, and their cost.

    seed: sampling seed.
    answered: called with the cost of each request when it has finished.
    """

    backend: SearchBackend
    seed: int
    answered: Callable[[Cost], None]
    cost: Cost = field(default=Cost())

    async def prompt(self, ask: Question, thought: Thought) -> list[int]:
        """Prompt of a question about `thought`, as token ids."""
        if callable(ask):
            prompt = ask(thought)
        elif _FIELD.search(ask):
            values = {"problem": thought.problem, "steps": "\n".join(thought.steps)}
            values |= {"state": thought.state, "text": thought.text}
            prompt = _FIELD.sub(lambda match: values[match[1]], ask)
        else:
            path = await self.path(thought)
            return path + (await self.backend.tokenize(ask, special=False) if ask else [])
        return await self.backend.tokenize(prompt, special=True) if isinstance(prompt, str) else list(prompt)

    async def path(self, thought: Thought) -> list[int]:
        """Path from the root to `thought`, as token ids."""
        ids: list[int] = []
        for each in reversed(list(thought.lineage())):
            if each.token_ids is None:
                text = each.text if each.parent is None else each.text + _END
                each.token_ids = await self.backend.tokenize(text, special=each.parent is None)
            ids += each.token_ids
        return ids

    async def line(self, answer: CompletionOutput) -> tuple[int, ...]:
        """Tokens of an answer that continues a path, including the end of its line."""
        ended = isinstance(answer.stop_reason, str) and answer.stop_reason.endswith(_END)
        if ended:
            return tuple(answer.token_ids)
        ids = answer.token_ids if end_token(answer, self.backend.eos_token_ids) is None else answer.token_ids[:-1]
        return (*ids, *await self.backend.tokenize(_END, special=False))

    async def generate(self, prompt: Sequence[int], n: int, params: SamplingParams) -> RequestOutput:
        """Sample `n` answers. Raises `RequestFailed`, `InvalidRequest`."""
        output = await self.backend.generate(prompt, replace(params, n=n, seed=self.seed))
        self._count(output)
        return check_completed(output)

    async def log_probabilities(self, prompt: Sequence[int], answers: Sequence[str]) -> list[float]:
        """Natural-log probability of each answer after `prompt`, computed in one burst. Raises `RequestFailed`."""
        from radixgen.engine.output_processor import scores_of

        each = [await self.backend.tokenize(answer, special=False) for answer in answers]
        outputs = await gather_all([self.backend.score(prompt, answer) for answer in each])
        for output in outputs:
            self._count(output)
        return [math.fsum(scores_of(output)) for output in outputs]

    def _count(self, output: RequestOutput) -> None:
        cost = cost_of(output)
        self.cost += cost
        self.answered(cost)


async def steps_after(what: Propose | Proposer, thought: Thought, calls: ModelCalls) -> list[Step]:
    """Propose the steps after `thought`."""
    if isinstance(what, Propose):
        return await what.steps(thought, calls)
    return as_steps(await call(what, thought))


async def score_of(what: "Evaluate | Choose | Evaluator", thought: Thought, calls: ModelCalls) -> float:
    """Evaluate `thought`. Raises `InvalidRequest` unless the score is a finite number; NumPy scalars are accepted."""
    score: Any = await (what.score(thought, calls) if isinstance(what, Evaluate | Choose) else call(what, thought))
    number = score.item() if getattr(score, "ndim", None) == 0 else score
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise InvalidRequest("score", score, "must be a finite number")
    return float(number)


def as_steps(steps: object) -> list[Step]:
    """Convert a list of texts and steps to steps. Raises `InvalidRequest`."""
    if isinstance(steps, str) or not isinstance(steps, Iterable):
        raise InvalidRequest("steps", steps, "must be a list of texts or Steps")
    return [_step(step) for step in steps]


def _step(step: object) -> Step:
    if isinstance(step, str):
        return Step(step)
    if not isinstance(step, Step) or not isinstance(step.text, str):
        raise InvalidRequest("step", step, "must be text or a Step")
    return step


def check_evaluator(name: str, what: object) -> None:
    """Raise `InvalidRequest` unless `what` can evaluate thoughts."""
    if not isinstance(what, Evaluate | Choose) and not callable(what):
        raise InvalidRequest(name, what, "must be Evaluate, Choose or a callable")


def most_tokens(what: object) -> int:
    """Maximum number of tokens that one question may generate; 0 for functions."""
    return what.most_tokens if isinstance(what, Propose | Evaluate | Choose) else 0


def derive_seed(seed: int, thought: Thought, purpose: str) -> int:
    """64-bit seed, derived from a search's seed, the path to a thought, and the purpose of a request."""
    parts = [str(seed), purpose, thought.problem, *thought.steps]
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _check(ask: object, n: int, params: object) -> None:
    if not isinstance(ask, str) and not callable(ask):
        raise InvalidRequest("ask", ask, "must be text or a callable")
    check_integer("n", n, 1, 2**31 - 1)
    if not isinstance(params, SamplingParams):
        raise InvalidRequest("params", params, "must be SamplingParams")
