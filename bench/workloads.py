"""Nine workloads for whole engines, as generators: each yields what it asks, an `Ask`, and is sent the `Answers`."""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

Tokens = list[int]
Answers = list[list[Tokens]]
"""By prompt, then by sample"""
Workload = Generator["Ask", Answers, None]


@dataclass(frozen=True, slots=True)
class Ask:
    """Prompts that are put to an engine together, and how each is answered; the end of sequence is ignored."""

    prompts: list[Tokens]
    new: int
    """Tokens of each answer"""
    n: int = 1
    temperature: float = 0.0
    timed: bool = True
    """False of what is only to be cached"""


@dataclass(frozen=True, slots=True)
class Scale:
    """Tokens and counts of the workloads."""

    new: int = 128
    latency_prompt: int = 1024
    requests: int = 256
    own: int = 16
    short_prefix: int = 2048
    prefix: int = 16_256
    root: int = 2400
    problems: int = 8
    question: int = 300
    candidates: int = 64
    candidate: int = 256
    system: int = 3000
    agents: int = 32
    turns: int = 6
    tool: int = 200
    answer: int = 100
    thought_system: int = 1500
    thought_problems: int = 16
    levels: int = 4
    kept: int = 4
    proposals: int = 4
    thought: int = 32
    unshared: int = 128
    documents: int = 64
    document: int = 4096


FULL = Scale()
TOY = Scale(
    new=4, latency_prompt=24, requests=5, own=3, short_prefix=40, prefix=90, root=40, problems=2, question=7,
    candidates=3, candidate=5, system=30, agents=3, turns=2, tool=5, answer=4, thought_system=20, thought_problems=2,
    levels=2, kept=2, proposals=2, thought=3, unshared=4, documents=2, document=60,
)  # fmt: skip


class Workloads:
    """All workloads at one scale, with tokens below `vocab`; another `seed` makes other prompts of the same lengths."""

    def __init__(self, scale: Scale, vocab: int, seed: int = 0) -> None:
        self.scale, self.vocab, self.seed = scale, vocab, seed

    def start(self, name: str) -> Workload:
        """One of those that `describe` names."""
        begin: Callable[[], Workload] = getattr(self, name)
        return begin()

    def tokens(self, key: int, count: int) -> Tokens:
        """The same ones for the same key."""
        drawn: Tokens = np.random.default_rng([self.seed, key]).integers(3, self.vocab, count).tolist()
        return drawn

    def latency(self, rows: int = 1) -> Workload:
        """One request alone."""
        yield Ask([self.tokens(row, self.scale.latency_prompt) for row in range(rows)], self.scale.new)

    def latency8(self) -> Workload:
        """A few requests that share nothing."""
        return self.latency(8)

    def prefix(self, length: int | None = None) -> Workload:
        """Many requests on one long prefix, which is cached."""
        shared = self.tokens(0, length or self.scale.prefix)
        yield Ask([shared], 1, timed=False)
        own = [self.tokens(1 + row, self.scale.own) for row in range(self.scale.requests)]
        yield Ask([shared + one for one in own], self.scale.new)

    def short_prefix(self) -> Workload:
        """Many requests on a shorter one."""
        return self.prefix(self.scale.short_prefix)

    def parallel(self) -> Workload:
        """Many sampled candidates of a few problems on one root."""
        scale, root = self.scale, self.tokens(0, self.scale.root)
        prompts = [root + self.tokens(1 + problem, scale.question) for problem in range(scale.problems)]
        yield Ask(prompts, scale.candidate, scale.candidates, temperature=1.0)

    def agents(self) -> Workload:
        """Conversations that resend everything in every turn."""
        scale = self.scale
        talks = [self.tokens(0, scale.system) for _ in range(scale.agents)]
        for turn in range(scale.turns):
            for agent, talk in enumerate(talks):
                talk += self.tokens(1 + turn * scale.agents + agent, scale.tool)
            answers = yield Ask([list(talk) for talk in talks], scale.answer)
            for talk, answer in zip(talks, answers, strict=True):
                talk += answer[0]

    def thoughts(self) -> Workload:
        """A tree of thoughts for each of several problems: every kept path is resubmitted for more proposals."""
        scale, chosen = self.scale, random.Random(self.seed)
        system = self.tokens(0, scale.thought_system)
        paths = [[system + self.tokens(1 + one, scale.question)] for one in range(scale.thought_problems)]
        for _ in range(scale.levels):
            asked = [path for kept in paths for path in kept]
            answers = iter((yield Ask(asked, scale.thought, scale.proposals, temperature=1.0)))
            grown = [[path + thought for path in kept for thought in next(answers)] for kept in paths]
            paths = [chosen.sample(some, min(scale.kept, len(some))) for some in grown]

    def unshared(self) -> Workload:
        """Many requests that share nothing."""
        prompts = [self.tokens(row, self.scale.latency_prompt) for row in range(self.scale.unshared)]
        yield Ask(prompts, self.scale.new)

    def prefill(self) -> Workload:
        """Documents, one new token each."""
        yield Ask([self.tokens(row, self.scale.document) for row in range(self.scale.documents)], 1)


def describe(scale: Scale) -> dict[str, str]:
    """The name of each workload, and what it is in numbers."""
    return {
        "latency": f"1 × {scale.latency_prompt:,} + {scale.new}",
        "latency8": f"8 × {scale.latency_prompt:,} + {scale.new}",
        "short_prefix": f"{scale.requests} × {scale.own} on {scale.short_prefix:,}, {scale.new} new",
        "prefix": f"{scale.requests} × {scale.own} on {scale.prefix:,}, {scale.new} new",
        "parallel": f"{scale.problems} × {scale.candidates} candidates of {scale.root + scale.question:,}, "
        f"{scale.candidate} new, T = 1",
        "agents": f"{scale.agents} agents × {scale.turns} turns",
        "thoughts": f"tree of thoughts, {scale.thought_problems} problems",
        "unshared": f"{scale.unshared} × {scale.latency_prompt:,} + {scale.new}, nothing shared",
        "prefill": f"prefill {scale.documents} × {scale.document:,}",
    }
