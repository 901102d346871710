"""Each output is that of its request alone, through late arrivals, cancels, retries, forks, evictions, preemptions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import families
import numpy as np
import pytest
import texts
import torch
from reference import reference_greedy
from sizes import size
from test_exactness import Oracle, greedy, prompts
from transformers import AutoModelForCausalLM, PreTrainedModel

from radixgen import CompletionOutput, Engine, RequestOutput, SamplingParams
from radixgen.model import smollm2

NEW_TOKENS = 12
ROOMY, TIGHT = {"kv_tokens": 2048}, {"kv_tokens": 60, "max_step_tokens": 9}
PROMPTS = prompts(families.VOCAB)
SHAPES: list[dict] = [
    {},
    {"top_k": 12, "top_p": 0.9},
    {"min_p": 0.05, "logprobs": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logprobs": 0},
    {"logit_bias": {5: 4.0, 9: -3.0}, "top_p": 0.8, "logprobs": 2},
    {"n": 3, "frequency_penalty": -0.3},
]
HISTORIES: dict[str, tuple[dict, dict]] = {
    "late arrivals": (ROOMY, {}),
    "random evictions": (ROOMY, {"evict": True}),
    "a tight pool": (TIGHT, {}),
    "a tight pool, cancels, a unit a node": (TIGHT | {"plan": "naive"}, {"cancels": 6, "evict": True}),
}

Ask = tuple[list[int], SamplingParams]


@dataclass
class Churn:
    """Serves requests that come in a random order, some steps apart. The engine is checked after every step.

    cancels: how many are cancelled, in whatever state they are, and asked again at once.
    forks: how many are forked.
    evict: whether cached tokens are evicted at random before steps.
    """

    engine: Engine
    seed: int
    cancels: int = 0
    forks: int = 0
    evict: bool = False
    _live: dict[str, int] = field(default_factory=dict)
    """The place of its ask, by request."""

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def serve(self, asks: Sequence[Ask]) -> list[tuple[int, RequestOutput]]:
        """The last output of every request, cancelled ones and forks too, with the place of its ask."""
        coming = self._rng.permutation(len(asks)).tolist()
        ended = []
        while coming or self.engine.has_unfinished:
            for _ in range(min(len(coming), self._rng.poisson(0.6))):
                self._submit(asks, coming.pop())
            self._disturb(asks)
            ended += self._step()
        return ended

    def _submit(self, asks: Sequence[Ask], place: int) -> None:
        self._live[self.engine.submit(*asks[place], output_kind="final")] = place

    def _disturb(self, asks: Sequence[Ask]) -> None:
        if self.evict:
            self.engine._core.tree.evict(int(self._rng.integers(24)))
        if self.forks and self._happens():
            self.forks -= 1
            origin = self._any_live()
            self._live |= dict.fromkeys(self.engine.fork(origin), self._live[origin])
        if self.cancels and self._happens():
            self.cancels -= 1
            gone = self._any_live()
            self.engine.cancel(gone)
            self._submit(asks, self._live[gone])

    def _happens(self) -> bool:
        return bool(self._live) and self._rng.random() < 0.2

    def _any_live(self) -> str:
        return [*self._live][self._rng.integers(len(self._live))]

    def _step(self) -> list[tuple[int, RequestOutput]]:
        poison(self.engine)
        outputs = self.engine.step()
        self.engine.check()
        return [(self._live.pop(output.request_id), output) for output in outputs]


def poison(engine: Engine) -> None:
    """Fill all free slots with NaN: nothing of them may reach an output."""
    storage = engine._model.storage
    for extent in engine._core.tree.pool.free_extents():
        for pool in (*storage.keys, *storage.values):
            pool[extent.start : extent.end] = float("nan")


def finish(engine: Engine, output: RequestOutput) -> list[int]:
    """The tokens of an output; a cancelled one's are taken up by a new request."""
    one = output.outputs[0]
    assert one.finish_reason in ("length", "abort")
    if one.finish_reason == "length":
        return one.token_ids
    rest = greedy(NEW_TOKENS - len(one.token_ids))
    return one.token_ids + engine.generate(output.prompt_token_ids + one.token_ids, rest)[0].outputs[0].token_ids


def assert_crowded(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.evicted_tokens > 0


# -- greedy, float32, against transformers ----------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
def test_families(name: str) -> None:
    """Forks and what cancelled requests had generated count too."""
    oracle, served = Oracle(families.build(name)), families.build(name)
    asks = [(prompt, greedy(NEW_TOKENS)) for prompt in PROMPTS]
    ways = [(0, "auto"), (1, "naive")]
    for seed, plan in size([ways[families.FAMILIES.index(name) % 2]], ways):
        with Engine(served, plan=plan, debug=True, **TIGHT) as engine:
            ended = Churn(engine, seed, cancels=4, forks=3).serve(asks)
            assert_crowded(engine)
            assert len(ended) == len(asks) + 4 + 3
            for place, output in ended:
                oracle.expect(engine, PROMPTS[place], finish(engine, output), NEW_TOKENS)
    oracle.settle()


# -- greedy and sampled, float64, against each request alone ----------------------------------------------


@dataclass
class Exact:
    """A model in float64, where the shape of a product does not change a token, and each request served alone."""

    model: PreTrainedModel
    asks: list[Ask]
    alone: list[list[CompletionOutput]]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "deepseek-v3"])
def exact(request: pytest.FixtureRequest) -> Exact:
    model = families.build(request.param).double()
    model.set_experts_implementation("eager")  # the default has no float64
    asks = [(prompt, greedy(NEW_TOKENS)) for prompt in PROMPTS]
    asks += [(prompt, sampled(seed)) for seed, prompt in enumerate(PROMPTS)]
    return Exact(model, asks, serve_alone(model, asks))


def sampled(seed: int, **options: object) -> SamplingParams:
    shape = SHAPES[seed % len(SHAPES)] | options
    return SamplingParams(temperature=1.3, max_tokens=NEW_TOKENS, ignore_eos=True, seed=seed, **shape)


def serve_alone(model: PreTrainedModel, asks: Sequence[Ask]) -> list[list[CompletionOutput]]:
    outputs = []
    with Engine(model, tokenizer=texts.tokenizer(), **ROOMY) as engine:
        for prompt, params in asks:
            outputs.append(engine.generate(prompt, params)[0].outputs)
            engine.reset_prefix_cache()
    return outputs


def assert_same(got: CompletionOutput, want: CompletionOutput) -> None:
    """The same tokens and alternatives; of a cancelled sequence, as far as it came."""
    count = len(got.token_ids) if got.finish_reason == "abort" else len(want.token_ids)
    assert got.token_ids == want.token_ids[:count]
    assert (got.logprobs is None) == (want.logprobs is None)
    for one, other in zip(got.logprobs or [], (want.logprobs or [])[:count], strict=True):
        assert list(one) == list(other) and one == pytest.approx(other, abs=1e-5)


def test_alone_is_what_transformers_generates(exact: Exact) -> None:
    for prompt, outputs in zip(PROMPTS, exact.alone, strict=False):
        assert outputs[0].token_ids == reference_greedy(exact.model, prompt, NEW_TOKENS).token_ids


@pytest.mark.parametrize("history", HISTORIES)
def test_outputs_do_not_depend_on_the_history(exact: Exact, history: str) -> None:
    """Several orders of arrival, the first into a cold tree."""
    options, events = HISTORIES[history]
    with Engine(exact.model, debug=True, **options) as engine:
        for seed in range(2):
            ended = Churn(engine, seed, **events).serve(exact.asks)
            assert len(ended) == len(exact.asks) + events.get("cancels", 0)
            for place, output in ended:
                for got, want in zip(output.outputs, exact.alone[place], strict=True):
                    assert_same(got, want)
        assert (engine.stats().preemptions > 0) == history.startswith("a tight pool")


def test_a_sequence_does_not_depend_on_how_many_there_are(exact: Exact) -> None:
    asks = [(prompt, sampled(seed, n=5)) for seed, prompt in enumerate(PROMPTS)]
    with Engine(exact.model, debug=True, kv_tokens=128, max_step_tokens=9) as engine:
        for place, output in Churn(engine, seed=0).serve(asks):
            assert len({tuple(one.token_ids) for one in output.outputs}) > 1
            for got, want in zip(output.outputs, exact.alone[len(PROMPTS) + place], strict=False):
                assert_same(got, want)
        assert_crowded(engine)


@pytest.mark.parametrize("included", [False, True])
def test_stop_strings(exact: Exact, included: bool) -> None:
    wanted = [outputs[0] for outputs in exact.alone[: len(PROMPTS)]]
    ends = [one.text[2:4] for one in wanted]
    params = replace(greedy(NEW_TOKENS), include_stop_str_in_output=included)
    asks = [(prompt, replace(params, stop=end)) for prompt, end in zip(PROMPTS, ends, strict=True)]
    with Engine(exact.model, tokenizer=texts.tokenizer(), debug=True, **TIGHT) as engine:
        for place, output in Churn(engine, seed=0, evict=True).serve(asks):
            got, want, end = output.outputs[0], wanted[place], ends[place]
            assert got.text == want.text[: want.text.index(end) + included * len(end)]
            assert got.token_ids == want.token_ids[: len(got.token_ids)]
            assert (got.finish_reason, got.stop_reason) == ("stop", end)


# -- scores and stop strings, SmolLM2 ---------------------------------------------------------------------

PREFIX = "France is a country in Europe. Its capital is"
CONTINUATIONS = [" Paris, a city", " Paris, a river", " London", " a"]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2.fetch())


@pytest.fixture(scope="module", params=[2048, 7])
def smol(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(smollm2.fetch(), dtype="float32", kv_tokens=512, max_step_tokens=request.param, debug=True) as engine:
        yield engine
        engine.check()


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Of each token but the first, after those before it."""
    scores = model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def num_prefixes(sequences: list[list[int]], shortest: int = 1) -> int:
    """How many distinct prefixes of at least `shortest` tokens they have."""
    return len({tuple(s[:stop]) for s in sequences for stop in range(shortest, len(s) + 1)})


def test_scores(smol: Engine, plain: PreTrainedModel) -> None:
    """Cold, what continuations share is computed once; warm, there are only the rows that read, and no new KV."""
    smol.reset_prefix_cache()
    prompt = smol.tokenize(PREFIX).tolist()
    rests = [smol.tokenizer.encode(text, add_special_tokens=False) for text in CONTINUATIONS]
    want = [logprobs_of(plain, prompt + rest)[len(prompt) - 1 :] for rest in rests]
    cached = [prompt + rest[:-1] for rest in rests]
    for num_rows in (num_prefixes(cached), num_prefixes(cached, len(prompt))):
        before = smol.stats().computed_rows
        got = smol.score(PREFIX, CONTINUATIONS)
        assert got == [pytest.approx(one, abs=1e-3) for one in want]
        assert smol.stats().computed_rows - before == num_rows
        assert smol.stats().kv_tokens_used == num_prefixes(cached)


def test_prompt_logprobs(smol: Engine, plain: PreTrainedModel) -> None:
    smol.reset_prefix_cache()
    asked = [PREFIX + text for text in CONTINUATIONS]
    tokens = [smol.tokenize(text).tolist() for text in asked]
    want = [logprobs_of(plain, one) for one in tokens]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    for _ in ("cold", "warm"):
        outputs = smol.generate(asked, params)
        for output, prompt, values in zip(outputs, tokens, want, strict=True):
            first, *found = output.prompt_logprobs
            assert first is None and [next(iter(one)) for one in found] == prompt[1:]
            assert [next(iter(one.values())) for one in found] == pytest.approx(values, abs=1e-3)


def test_stop_strings_within_and_across_tokens(smol: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    whole = smol.generate(PREFIX, params)[0].outputs[0]
    for end in (whole.text[3:5], whole.text[5:11]):
        stops = partial(replace, params, stop=("no such text", end))
        asked = [params, stops(), stops(include_stop_str_in_output=True)]
        uncut, cut, included = (output.outputs[0] for output in smol.generate([PREFIX] * 3, asked))
        before = whole.text[: whole.text.index(end)]
        assert (uncut.text, cut.text, included.text) == (whole.text, before, before + end)
        assert cut.token_ids == included.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert end in smol.decode(cut.token_ids) and end not in smol.decode(cut.token_ids[:-1])
        assert cut.finish_reason == included.finish_reason == "stop"
        assert cut.stop_reason == included.stop_reason == end
