"""`Press`: which keys of a prompt stay, what is read of them, who shares them, and when their slots are free."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import StampModel, logits_of
from policies import PolicyModel, pressed, stamp_under
from test_reading import greedy, llama, mistral
from transformers import GPT2Config, GPT2LMHeadModel

from radixgen import BeamSearchParams, CacheHint, Engine, Limits, RequestOutput, SamplingParams
from radixgen.core import Chunk, InvalidRequest
from radixgen.model.key_scores import largest_weights
from radixgen.model.layer_call import LayerCall
from radixgen.reading import Press, reading_from_json, reading_to_json

POLICY = Press(ratio=0.3, window=5, sinks=2, kernel=3)
POLICIES = [POLICY, Press(ratio=0.15, window=1, sinks=0, kernel=1), Press(ratio=0.5, window=9, sinks=20, kernel=7)]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, attn_implementation="eager",
        initializer_range=0.4,
    )  # fmt: skip
    return GPT2LMHeadModel(config).float().eval()


def dense_scores(model: Any, prompt: list[int], policy: Press) -> list[float]:
    """Scores by the attention weights that transformers returns for the whole prompt."""
    scored = max(len(prompt) - policy.window, 0)
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([prompt]), output_attentions=True).attentions
    largest = torch.stack(layers)[:, 0, :, -policy.window :].amax((0, 1, 2)).tolist()
    half = policy.kernel // 2
    return [max(largest[max(key - half, 0) : min(key + half + 1, scored)]) for key in range(scored)]


def expected(model: Any, prompt: list[int], kept: set[int], count: int) -> list[int]:
    """Greedy tokens of transformers under an explicit mask. The last prompt token stands there twice: its keys are
    those of the first time, and the second time it reads what is kept.
    """
    size = len(prompt)
    width = getattr(model.config, "sliding_window", None) or size + count
    tokens, places = [*prompt, prompt[-1]], [*range(size), size - 1]
    for _ in range(count):
        mask = torch.full((len(tokens), len(tokens)), -torch.inf)
        for row in range(len(tokens)):
            for key in range(row + 1):
                read = row < size or (key in kept if key < size else key > size)
                if read and places[row] - places[key] < width:
                    mask[row, key] = 0.0
        with torch.no_grad():
            inputs, positions = torch.tensor([tokens]), torch.tensor([places])
            logits = model(input_ids=inputs, position_ids=positions, attention_mask=mask[None, None]).logits
        tokens.append(int(logits[0, -1].argmax()))
        places.append(len(tokens) - 2)
    return tokens[size + 1 :]


def kept_keys(engine: Engine) -> set[int]:
    """Positions of the keys of the only prompt that was pressed."""
    thinned = [node for node in engine._core.tree.nodes() if node.extent_positions is not None]
    assert thinned and len({node.namespace for node in thinned}) == 1
    return {position for node in thinned for position in node.key_slots()[0].tolist()} | {thinned[-1].end}


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_outputs_are_those_of_an_explicit_mask(make: Any, policy: Press) -> None:
    """In one step and in chunks, cold and cached, with plans that share and that do not."""
    model, count = make(), 16
    prompt = np.random.default_rng(1).integers(0, 97, 59).tolist()
    kept = pressed(policy, dense_scores(model, prompt, policy), len(prompt))
    wanted = expected(model, prompt, kept, count)
    assert len(kept) < 32
    options: list[dict[str, Any]] = [{}, {"max_step_tokens": 13}, {"max_step_tokens": 56}, {"plan": "unshared"}]
    for own in options:
        with Engine(model, kv_tokens=300, debug=True, **own) as engine:
            outputs = [engine.generate(prompt, greedy(policy, count))[0] for _ in range(2)]
            assert [output.outputs[0].token_ids for output in outputs] == [wanted] * 2, own
            assert [output.num_cached_tokens for output in outputs] == [0, len(prompt)]
            assert not outputs[0].exact and kept_keys(engine) == kept
            engine.check()


@pytest.mark.parametrize(
    ("rows", "size", "heads", "group"), [(1, 1, 1, 1), (3, 3, 2, 1), (5, 41, 3, 2), (17, 129, 1, 7)]
)
@pytest.mark.parametrize("window", [None, 6, Chunk(8)])
@pytest.mark.parametrize("extras", [False, True])
def test_weights_are_those_of_a_dense_softmax(
    rows: int, size: int, heads: int, group: int, window: Any, extras: bool
) -> None:
    """With soft caps and sinks, and where layers see only a part of the keys."""
    random = np.random.default_rng(rows + size)
    q, keys = random.normal(size=(rows, heads * group, 13)), random.normal(size=(size, heads, 13))
    sinks = random.normal(size=heads * group)
    cap, wanted = 1.5, np.zeros(size)
    for head, row in product(range(heads * group), range(rows)):
        own = size - rows + row
        first = 0 if window is None else max(own - 5, 0) if window == 6 else own // 8 * 8
        logits = [0.7 * float(q[row, head] @ keys[key, head // group]) for key in range(first, own + 1)]
        weights = np.exp([cap * math.tanh(x / cap) for x in logits] if extras else logits)
        weights /= weights.sum() + (math.exp(sinks[head]) if extras else 0)
        wanted[first : own + 1] = np.maximum(wanted[first : own + 1], weights)
    queries, pool = torch.tensor(q).float(), torch.tensor(keys).float()
    more = {"softcap": cap, "sinks": torch.tensor(sinks).float()} if extras else {"softcap": None, "sinks": None}
    call = LayerCall(0, queries, pool, pool, 0.7, window, **more)
    found = largest_weights(call, queries, pool, np.arange(size - rows, size, dtype=np.int32))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)


@given(
    st.builds(Press, ratio=st.floats(0.01, 1.0), window=st.integers(1, 9), sinks=st.integers(0, 9)),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_the_highest_scores_stay(policy: Press, size: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 5, policy.num_scored(size)).astype(np.float32)
    ranges = policy.kept(scores, size)
    assert (np.diff(ranges.reshape(-1)) > 0).all()
    kept = {key for first, stop in ranges.tolist() for key in range(first, stop)}
    assert kept == pressed(policy, scores.tolist(), size)
    always = min(policy.sinks + policy.window, size)
    assert len(kept) == max(math.ceil(policy.ratio * size), always) or len(kept) == size


# -- what is shared, and whose slots are free -------------------------------------------------------------

PROMPT = [i * i % 5 for i in range(90)]
SMALL = Press(ratio=0.2, window=4, sinks=2)


def serve(engine: Engine, model: PolicyModel, names: Sequence[str]) -> tuple[dict[str, RequestOutput], list[int]]:
    """Outputs of requests, and the keys that the tree holds after each step. What is free is overwritten."""
    outputs: dict[str, RequestOutput] = {}
    held = []
    while len(outputs) < len(names):
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
        tree = engine._core.tree
        for extent in tree.pool.free_extents():
            model.poison(range(extent.start, extent.end))
        held.append(sum(node.num_keys for node in tree.nodes()))
    return outputs, held


def watched(slots: int, **options: Any) -> tuple[Engine, PolicyModel]:
    model = PolicyModel(5, 256)
    engine = Engine(model, kv_tokens=slots, debug=True, **options)
    model.watch(engine._core)
    return engine, model


def test_slots_of_keys_that_are_dropped_are_free() -> None:
    engine, model = watched(150, max_step_tokens=24)
    with engine:
        params = SamplingParams(n=2, max_tokens=40, seed=1, reading=SMALL, ignore_eos=True)
        _, held = serve(engine, model, [engine.submit(PROMPT, params, output_kind="final")])
        assert max(held[:3]) == 72 and held[3] == 18 and 18 < max(held[4:]) <= 18 + 2 * 39
        assert engine.stats().preemptions == 0


@pytest.mark.parametrize("seats", [2, 8])
def test_samples_and_later_requests_share_what_is_left(seats: int) -> None:
    """Also those that begin when others are half through."""
    engine, model = watched(300, limits=Limits(max_num_seqs=seats))
    with engine:
        params = SamplingParams(n=2, max_tokens=8, seed=1, reading=SMALL, ignore_eos=True)
        first = [engine.submit(PROMPT, params, output_kind="final") for _ in range(2)]
        outputs, _ = serve(engine, model, first)
        computed = engine.stats().computed_prompt_tokens
        again = engine.submit(PROMPT, params, output_kind="final")
        outputs |= serve(engine, model, [again])[0]
        assert model.scored_prompts == 1 and engine.stats().computed_prompt_tokens - computed <= 2
        each = [[one.token_ids for one in outputs[name].outputs] for name in (*first, again)]
        assert each[0] == each[1] == each[2] and outputs[again].num_cached_tokens == len(PROMPT)


def test_other_prompts_and_other_policies_find_nothing() -> None:
    engine, model = watched(600)
    with engine:
        for prompt, policy, cached in [
            (PROMPT, SMALL, 0),
            (PROMPT, None, 0),
            (PROMPT, SMALL, 90),
            (PROMPT, Press(ratio=0.3, window=4, sinks=2), 0),
            (PROMPT[:-1], SMALL, 0),
            ([*PROMPT, 1], SMALL, 0),
            (PROMPT, None, 90),
        ]:
            name = engine.submit(prompt, SamplingParams(max_tokens=4, seed=1, reading=policy), output_kind="final")
            output = serve(engine, model, [name])[0][name]
            assert output.num_cached_tokens == cached and output.exact == (policy is None)


def test_a_pressed_prompt_is_evicted_as_a_whole() -> None:
    engine, model = watched(200)
    with engine:
        params = SamplingParams(max_tokens=3, seed=1, reading=SMALL, ignore_eos=True)
        for _ in range(2):
            serve(engine, model, [engine.submit(PROMPT, params, output_kind="final")])
            assert engine.stats().kv_tokens_cached == 20
        tree = engine._core.tree
        assert (tree.evict(1), tree.evict(1)) == (1, 1)  # the outputs that were computed
        assert tree.evict(1) == 18 and tree.pool.used == 0
        engine.check()
        serve(engine, model, [engine.submit(PROMPT, params, output_kind="final")])
        assert model.scored_prompts == 2


def test_a_preempted_prompt_is_pressed_again() -> None:
    engine, model = watched(105, max_step_tokens=24)
    with engine:
        prompts = [[i, *PROMPT[:25]] for i in range(3)]
        params = SamplingParams(max_tokens=45, seed=1, reading=SMALL, ignore_eos=True)
        names = [engine.submit(prompt, params, output_kind="final") for prompt in prompts]
        outputs, _ = serve(engine, model, names)
        assert engine.stats().preemptions > 0 and model.scored_prompts > 3
        for name, prompt in zip(names, prompts, strict=True):
            engine.reset_prefix_cache()
            alone = engine.submit(prompt, params, output_kind="final")
            assert serve(engine, model, [alone])[0][alone].outputs == outputs[name].outputs


def test_a_cancelled_prompt_is_pressed_by_the_next_request() -> None:
    engine, model = watched(200, max_step_tokens=24)
    with engine:
        params = SamplingParams(max_tokens=3, temperature=0.0, reading=SMALL, ignore_eos=True)
        name = engine.submit(PROMPT, params)
        engine.step()
        engine.step()
        engine.cancel(name)
        engine.step()
        again = engine.submit(PROMPT, params, output_kind="final")
        output = serve(engine, model, [again])[0][again]
        assert output.num_cached_tokens == 48 and model.scored_prompts == 1
        stamp = stamp_under(PROMPT, [], SMALL)
        assert output.outputs[0].token_ids[0] == int(logits_of(stamp, 5).argmax())


def test_forks_go_on_from_the_same_keys() -> None:
    with Engine(llama(), kv_tokens=300, debug=True) as engine:
        (wanted,) = engine.generate(PROMPT, greedy(POLICY, 20))
        engine.reset_prefix_cache()
        for steps in (0, 1, 5):
            name = engine.submit(PROMPT, greedy(POLICY, 20))
            for _ in range(steps):
                engine.step()
            (fork,) = engine.fork(name)
            last: dict[str, RequestOutput] = {}
            while engine.has_unfinished:
                last |= {output.request_id: output for output in engine.step()}
            assert last[name].outputs == last[fork].outputs == wanted.outputs
            engine.check()


def test_prompts_are_scored_exactly() -> None:
    with Engine(llama(), kv_tokens=400, max_step_tokens=40, debug=True) as engine:
        (exact,) = engine.generate(PROMPT, greedy(None, 3, prompt_logprobs=1))
        (wanted,) = engine.generate(PROMPT, greedy(POLICY, 6))
        for n in (1, 2):
            (found,) = engine.generate(PROMPT, greedy(POLICY, 6, prompt_logprobs=1, n=n))
            assert [one.token_ids for one in found.outputs] == [wanted.outputs[0].token_ids] * n
            assert exact.prompt_logprobs is not None and found.prompt_logprobs is not None
            for ours, theirs in zip(found.prompt_logprobs[1:], exact.prompt_logprobs[1:], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        engine.check()


def test_beams_pins_and_defaults() -> None:
    beams = BeamSearchParams(beam_width=3, max_tokens=6, reading=POLICY)
    with Engine(llama(), kv_tokens=400, reading=POLICY, debug=True) as engine:
        (wanted,) = engine.beam_search(PROMPT, beams)
        assert engine.beam_search(PROMPT, BeamSearchParams(beam_width=3, max_tokens=6))[0].outputs == wanted.outputs
        assert engine.pin(PROMPT[:40]) is None, "a part of a prompt is not to be pinned"
        pin = engine.pin(PROMPT)
        assert pin is not None and engine.stats().kv_tokens_pinned == len(PROMPT)
        engine.reset_prefix_cache()
        assert engine.generate(PROMPT, greedy(None))[0].num_cached_tokens == len(PROMPT)
        engine.check()
        engine.unpin(pin)
        (hint,) = engine.apply_hints(PROMPT, [CacheHint("pin")])
        assert hint.status == "refused"
        (pin,) = engine.preload([[3, *PROMPT]])
        assert pin is not None
        engine.check()


def test_keys_of_eight_bits() -> None:
    with Engine(llama(), kv_tokens=600, kv_dtype="int8", debug=True) as engine:
        alone = [engine.generate(PROMPT, greedy(policy))[0].outputs[0].token_ids for policy in POLICIES]
        engine.reset_prefix_cache()
        together = engine.generate([PROMPT] * 3, [greedy(policy) for policy in POLICIES])
        assert [output.outputs[0].token_ids for output in together] == alone
        engine.check()


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_short_prompts_keep_all(size: int) -> None:
    with Engine(llama(), kv_tokens=100, debug=True) as engine:
        (exact,) = engine.generate(PROMPT[:size], greedy(None))
        (found,) = engine.generate(PROMPT[:size], greedy(POLICY))
        assert found.outputs == exact.outputs and not found.exact
        engine.check()


# -- as JSON, and what is refused -------------------------------------------------------------------------


def test_json_gives_the_same_policy() -> None:
    assert reading_to_json(POLICY) == {"policy": "press", "ratio": 0.3, "window": 5, "sinks": 2, "kernel": 3}
    assert all(reading_from_json(reading_to_json(policy)) == policy for policy in POLICIES)
    assert reading_from_json({"policy": "press"}) == Press()


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("ratio", 0, "more than 0 and at most 1"),
        ("ratio", True, "more than 0 and at most 1"),
        ("ratio", 1.5, "more than 0 and at most 1"),
        ("window", 0, "from 1 to 1024"),
        ("window", 2_000, "from 1 to 1024"),
        ("sinks", -1, "from 0"),
        ("kernel", 4, "must be odd"),
        ("kernel", 0, "from 1"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, limit: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"reading\.{field}={value}: .*{limit}"):
        Press(**{field: value})


class Unscored(StampModel):
    """A model that cannot score keys."""

    run_scored = None  # type: ignore[assignment]


def test_models_that_cannot_score_keys_are_refused() -> None:
    with Engine(Unscored(5, 64), kv_tokens=100) as engine:
        with pytest.raises(InvalidRequest, match="reading='press': needs a transformers model on one rank"):
            engine.generate([1, 2], greedy(SMALL))
        engine.check()
    with pytest.raises(InvalidRequest, match="needs a transformers model on one rank"):
        Engine(Unscored(5, 64), kv_tokens=100, reading=SMALL)
