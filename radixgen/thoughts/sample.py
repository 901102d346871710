"""`sample`: best-of-n sampling and self-consistency, many answers to a prompt and a choice among them."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from radixgen.core import InvalidRequest, SamplingParams, check_integer
from radixgen.thoughts.backend import SearchBackend, call, gather_all, serving
from radixgen.thoughts.questions import Choose, Evaluate, Evaluator, ModelCalls, check_evaluator, derive_seed, score_of
from radixgen.thoughts.search import root_of, run_alone
from radixgen.thoughts.thought import Cost, Step, Thought

if TYPE_CHECKING:
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.thoughts.remote import RemoteEngine
    from radixgen.thoughts.search import Root

Vote = Callable[[str], str | Awaitable[str | None] | None]


@dataclass(slots=True)
class Sample:
    """One answer.

    vote: the option that it votes for, if there is a vote.
    score: its score, if there is a scorer.
    """

    text: str
    token_ids: list[int]
    vote: str | None = None
    score: float | None = None


@dataclass(slots=True)
class Samples:
    """All answers, and the chosen one.

    votes: number of votes for each option; with a scorer, the sum of the voters' scores.
    """

    answers: list[Sample]
    best: Sample
    votes: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default=Cost())


def sample(
    engine: "Engine | RemoteEngine",
    prompt: "Root",
    n: int,
    *,
    params: SamplingParams | None = None,
    vote: Vote | None = None,
    scorer: Evaluate | Choose | Evaluator | None = None,
    seed: int = 0,
    namespace: str = "",
) -> Samples:
    """Sample `n` answers to `prompt` in one burst, and choose one. Raises `InvalidRequest`, `RequestFailed`.

    vote: function from an answer to the option that it votes for, or None. The option with the most votes wins
        (self-consistency, arXiv 2203.11171).
    scorer: evaluates an answer, like a search's `evaluate`, given a thought with the answer's text. The best answer
        wins (best of n); with `vote` too, votes are weighted by scores.

    Ties go to the first answer; without vote and scorer, the first answer is chosen.
    """
    job = sample_async(engine, prompt, n, params=params, vote=vote, scorer=scorer, seed=seed, namespace=namespace)
    return run_alone(job)


async def sample_async(
    engine: "AsyncEngine | Engine | RemoteEngine | SearchBackend",
    prompt: "Root",
    n: int,
    *,
    params: SamplingParams | None = None,
    vote: Vote | None = None,
    scorer: Evaluate | Choose | Evaluator | None = None,
    seed: int = 0,
    namespace: str = "",
) -> Samples:
    """`sample` for coroutines."""
    check_integer("seed", seed, 0, 2**64 - 1)
    if vote is not None and not callable(vote):
        raise InvalidRequest("vote", vote, "must be a callable")
    if scorer is not None:
        check_evaluator("scorer", scorer)
    async with serving(engine, namespace) as backend:
        root = await root_of(prompt, backend, "prompt")
        calls = ModelCalls(backend, derive_seed(seed, root, "sample"), lambda _: None)
        output = await calls.generate(await calls.path(root), n, params or SamplingParams(max_tokens=256))
        answers = [Sample(completion.text, completion.token_ids) for completion in output.outputs]
        if vote is not None:
            votes = await gather_all([call(vote, answer.text) for answer in answers])
            for answer, option in zip(answers, votes, strict=True):
                answer.vote = option
        cost = calls.cost
        if scorer is not None:
            lines = {completion.text: await calls.line(completion) for completion in output.outputs}
            thoughts = [root.follow(Step(text, token_ids=line)) for text, line in lines.items()]
            scored = await gather_all([_score(scorer, thought, backend, seed) for thought in thoughts])
            scores = {thought.text: score for thought, (score, _) in zip(thoughts, scored, strict=True)}
            cost = sum((added for _, added in scored), cost)
            for answer in answers:
                answer.score = scores[answer.text]
    return _choose(answers, cost)


async def _score(
    scorer: Evaluate | Choose | Evaluator, thought: Thought, backend: SearchBackend, seed: int
) -> tuple[float, Cost]:
    calls = ModelCalls(backend, derive_seed(seed, thought, "score"), lambda _: None)
    return await score_of(scorer, thought, calls), calls.cost


def _choose(answers: list[Sample], cost: Cost) -> Samples:
    votes: dict[str, float] = {}
    for answer in answers:
        if answer.vote is not None:
            votes[answer.vote] = votes.get(answer.vote, 0.0) + (1.0 if answer.score is None else answer.score)
    winner = max(votes, key=votes.__getitem__) if votes else None
    voters = [answer for answer in answers if answer.vote == winner]
    best = max(voters, key=lambda answer: 0.0 if answer.score is None else answer.score)
    return Samples(answers, best, votes, cost)
