"""Requests and their sequences, as the scheduler sees them."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from radixgen.cache import PRIVATE, Fetch, FollowedMatch, Lock, TokenArray, marked
from radixgen.core import (
    CacheHint,
    FinishReason,
    HintResult,
    PromptTokens,
    Reuse,
    SamplingParams,
    SamplingState,
    SharingEnd,
)
from radixgen.core.reading import EXACT, Press, ReadingPolicy
from radixgen.sampling.beam_search import BeamSearch, Choices
from radixgen.scheduler.run_reuse import TakenRuns


@dataclass(eq=False, slots=True)
class Request:
    """A submitted request. `serial` orders requests by arrival."""

    id: str
    serial: int
    prompt: TokenArray
    params: SamplingParams
    max_output: int
    """Maximum tokens generated per sequence; 0 to only score the prompt."""
    reading: ReadingPolicy = EXACT
    mark: int = 0
    """Mark of the policy `reading`, 0 if it is exact."""
    priority: int = 0
    namespace: str = ""
    reuse: Reuse = "prefix"
    blended: bool = False
    """Whether it is in the namespace of inexact KV, and reads KV that was moved from other positions."""
    num_moved_tokens: int = 0
    """Prompt tokens whose KV was copied from runs that are no prefix."""
    arrived: float = 0.0
    deadline: float = math.inf
    """Seconds on the engine's clock, like `arrived`."""
    hints: tuple[CacheHint, ...] = ()
    hint_owner: str | None = None
    """Whom the pins of `hints` count for; by default the namespace."""
    hint_results: tuple[HintResult, ...] = ()
    targets: TokenArray | None = None
    """If the prompt is scored: the token after each of its positions."""
    next_scored: int = 0
    """First position whose target is not scored yet."""
    search: BeamSearch | None = None
    """The state of a beam search. The sequences are its beams, best first, and at the end its hypotheses."""
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_cached_tokens: int | None = None
    """Prompt tokens with KV at the first admission; None before."""
    queue_seconds: float = 0.0
    """Time from arrival to the first admission."""
    num_shared_tokens: int = 0
    """Prompt tokens held by running sequences or pins at the first admission."""
    sharing_ended: SharingEnd | None = None
    overtaken: int = 0
    """Number of later requests of the same priority that were admitted before this one."""
    num_forks: int = 0
    grammar_debt: float = 0.0
    """Seconds that its grammar has taken beyond its shares of the steps."""
    sequences: list["Sequence"] = field(default_factory=list)
    waiting: list["Sequence"] = field(default_factory=list)
    """Sequences without a cursor: not yet admitted, or preempted."""
    unfinished: int = 0
    prompt_tokens: PromptTokens = field(init=False)
    """The prompt as returned in outputs."""
    path: TokenArray = field(init=False)
    """The prompt as the tree has it."""

    def __post_init__(self) -> None:
        self.prompt_tokens = PromptTokens(self.prompt)
        self.path = prompt_path(self.prompt, self.reading, self.mark)

    @property
    def first_read(self) -> int:
        """The first position that is read under the policy."""
        return self.reading.first_read(self.prompt.size)

    def marks_of(self, first: int, stop: int) -> list[int]:
        """Return the mark of the policy by which each of the positions `[first, stop)` is read."""
        exact = min(max(self.first_read - first, 0), stop - first) if self.mark else stop - first
        return [0] * exact + [self.mark] * (stop - first - exact)

    def path_with(self, output: Seq[int]) -> TokenArray:
        """Return prompt and output as the tree has them: the first token that is read under an inexact policy is
        marked.
        """
        if not output:
            return self.path
        tokens = np.concatenate([self.path, np.array(output, np.int32)])
        tokens[self.prompt.size] = self.in_tree(output[0], 0)
        return tokens

    def in_tree(self, token: int, index: int) -> int:
        """Return the output token at `index` as the tree has it."""
        if self.mark and self.prompt.size + index == self.first_read:
            return marked(token, self.mark)
        return token

    @property
    def exact(self) -> bool:
        """Whether its outputs are those of the model itself."""
        return not self.blended and self.reading.exact

    @property
    def finished(self) -> bool:
        return self.unfinished == 0

    @property
    def fetching(self) -> bool:
        """Whether its next sequence waits for KV from the host."""
        fetch = self.waiting[0].fetch
        return fetch is not None and not fetch.arrived

    @property
    def rank(self) -> tuple[int, int]:
        """Scheduling order: priority, then arrival."""
        return -self.priority, self.serial

    @property
    def scoring(self) -> bool:
        """Whether prompt tokens remain to be scored."""
        return self.targets is not None and self.next_scored < self.targets.size

    def private_namespace(self, index: int) -> str:
        """Return the namespace of the request's sequence `index` if it shares nothing."""
        return f"{self.namespace}{PRIVATE}{self.serial}.{index}"

    def add_sequence(self, sequence: "Sequence") -> None:
        self.sequences.append(sequence)
        self.unfinished += sequence.finish_reason is None

    def remove_sequence(self, sequence: "Sequence") -> None:
        """Remove a beam that does not continue."""
        self.sequences.remove(sequence)
        self.unfinished -= 1


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` continuations. While it runs, `cursor` locks its position in the tree."""

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
    """Whether the last output token is an end token without text."""
    scheduled_in: int = -1
    """The last step in which the sequence took part."""
    freed_block: int = -1
    """Block of positions, of its reading policy, for which slots were freed last."""
    pressed: bool = False
    """Whether its prompt is known to be pressed, while it runs."""
    choices: Choices | None = None
    """Candidates for the next token of a parked beam, which has its logits while others of its generation do not."""

    followed: FollowedMatch | None = None
    """Match of its tokens while it waits, once it may be next."""
    runs: TakenRuns | None = None
    """Where its tokens are copied from, until all are computed."""
    fetch: Fetch | None = None
    """Fetch of its tokens from the host while it waits."""

    def __post_init__(self) -> None:
        self.output = self.sampling.output

    @property
    def rank(self) -> tuple[int, int, int]:
        """Scheduling order: the request's, then index among the `n`."""
        return *self.request.rank, self.index

    @property
    def scores_prompt(self) -> bool:
        """Whether this sequence is the one among its siblings that still scores the prompt."""
        return self.request.scoring and self.index == 0

    def tokens(self) -> TokenArray:
        """Return prompt and output as the tree has them."""
        return self.request.path_with(self.output)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the sequence. Must be called only once."""
        assert self.finish_reason is None, "a sequence ended twice"
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.request.unfinished -= 1


def prompt_path(prompt: TokenArray, reading: ReadingPolicy, mark: int) -> TokenArray:
    """Return a prompt as the tree has it if it is read under this policy, which has this mark."""
    first = reading.first_read(prompt.size)
    if not mark or first >= prompt.size:
        return prompt
    path = prompt.copy()
    path[first] = marked(int(prompt[first]), mark)
    return path


def prompt_namespace(prompt: TokenArray, reading: ReadingPolicy, namespace: str) -> str:
    """Return the namespace of a prompt that is read under this policy by requests in `namespace`: one of its own if its
    keys are pressed, because no other prompt could read what stays of them.
    """
    if not isinstance(reading, Press):
        return namespace
    digest = blake2b(prompt.astype("<i4").tobytes() + repr(reading).encode(), digest_size=32).hexdigest()
    return f"{namespace}{PRIVATE}{digest}"
