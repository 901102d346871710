"""`reuse="segments"`: what is taken, what it computes, and that exact requests never see it."""

import math

import families
import numpy as np
import pytest
import torch
from oracle import StampModel
from torch import Tensor
from transformers import Cache, PreTrainedModel

from radixgen import Engine, InvalidRequest, RequestOutput, SamplingParams, SegmentReuse
from radixgen.cache import BLENDED
from radixgen.core import UnsupportedModel
from radixgen.model.moved_keys import Rotary

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1)
RUNS = SegmentReuse(min_run=10, recompute=0.2)


def documents(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, families.VOCAB, length).tolist() for _ in range(count)]


def serve(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY, **options: object) -> RequestOutput:
    engine.submit(prompt, params, request_id="it", output_kind="final", **options)
    while True:
        for output in engine.step():
            engine.check()
            return output


class SlotCache(Cache):
    """KV of one sequence, by position. Rows overwrite what is at their positions, and read all up to the last."""

    is_sliding = is_linear = is_dummy = ()
    layers = ()

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values
        self.positions: list[int] = []

    def update(self, k: Tensor, v: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, :, self.positions], self.values[layer][:, :, self.positions] = k, v
        return self.keys[layer], self.values[layer]

    def get_seq_length(self, *_: object) -> int:
        return self.keys[0].shape[2]

    def get_mask_sizes(self, *_: object) -> tuple[int, int]:
        return self.keys[0].shape[2], 0


class Twin:
    """The same with transformers' own model, by explicit masks: KV of whole prompts, moved and computed anew."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.heads, self.dim = model.config.num_key_value_heads, model.config.head_dim
        self.rotary = Rotary(model.model.rotary_emb.inv_freq.float())

    def empty(self, size: int) -> SlotCache:
        layers, shape = range(self.model.config.num_hidden_layers), (1, self.heads, size, self.dim)
        return SlotCache([torch.zeros(shape) for _ in layers], [torch.zeros(shape) for _ in layers])

    @torch.no_grad()
    def run(self, cache: SlotCache, prompt: list[int], positions: list[int]) -> Tensor:
        """Compute these positions of the prompt. Returns the logits of the last."""
        cache.positions = positions
        rows = torch.tensor(positions)
        mask = torch.arange(cache.get_seq_length())[None] <= rows[:, None]
        hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        tokens = torch.tensor([[prompt[position] for position in positions]])
        output = self.model(
            input_ids=tokens, position_ids=rows[None], attention_mask=hidden[None, None], past_key_values=cache
        )
        return output.logits[0, -1]

    def move(self, source: SlotCache, first: int, target: SlotCache, new: int, count: int) -> None:
        """Copy `count` tokens from position `first` of one sequence to `new` of another."""
        angles = self.rotary.angles(torch.arange(first, first + count), torch.arange(new, new + count))
        for layer, keys in enumerate(source.keys):
            part = keys[0, :, first : first + count].transpose(0, 1)
            target.keys[layer][0, :, new : new + count] = self.rotary.turn(part, angles).transpose(0, 1)
            target.values[layer][:, :, new : new + count] = source.values[layer][:, :, first : first + count]


@pytest.mark.parametrize("max_step_tokens", [7, 64, 512])
@pytest.mark.parametrize("plan", ["auto", "unshared"])
def test_logits_are_those_of_the_twin(max_step_tokens: int, plan: str) -> None:
    """A system prompt that both have, then two documents in the other order, of different lengths."""
    twin = Twin(families.build("llama"))
    (system,), (first,), (second,), (question,) = (documents(1, n, n) for n in (21, 40, 31, 9))
    before, after = system + first + second + question[:4], system + second + first + question
    source, blended = twin.empty(len(before)), twin.empty(len(after))
    twin.run(source, before, list(range(len(before))))
    twin.move(source, 0, blended, 0, 21)
    twin.move(source, 21 + 40, blended, 21, 31)
    twin.move(source, 21, blended, 21 + 31, 40)
    anew = [*range(21, 21 + 7), *range(52, 52 + 8), *range(92, len(after))]
    expected = twin.run(blended, after, anew).log_softmax(-1)
    exact = twin.run(twin.empty(len(after)), after, list(range(len(after)))).log_softmax(-1)
    model = families.build("llama")
    with Engine(model, kv_tokens=600, reuse=RUNS, plan=plan, max_step_tokens=max_step_tokens, debug=True) as engine:
        assert serve(engine, before).exact
        computed = engine.stats().computed_prompt_tokens
        output = serve(engine, after)
        assert not output.exact and output.num_cached_tokens == 21 and output.num_moved_tokens == 24 + 32
        assert engine.stats().computed_prompt_tokens - computed == len(anew)
        assert engine.stats().moved_prompt_tokens == 21 + 24 + 32
        token, value = next(iter(output.outputs[0].logprobs[0].items()))
        assert token == int(expected.argmax()) and abs(value - float(expected[token])) < 1e-4
        assert abs(value - float(exact[token])) > 1e-3, "moved keys make no difference"
        again, stats = serve(engine, after), engine.stats()
        assert again.outputs[0].token_ids == output.outputs[0].token_ids and not again.exact
        assert again.num_cached_tokens == len(after) and again.num_moved_tokens == 0
        other = serve(engine, [*after[:-2], 5, 6, 7])
        assert not other.exact and engine.stats().computed_prompt_tokens - stats.computed_prompt_tokens == 3
        own = serve(engine, after, reuse="prefix")
        token, value = next(iter(own.outputs[0].logprobs[0].items()))
        assert own.exact and own.num_cached_tokens == 21 and abs(value - float(exact[token])) < 1e-4


def test_prompts_without_long_runs_stay_exact() -> None:
    first, second, *others = documents(6, 40)
    prompts = (others[0], first + others[1], others[2] + second[:12], second[:9] + others[3])
    with Engine(StampModel(families.VOCAB, 256), kv_tokens=600, reuse=RUNS, debug=True) as engine:
        serve(engine, first + second)
        for prompt in prompts:
            assert serve(engine, prompt).exact
        assert all(BLENDED not in name for name in engine._core.tree.namespaces)


def test_other_tenants_runs_are_not_taken() -> None:
    first, second = documents(2, 40)
    with Engine(StampModel(families.VOCAB, 256), kv_tokens=600, reuse=RUNS, debug=True) as engine:
        serve(engine, first + second, namespace="one")
        assert serve(engine, second + first, namespace="two").exact
        assert not serve(engine, second + first, namespace="one").exact


def test_runs_of_a_full_pool_are_not_taken() -> None:
    """Source and copy do not fit side by side: then the prompt is computed, and outputs stay exact."""
    first, second = documents(2, 40)
    with Engine(StampModel(families.VOCAB, 128), kv_tokens=130, reuse=RUNS, debug=True) as engine:
        serve(engine, first + second)
        assert serve(engine, second + first).exact


def test_a_failed_step_copies_again() -> None:
    first, second = documents(2, 40)
    model = StampModel(families.VOCAB, 256)
    with Engine(model, kv_tokens=600, reuse=RUNS, debug=True) as engine:
        serve(engine, first + second)
        model.fail_next = RuntimeError("planted")
        assert not serve(engine, second + first).exact
        assert model.moved == 2 * (32 + 31)


def test_forks_and_samples_of_a_prompt_with_runs() -> None:
    first, second = documents(2, 40)
    with Engine(StampModel(families.VOCAB, 256), kv_tokens=600, reuse=RUNS, debug=True, max_step_tokens=8) as engine:
        serve(engine, first + second)
        name = engine.submit(second + first, SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1))
        engine.step()
        engine.check()
        engine.fork(name)
        while engine.has_unfinished:
            for output in engine.step():
                engine.check()
                assert not output.exact


def test_scores_read_only_what_was_computed() -> None:
    first, second = documents(2, 40)
    with Engine(StampModel(families.VOCAB, 256), kv_tokens=600, reuse=RUNS, debug=True) as engine:
        serve(engine, first + second)
        (scores,) = engine.score(second + first, [[1, 2, 3]])
        assert len(scores) == 3 and engine.stats().moved_prompt_tokens > 0
        assert serve(engine, second + first, SamplingParams(max_tokens=1, prompt_logprobs=0)).exact


def test_preloaded_prompts_are_exact() -> None:
    first, second = documents(2, 40)
    with Engine(StampModel(families.VOCAB, 256), kv_tokens=600, reuse=RUNS, debug=True) as engine:
        engine.preload([first + second, second + first])
        assert engine.stats().moved_prompt_tokens == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"reuse": "suffix"}, "reuse"),
        ({"reuse": "segments", "share": False}, "reuse"),
        ({"reuse": None}, "reuse"),
    ],
)
def test_bad_options_of_engines(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Engine(StampModel(), kv_tokens=64, **options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"min_run": 1}, "min_run"),
        ({"min_run": 2.5}, "min_run"),
        ({"recompute": -0.1}, "recompute"),
        ({"recompute": math.nan}, "recompute"),
        ({"recompute": "all"}, "recompute"),
        ({"recompute": True}, "recompute"),
    ],
)
def test_bad_settings(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SegmentReuse(**options)
    assert caught.value.field == field


def test_requests_cannot_ask_for_what_the_engine_lacks() -> None:
    with Engine(StampModel(), kv_tokens=64) as engine:
        with pytest.raises(InvalidRequest, match="started without reuse='segments'"):
            engine.submit([1], reuse="segments")
        with pytest.raises(InvalidRequest, match="reuse"):
            engine.submit([1], reuse="all")


def test_learned_positions_are_refused_and_the_model_is_released() -> None:
    model = families.build("gpt2")
    with pytest.raises(UnsupportedModel, match=r"gpt2.*reuse='segments'"):
        Engine(model, kv_tokens=64, reuse="segments")
    Engine(model, kv_tokens=64).close()
