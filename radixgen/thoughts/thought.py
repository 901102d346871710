"""The nouns of a search: thoughts, the steps between them, and what they cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from radixgen.core import RequestOutput


@dataclass(frozen=True, slots=True)
class Cost:
    """What was asked of the engine. Tokens unless the name says otherwise."""

    requests: int = 0
    prompt_tokens: int = 0
    """Submitted, each request's prompt once."""
    cached_tokens: int = 0
    """Of those, tokens whose KV was already computed when the request was admitted."""
    generated_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not cached. At the most: what requests of one burst have in common is computed
        once, and counted for each.
        """
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Cost)))


def cost_of(output: RequestOutput) -> Cost:
    """What one finished request cost."""
    generated = sum(len(one.token_ids) for one in output.outputs)
    return Cost(1, output.num_prompt_tokens, output.num_cached_tokens, generated)


@dataclass(frozen=True, slots=True)
class Step:
    """One proposal: what a thought adds to its parent.

    text: one line, as a rule; the path of a thought holds its steps line by line.
    state: what is left to solve. Steps to equal states are merged; without one, only equal paths are.
    token_ids: the step as the model generated it, where that is what follows the parent's path.
    """

    text: str
    state: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(eq=False, slots=True)
class Thought:
    """One node of a tree of thoughts. `text` is what it adds to its parent; the root's is the problem.

    score: None until it is evaluated. visits, total: evaluations at or below it, and the sum of their scores, where
    Monte Carlo tree search counts them. merged: proposals of its children that said what was known already.
    error: why its request failed; it is then a dead end. cost: of proposing its children and of evaluating it.
    """

    text: str
    state: str
    parent: "Thought | None" = field(default=None, repr=False)
    id: int = -1
    """Its place in the order in which thoughts came; -1 before it is part of a tree"""
    token_ids: list[int] | None = field(default=None, repr=False)
    """The tokens that it adds to its parent's path; None until they are needed"""
    children: "list[Thought]" = field(default_factory=list, repr=False)
    depth: int = field(init=False)
    expanded: bool = False
    score: float | None = None
    solved: bool = False
    pruned: bool = False
    visits: int = 0
    total: float = 0.0
    merged: int = 0
    error: str | None = None
    cost: Cost = field(default=Cost())

    def __post_init__(self) -> None:
        self.depth = 0 if self.parent is None else self.parent.depth + 1

    @property
    def open(self) -> bool:
        """Whether a search may go on from here."""
        return not self.solved and self.error is None

    def lineage(self) -> "Iterator[Thought]":
        """The thought, its parent, and so on up to the root."""
        thought: Thought | None = self
        while thought is not None:
            yield thought
            thought = thought.parent

    @property
    def problem(self) -> str:
        """The root's text."""
        return list(self.lineage())[-1].text

    @property
    def steps(self) -> list[str]:
        """The texts on the way here, the root's left out."""
        return [thought.text for thought in self.lineage() if thought.parent is not None][::-1]

    def follow(self, step: Step) -> "Thought":
        """The thought that `step` leads to; not yet among the children."""
        state = f"{self.state}\n{step.text}".lstrip("\n") if step.state is None else step.state
        token_ids = None if step.token_ids is None else list(step.token_ids)
        return Thought(step.text, state, self, token_ids=token_ids)


def ranked(thoughts: list[Thought]) -> list[Thought]:
    """Those that a search may go on from, the best first; of equals, the one that came first."""
    scored = [(thought.score, thought) for thought in thoughts if thought.open and thought.score is not None]
    return [thought for _, thought in sorted(scored, key=lambda pair: (-pair[0], pair[1].id))]
