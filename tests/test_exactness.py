"""Greedy decoding in float32 equals transformers' `generate`, token for token, however it is served."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import families
import numpy as np
import pytest
import torch
from reference import compare, reference_greedy
from sizes import size
from transformers import AutoModelForCausalLM, PreTrainedModel

from radixgen import Engine, SamplingParams
from radixgen.model import smollm2

NEW_TOKENS = 16
WAYS: dict[str, dict] = {
    "default": {},
    "one row a step": {"max_step_tokens": 1},
    "chunks of 7": {"max_step_tokens": 7},
    "chunks of 64": {"max_step_tokens": 64},
    "unshared reads": {"plan": "unshared"},
    "a unit a node": {"plan": "naive"},
    "no sharing": {"share": False},
    "a pool that is always full": {"kv_tokens": 96, "max_step_tokens": 32},
}


def ways_of(family: str) -> list[dict]:
    """All at nightly size; else the default, the full pool, and a third of the others: each meets many families."""
    default, *others, full = WAYS.values()
    return size([default, *others[families.FAMILIES.index(family) % 3 :: 3], full], [*WAYS.values()])


def prompts(vocab: int, scale: int = 1) -> list[list[int]]:
    """Prefixes shared at several depths, one prompt a prefix of another, identical ones, no overlap."""
    rng = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return rng.integers(3, vocab, count * scale).tolist()

    base, middle, end = some(24), some(9), some(13)
    return [
        base,
        base + middle,
        base + middle + end,
        base + middle + end,
        base + middle[: len(middle) // 2] + some(6),
        base[: len(base) // 2] + some(15),
        some(5),
        some(40),
    ]


@dataclass
class Oracle:
    """References of one model, kept; differences are looked into with `compare`."""

    model: PreTrainedModel
    known: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    tokens: int = 0
    ties: int = 0

    def expect(self, engine: Engine, prompt: Sequence[int], got: list[int], count: int) -> None:
        key = tuple(prompt)
        if key not in self.known:
            self.known[key] = reference_greedy(self.model, prompt, count).token_ids
        self.tokens += count
        if got == self.known[key]:
            return

        def go_on(token_ids: list[int], rest: int) -> list[int]:
            return engine.generate(token_ids, greedy(rest))[0].outputs[0].token_ids

        found = compare(self.model, prompt, got, count, continue_with=go_on)
        assert not found.mismatches, found
        self.ties += found.ties

    def settle(self) -> None:
        """Ties are rare, and the outputs are worth comparing."""
        assert self.ties <= self.tokens // 1000, f"{self.ties} ties in {self.tokens} tokens"
        assert len({tuple(out) for out in self.known.values()}) * 2 >= len(self.known)


@contextmanager
def oracle_of(family: str) -> Iterator[Oracle]:
    """References of a family, settled at the end."""
    result = Oracle(families.build(family))
    yield result
    result.settle()


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name: str) -> None:
    oracle, served = Oracle(families.build(name)), families.build(name)
    asked = prompts(families.VOCAB)
    for options in ways_of(name):
        with Engine(served, debug=True, **({"kv_tokens": 2048} | options)) as engine:
            for _ in ("cold", "warm"):
                outputs = engine.generate(asked, greedy(NEW_TOKENS))
                for prompt, output in zip(asked, outputs, strict=True):
                    oracle.expect(engine, prompt, output.outputs[0].token_ids, NEW_TOKENS)
            engine.check()
    with Engine(served, kv_tokens=2048, debug=True) as engine:
        for prompt in asked:
            alone = engine.generate(prompt, greedy(NEW_TOKENS))[0]
            oracle.expect(engine, prompt, alone.outputs[0].token_ids, NEW_TOKENS)
            engine.reset_prefix_cache()
        engine.check()
    oracle.settle()


@pytest.mark.parametrize("max_model_len", [32, 200])
def test_longrope_is_fixed_by_the_context(max_model_len: int) -> None:
    """The short factors below the original length; the long ones where the context goes beyond it."""
    oracle, served = Oracle(families.build_longrope(32)), families.build_longrope(32)
    asked = [p for p in prompts(families.VOCAB) if (len(p) > 32) == (max_model_len > 32)]
    count = 4
    asked = [p for p in asked if len(p) + count <= max_model_len]
    assert asked
    with Engine(served, kv_tokens=512, max_model_len=max_model_len) as engine:
        for prompt, output in zip(asked, engine.generate(asked, greedy(count)), strict=True):
            oracle.expect(engine, prompt, output.outputs[0].token_ids, count)
    oracle.settle()
    torch.testing.assert_close(*(m(torch.tensor([asked[0]])).logits for m in (served, oracle.model)))


@pytest.mark.slow
def test_smollm2() -> None:
    path = smollm2.fetch()
    oracle, served = Oracle(AutoModelForCausalLM.from_pretrained(path)), AutoModelForCausalLM.from_pretrained(path)
    count = size(6, NEW_TOKENS)
    ways = [(1, options) for options in size([WAYS["a pool that is always full"]], [*WAYS.values()])]
    for scale, options in [*ways, (size(3, 6), {})]:
        asked = prompts(vocab=40_000, scale=scale)
        with Engine(served, debug=True, **({"kv_tokens": 2048} | options)) as engine:
            for _ in ("cold", "warm"):
                for prompt, output in zip(asked, engine.generate(asked, greedy(count)), strict=True):
                    oracle.expect(engine, prompt, output.outputs[0].token_ids, count)
            engine.check()
    with Engine(path, dtype="float32", kv_tokens=2048) as engine:
        for prompt in size(prompts(vocab=40_000)[:1], prompts(vocab=40_000)):
            alone = engine.generate(prompt, greedy(count))[0]
            oracle.expect(engine, prompt, alone.outputs[0].token_ids, count)
            engine.reset_prefix_cache()
    oracle.settle()
