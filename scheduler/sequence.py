"""Requests as the scheduler sees them: a request has `n` sequences, and each has a cursor in the tree."""

import math
from dataclasses import dataclass, field

import numpy as np

from radixgen.beam_search import BeamSearch, Choices
from radixgen.cache import FollowedMatch, Lock, TokenArray
from radixgen.core import FinishReason, PromptTokens, SamplingParams, SamplingState, SharingEnd


@dataclass(eq=False, slots=True)
class Request:
    """What a caller submitted. `serial` orders requests by arrival."""

    id: str
    serial: int
    prompt: TokenArray
    params: SamplingParams
    max_output: int
    """Tokens that each sequence may generate; 0 where only the prompt is scored."""
    priority: int = 0
    namespace: str = ""
    arrived: float = 0.0
    deadline: float = math.inf
    """Seconds on the engine's clock, as `arrived`."""
    targets: TokenArray | None = None
    """Where the prompt's own tokens are scored, the token that follows each of its positions."""
    next_read: int = 0
    """The first position whose target is still to be scored."""
    search: BeamSearch | None = None
    """Where it searches: its sequences are then the beams, best first, and in the end the hypotheses."""
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_cached_tokens: int | None = None
    """Prompt tokens that had their KV when the request was first admitted; None before."""
    queue_seconds: float = 0.0
    """From its arrival to then."""
    num_shared_tokens: int = 0
    """Prompt tokens that running sequences or pins held then."""
    sharing_ended: SharingEnd | None = None
    overtaken: int = 0
    """How many requests of its priority that came later were admitted before it."""
    num_forks: int = 0
    grammar_debt: float = 0.0
    """Seconds that its grammar took beyond its shares of the steps"""
    sequences: list["Sequence"] = field(default_factory=list)
    waiting: list["Sequence"] = field(default_factory=list)
    """Those of its sequences that have no cursor yet, or lost it to preemption."""
    unfinished: int = 0
    prompt_tokens: PromptTokens = field(init=False)
    """The prompt as outputs tell it"""

    def __post_init__(self) -> None:
        self.prompt_tokens = PromptTokens(self.prompt)

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    @property
    def reading(self) -> bool:
        """Whether tokens of the prompt are still to be scored."""
        return self.targets is not None and self.next_read < self.targets.size

    def add_sequence(self, sequence: "Sequence") -> None:
        self.sequences.append(sequence)
        self.unfinished += sequence.finish_reason is None

    def remove_sequence(self, sequence: "Sequence") -> None:
        """Forget a beam that goes on no more."""
        self.sequences.remove(sequence)
        self.unfinished -= 1


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` continuations. While it runs, `cursor` locks its place in the tree."""

    request: Request
    index: int
    namespace: str
    sampling: SamplingState
    cursor: Lock | None = None
    output: list[int] = field(init=False)
    """Tokens generated so far; the same list as `sampling.output`."""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    ended_by_token: bool = False
    """Whether the last token of the output is an end, and no text."""
    scheduled_in: int = -1
    """The last step that this sequence has a part in."""
    choices: Choices | None = None
    """What may follow a beam that is parked: it has had its logits, others of its generation have not."""

    followed: FollowedMatch | None = None
    """While it waits, the match of its tokens, from when it may be the next one on"""

    def __post_init__(self) -> None:
        self.output = self.sampling.output

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: priority, then arrival, then place among the `n`."""
        return -self.request.priority, self.request.serial, self.index

    @property
    def reads_prompt(self) -> bool:
        """Whether it is the one among its siblings that reads the prompt's logits, and has not done so yet."""
        return self.request.reading and self.index == 0

    def tokens(self) -> TokenArray:
        """Prompt and output."""
        if not self.output:
            return self.request.prompt
        return np.concatenate([self.request.prompt, np.array(self.output, np.int32)])

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End it. Once ended, it stays so."""
        assert self.finish_reason is None, "a sequence ended twice"
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.request.unfinished -= 1
