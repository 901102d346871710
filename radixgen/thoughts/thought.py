"""Data types of a search: thoughts, the steps between them, and their cost."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from radixgen.core import RequestOutput


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of requests: numbers of requests and of tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    """Prompt tokens of all requests"""
    cached_tokens: int = 0
    """Prompt tokens whose KV was cached when the request was admitted"""
    generated_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Upper bound on computed prompt tokens: those that requests of one burst share count for each."""
        return self.prompt_tokens - self.cached_tokens

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Cost)))


def cost_of(output: RequestOutput) -> Cost:
    """Cost of a finished request."""
    generated = sum(len(sequence.token_ids) for sequence in output.outputs)
    return Cost(1, output.num_prompt_tokens, output.num_cached_tokens, generated)


@dataclass(frozen=True, slots=True)
class Step:
    """Proposed step from a thought to a new one.

    text: usually one line; the path of a thought contains its steps line by line.
    state: state of the problem after the step. Thoughts with equal states are merged; without states, equal paths.
    token_ids: tokens of the step as generated, if it continues the parent's path.
    """

    text: str
    state: str | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(eq=False, slots=True)
class Thought:
    """Node of a tree of thoughts.

    text: text of the step from its parent; the root's text is the problem.
    score: None until it is evaluated.
    visits, total: in Monte Carlo tree search, number of evaluations at or below it, and the sum of their scores.
    merged: number of proposed children that were known already.
    error: why its request failed, which makes it a dead end.
    cost: cost of proposing its children and of evaluating it.
    """

    text: str
    state: str
    parent: "Thought | None" = field(default=None, repr=False)
    id: int = -1
    """Index in the order in which thoughts were added; -1 before it is part of a tree"""
    token_ids: list[int] | None = field(default=None, repr=False)
    """Tokens that it adds to its parent's path; None until they are needed"""
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
        """Whether it may be expanded."""
        return not self.solved and self.error is None

    def lineage(self) -> "Iterator[Thought]":
        """Yield the thought and its ancestors, up to the root."""
        thought: Thought | None = self
        while thought is not None:
            yield thought
            thought = thought.parent

    @property
    def problem(self) -> str:
        """Text of the root."""
        return list(self.lineage())[-1].text

    @property
    def steps(self) -> list[str]:
        """Texts of the steps from the root to this thought."""
        return [thought.text for thought in self.lineage() if thought.parent is not None][::-1]

    def follow(self, step: Step) -> "Thought":
        """Create the thought after `step`, without adding it to the children."""
        state = f"{self.state}\n{step.text}".lstrip("\n") if step.state is None else step.state
        token_ids = None if step.token_ids is None else list(step.token_ids)
        return Thought(step.text, state, self, token_ids=token_ids)


def ranked(thoughts: list[Thought]) -> list[Thought]:
    """Open thoughts with a score, the best first; ties are in the order in which they were added."""
    scored = [(thought.score, thought) for thought in thoughts if thought.open and thought.score is not None]
    return [thought for _, thought in sorted(scored, key=lambda pair: (-pair[0], pair[1].id))]
