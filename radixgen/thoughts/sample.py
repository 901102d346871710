"""`sample`: many answers to one prompt, of which a vote or a score picks one."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from radixgen.core import InvalidRequest, SamplingParams, check_integer
from radixgen.thoughts.asks import Asking, Choose, Evaluate, Evaluator, check_evaluator, derive_seed, score_of
from radixgen.thoughts.search import root_of, run_alone
from radixgen.thoughts.server import Server, called, serving, together
from radixgen.thoughts.thought import Cost, Step, Thought

if TYPE_CHECKING:
    from radixgen.async_engine import AsyncEngine
    from radixgen.engine import Engine
    from radixgen.thoughts.search import Root

Vote = Callable[[str], str | Awaitable[str | None] | None]


@dataclass(slots=True)
class Sample:
    """One answer. vote: what it votes for, where there is a vote. score: how good it is, where there is a scorer."""

    text: str
    token_ids: list[int]
    vote: str | None = None
    score: float | None = None


@dataclass(slots=True)
class Samples:
    """All answers, and the one that was picked.

    votes: what was voted for, with the number of votes, or with a scorer too, the sum of the voters' scores.
    """

    answers: list[Sample]
    best: Sample
    votes: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default=Cost())


def sample(
    engine: "Engine",
    prompt: "Root",
    n: int,
    *,
    params: SamplingParams | None = None,
    vote: Vote | None = None,
    scorer: Evaluate | Choose | Evaluator | None = None,
    seed: int = 0,
    namespace: str = "",
) -> Samples:
    """Draw `n` answers to `prompt` as one burst, and pick one.

    vote: what an answer votes for, or None. What has the most votes is picked (self-consistency, arXiv 2203.11171).
    scorer: how good an answer is, as a search's `evaluate`, asked of a thought whose text is the answer. The best is
        picked (best of n); with `vote` too, votes weigh as much as their voters' scores.
    Of equals the first is picked; without either, the first of all. Raises `InvalidRequest`, `RequestFailed`.
    """
    job = sample_async(engine, prompt, n, params=params, vote=vote, scorer=scorer, seed=seed, namespace=namespace)
    return run_alone(job)


async def sample_async(
    engine: "AsyncEngine | Engine | Server",
    prompt: "Root",
    n: int,
    *,
    params: SamplingParams | None = None,
    vote: Vote | None = None,
    scorer: Evaluate | Choose | Evaluator | None = None,
    seed: int = 0,
    namespace: str = "",
) -> Samples:
    """As `sample`, for coroutines."""
    check_integer("seed", seed, 0, 2**64 - 1)
    if vote is not None and not callable(vote):
        raise InvalidRequest("vote", vote, "must be a callable")
    if scorer is not None:
        check_evaluator("scorer", scorer)
    async with serving(engine, namespace) as server:
        root = await root_of(prompt, server, "prompt")
        asking = Asking(server, derive_seed(seed, root, "sample"), lambda _: None)
        output = await asking.generate(await asking.path(root), n, params or SamplingParams(max_tokens=256))
        answers = [Sample(one.text, one.token_ids) for one in output.outputs]
        if vote is not None:
            for answer, voted in zip(answers, await together([called(vote, a.text) for a in answers]), strict=True):
                answer.vote = voted
        cost = asking.cost
        if scorer is not None:
            lines = {one.text: await asking.line(one) for one in output.outputs}
            thoughts = [root.follow(Step(text, token_ids=line)) for text, line in lines.items()]
            scored = await together([_score(scorer, thought, server, seed) for thought in thoughts])
            scores = {thought.text: score for thought, (score, _) in zip(thoughts, scored, strict=True)}
            cost = sum((one for _, one in scored), cost)
            for answer in answers:
                answer.score = scores[answer.text]
    return _picked(answers, cost)


async def _score(
    scorer: Evaluate | Choose | Evaluator, thought: Thought, server: Server, seed: int
) -> tuple[float, Cost]:
    asking = Asking(server, derive_seed(seed, thought, "score"), lambda _: None)
    return await score_of(scorer, thought, asking), asking.cost


def _picked(answers: list[Sample], cost: Cost) -> Samples:
    votes: dict[str, float] = {}
    for one in answers:
        if one.vote is not None:
            votes[one.vote] = votes.get(one.vote, 0.0) + (1.0 if one.score is None else one.score)
    winner = max(votes, key=votes.__getitem__) if votes else None
    voters = [one for one in answers if one.vote == winner]
    best = max(voters, key=lambda one: 0.0 if one.score is None else one.score)
    return Samples(answers, best, votes, cost)
