"""`radixgen.patch`: what `generate` and pipelines return on an engine is what transformers returns by itself."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import torch
from texts import tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, pipeline

import radixgen
from radixgen.huggingface.arguments import unpadded
from radixgen.huggingface.patch import Patch
from radixgen.model import smollm2
from radixgen.model.shared_weights import share_weights

NAMES = ["llama", "mistral", "gpt2", "gemma2", "qwen3-moe"]
ENDS = list(range(4, families.VOCAB, 9))
"""With these end tokens, some rows end early, and some never."""
CASES: list[dict[str, Any]] = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 17},
    {"max_length": 31, "min_new_tokens": 6},
    {"max_new_tokens": 17, "min_length": 25},
    {"max_new_tokens": 17, "eos_token_id": None},
    {"max_new_tokens": 17, "eos_token_id": 9, "pad_token_id": 7},
    {"max_new_tokens": 17, "use_cache": False},
    {"max_new_tokens": 17, "num_beams": 3},
    {"max_new_tokens": 17, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    {"max_new_tokens": 17, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5, "early_stopping": True},
    {"max_new_tokens": 17, "num_beams": 2, "min_new_tokens": 5, "early_stopping": "never", "pad_token_id": 7},
]


def build(name: str = "llama", **config: Any) -> PreTrainedModel:
    model = families.build(name)
    model.generation_config = GenerationConfig(**{"pad_token_id": 0, "eos_token_id": ENDS} | config)
    return model


def batch(rows: int = 4, length: int = 13, shared: int = 6) -> dict[str, Tensor]:
    """Prompts with a common beginning, each shorter than the last, padded on the left."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    beginning = torch.randint(3, families.VOCAB, (shared,), generator=generator)
    for row in range(rows):
        own = torch.randint(3, families.VOCAB, (length - shared - row,), generator=generator)
        ids[row, row:] = torch.cat([beginning, own])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= torch.arange(rows)[:, None]).long()}


def patch(model: PreTrainedModel, **options: Any) -> Patch:
    return radixgen.patch(model, **{"kv_tokens": 2048} | options)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_transformers(name: str) -> None:
    model, own = build(name), build(name)
    with patch(model) as patched:
        for case in CASES:
            expected, actual = own.generate(**batch(), **case), model.generate(**batch(), **case)
            assert actual.dtype == expected.dtype and actual.device == expected.device
            assert actual.tolist() == expected.tolist(), case
        patched.engine.check()


def test_a_repetition_penalty_leaves_padding_out() -> None:
    model, own = build(), build()
    inputs = {name: values[:1] for name, values in batch().items()}  # transformers 5.17 penalizes padding, too
    with patch(model):
        for penalty in (0.7, 1.4):
            case = {"max_new_tokens": 20, "repetition_penalty": penalty}
            assert model.generate(**inputs, **case).tolist() == own.generate(**inputs, **case).tolist()


def test_a_prompt_may_be_given_in_every_way() -> None:
    config = {"max_new_tokens": 6, "do_sample": False}
    model, own = build(**config), build(**config)
    ids = batch(1)["input_ids"]
    other = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    with patch(model):
        assert inspect.signature(model.generate) == inspect.signature(own.generate)
        for arguments, options in (
            ((ids,), {}),
            ((ids, other), {}),
            ((), {"inputs": ids, "generation_config": other}),
            ((ids,), {"custom_generate": None, "logits_processor": [], "stopping_criteria": [], "synced_gpus": False}),
        ):
            assert model.generate(*arguments, **options).tolist() == own.generate(*arguments, **options).tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_logits_and_scores_are_those_of_transformers(penalty: float) -> None:
    model, own = build(), build()
    inputs = batch()
    options = {"max_new_tokens": 17, "min_new_tokens": 2, "repetition_penalty": penalty}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    with patch(model) as patched:
        actual = model.generate(**inputs, **options, **wanted)
        assert patched.engine.inspect(lambda core: core.on_draw) is None
        assert model.generate(**inputs, **options, return_dict_in_generate=True).scores is None
    expected = own.generate(**inputs, **options, **wanted)
    assert type(actual) is type(expected) and actual.sequences.tolist() == expected.sequences.tolist()
    steps = actual.sequences.shape[1] - inputs["input_ids"].shape[1]
    ended = (torch.isin(actual.sequences[:, -steps:], torch.tensor(ENDS)).cumsum(1).roll(1, 1)).bool()
    ended[:, 0] = False
    assert ended.any()
    for name in ("scores", "logits"):
        pairs = list(zip(actual[name], expected[name], strict=True))
        assert len(pairs) == steps
        for step, (ours, theirs) in enumerate(pairs):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours[~ended[:, step]], theirs[~ended[:, step]], atol=1e-4, rtol=1e-4)
            assert not ours[ended[:, step]].any()


def test_scores_of_draws_are_what_the_tokens_were_drawn_from() -> None:
    model, own = build(), build()
    options = {"do_sample": True, "max_new_tokens": 17, "top_p": 0.5, "top_k": 40, "temperature": 0.8}
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    with patch(model):
        actual = model.generate(**batch(), **options, **wanted)
    first = own.generate(**batch(), **options, **wanted).scores[0]
    torch.testing.assert_close(actual.scores[0], first, atol=1e-4, rtol=1e-4)
    ended = torch.zeros(4, dtype=torch.bool)
    for scores, drawn in zip(actual.scores, actual.sequences[:, 13:].T, strict=True):
        assert bool(scores.gather(1, drawn[:, None]).isfinite().all())
        assert not scores[ended].any() and bool(scores[~ended].isinf().any(1).all())
        ended |= torch.isin(drawn, torch.tensor(ENDS))
    assert ended.any()


def test_beams_have_scores() -> None:
    model, own = build(), build()
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    with patch(model):
        actual = model.generate(**batch(), **options)
    expected = own.generate(**batch(), **options, output_scores=True)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_k": 0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]
)
def test_draws_have_the_distribution_of_transformers(options: dict[str, Any]) -> None:
    model, own = build(), build()
    count = 600
    one = {name: values[:1] for name, values in batch().items()}
    options = {"do_sample": True, "max_new_tokens": 1, **options}
    scores = own.generate(**one, **options, return_dict_in_generate=True, output_scores=True).scores[0]
    expected = scores.softmax(-1)[0].double()
    with patch(model):
        torch.manual_seed(11)
        drawn = model.generate(**one, **options, num_return_sequences=count)[:, -1]
    shares = torch.bincount(drawn, minlength=families.VOCAB) / count
    assert not shares[expected == 0].any()
    spread = (expected * (1 - expected) / count).sqrt()
    assert bool(((shares - expected).abs() <= 4.5 * spread + 1 / count).all())


def test_torch_seeds_draws() -> None:
    model = build()
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    with patch(model):
        first, again, other = [
            (torch.manual_seed(seed), model.generate(**batch(), **options))[1].tolist() for seed in (3, 3, 4)
        ]
        assert first == again != other
        assert len(first) == 8 and [row[:13] for row in first] == batch()["input_ids"].repeat_interleave(2, 0).tolist()
        assert first[0] != first[1]
        state = torch.get_rng_state()
        model.generate(**batch(), max_new_tokens=3)
        assert torch.equal(state, torch.get_rng_state())


def test_stop_strings() -> None:
    model, own, texts = build(), build(), tokenizer()
    free = own.generate(**batch(), max_new_tokens=24, eos_token_id=None)
    strings = [texts.decode(free[row, 13 + at : 15 + at]) for row, at in ((0, 4), (2, 9))]
    for options in (
        {"stop_strings": strings},
        {"stop_strings": strings[0]},
        {"generation_config": GenerationConfig(stop_strings=strings)},
    ):
        given = {**batch(), "max_new_tokens": 24, "tokenizer": texts, **options}
        expected = own.generate(**given)
        with patch(model):
            assert model.generate(**given).tolist() == expected.tolist()
        assert expected[0, 13:].tolist() != free[0, 13:].tolist()


class Streamed:
    """Keeps what it gets; `fails_at` of them raises."""

    def __init__(self, fails_at: int = -1) -> None:
        self.values: list[Any] = []
        self._fails_at = fails_at

    def put(self, value: Tensor) -> None:
        if len(self.values) == self._fails_at:
            raise OSError("the pipe is closed")
        self.values.append(value.tolist())

    def end(self) -> None:
        self.values.append("end")


def test_streamers_get_what_they_get_from_transformers() -> None:
    model, own = build(), build()
    one = {name: values[:1] for name, values in batch().items()}
    ours, theirs = Streamed(), Streamed()
    with patch(model) as patched:
        model.generate(**one, max_new_tokens=5, streamer=ours)
        own.generate(**one, max_new_tokens=5, streamer=theirs)
        assert ours.values == theirs.values
        with pytest.raises(OSError, match="pipe"):
            model.generate(**one, max_new_tokens=5, streamer=Streamed(fails_at=3))
        with pytest.raises(ValueError, match=r"streamer=.*there are 4"):
            model.generate(**batch(), max_new_tokens=5, streamer=Streamed())
        assert model.generate(**one, max_new_tokens=5).tolist() == own.generate(**one, max_new_tokens=5).tolist()
        patched.engine.check()
        assert not patched.engine.has_unfinished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "other"}, "assistant_model='other': is not available"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids=.*must be None"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged': must be None or 'dynamic'"),
        ({"custom_generate": "org/name"}, "custom_generate='org/name'"),
        ({"generation_config": GenerationConfig(max_time=2.0)}, "max_time=2.0: must be None"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5: must be None or 1.0"),
        ({"logits_processor": [len]}, "logits_processor=.*is not available"),
        ({"max_new_tokens": 100}, r"len\(input_ids\) \+ max_new_tokens=113: needs"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2: must be None or 0"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=True: must be None or False with num_beams above 1"),
        ({"num_beams": 2, "output_scores": True}, "output_scores=True: must be None or False with num_beams above 1"),
        ({"num_beams": 2, "repetition_penalty": 1.1}, "repetition_penalty=1.1: must be .* with num_beams above 1"),
        ({"num_beams": 2, "streamer": Streamed()}, "streamer=.*with num_beams above 1"),
        ({"num_beams": 999}, "num_beams=999: must be from 1 to"),
        ({"output_hidden_states": True}, "output_hidden_states=True: must be None or False"),
        ({"past_key_values": "cache"}, "past_key_values='cache': is not available"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6: must be None or 0.0"),
        ({"position_ids": torch.zeros(4, 13)}, "position_ids=.*is not available"),
        ({"prefix_allowed_tokens_fn": len}, "prefix_allowed_tokens_fn=.*is not available"),
        ({"stop_strings": "a"}, "tokenizer=None: must be the model's tokenizer"),
        ({"stopping_criteria": [len]}, "stopping_criteria=.*is not available"),
        ({"suppress_tokens": [3]}, "suppress_tokens=.*must be None"),
        ({"top_p": 0.0, "do_sample": True}, "top_p=0.0: must be"),
        ({"attention_mask": torch.ones(4, 13).tril(5)}, r"attention_mask\[0\]=.*pad on the left"),
        ({"attention_mask": torch.zeros(4, 13)}, r"attention_mask\[0\]=.*pad on the left"),
        ({"input_ids": torch.full((4, 13), 160)}, r"input_ids\[0\]=160: must be from 0 to 159"),
        ({"eos_token_id": 9, "pad_token_id": None, "tokenizer": "other", "typo": 1}, "typo"),
    ],
)
def test_everything_else_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = build()
    with patch(model, kv_tokens=64), pytest.raises(ValueError, match=message):
        model.generate(**batch() | {"max_new_tokens": 8} | options)


def test_what_transformers_may_add_is_refused() -> None:
    """Processors and criteria are checked, too, not only the arguments that we know."""
    model, inputs = build(), batch()
    model._get_logits_processor = lambda **_: [nn.Identity()]
    with patch(model), pytest.raises(ValueError, match="logits_processor='Identity': must be of"):
        model.generate(**inputs, max_new_tokens=2)


def test_sequences_of_different_lengths_need_padding() -> None:
    model, texts = build(eos_token_id=None, pad_token_id=None), tokenizer()
    free = model.generate(**batch(), max_new_tokens=12, pad_token_id=0)
    text = texts.decode(free[0, 15:17])
    with patch(model), pytest.raises(ValueError, match="pad_token_id=None: must be a token id"):
        model.generate(**batch(), max_new_tokens=12, stop_strings=text, tokenizer=texts)


def test_prompts_are_shared() -> None:
    model = build()
    inputs = batch(rows=3, length=64, shared=60)
    with patch(model) as patched:
        model.generate(**inputs, max_new_tokens=4)
        stats = patched.engine.stats()
        assert stats.prompt_tokens == 64 + 63 + 62 and stats.computed_prompt_tokens <= 60 + 4 + 3 + 2


def test_the_model_stays_as_it_was() -> None:
    model, own = build("gpt2"), build("gpt2")
    ids = batch()["input_ids"]
    model.train()
    before, places = model.config._attn_implementation, [weight.data_ptr() for weight in model.parameters()]
    with patch(model) as patched:
        out = model.generate(ids, max_new_tokens=4)
        assert model.training and model.config._attn_implementation == before
        assert [
            weight.data_ptr() for weight in patched.engine.inspect(lambda core: core.model.model.model).parameters()
        ]
        assert [weight.data_ptr() for weight in model.parameters()] == places
        assert torch.equal(model.eval()(ids).logits, own(ids).logits)
        model(ids, labels=ids).loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
    assert "generate" not in vars(model) and model.generate(ids, max_new_tokens=4).tolist() == out.tolist()
    radixgen.unpatch(model)
    patched.unpatch()


def test_the_engine_has_the_weights_of_the_model() -> None:
    model = build("qwen2")  # with tied embeddings
    twin = share_weights(model)
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(name == other and weight is same for (name, weight), (other, same) in pairs)
    assert twin.config is not model.config and not {*map(id, twin.modules())} & {*map(id, model.modules())}
    with radixgen.Engine(model, kv_tokens=64), pytest.raises(ValueError, match="is in use by an engine"):
        radixgen.patch(model)


def test_changed_weights_are_served() -> None:
    model, own = build(), build()
    inputs, options = batch(), {"max_new_tokens": 8}
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, own)]
    with patch(model, keep_cache=True) as patched, patch(own) as control:
        first = model.generate(**inputs, **options).tolist()
        computed = patched.engine.stats().computed_prompt_tokens
        assert model.generate(**inputs, **options).tolist() == first
        assert patched.engine.stats().computed_prompt_tokens == computed
        for each, optimizer in zip((model, own), optimizers, strict=True):
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
        plain = type(model).generate
        expected = plain(model, **inputs, **options).tolist()
        assert model.generate(**inputs, **options).tolist() == expected != first
        assert own.generate(**inputs, **options).tolist() == expected
        own.lm_head.weight.data.mul_(-1.0)  # which PyTorch does not count
        own.model.layers[0].mlp.down_proj.weight.data.mul_(-1.0)
        assert own.generate(**inputs, **options).tolist() == plain(own, **inputs, **options).tolist()
        former = control.engine
        own.model.embed_tokens = nn.Embedding.from_pretrained(own.model.embed_tokens.weight.flip(0))
        assert own.generate(**inputs, **options).tolist() == plain(own, **inputs, **options).tolist()
        assert control.engine is not former
        own.double()
        whole = inputs["input_ids"][:1]  # transformers' eager attention has NaN for padding in float64
        assert own.generate(whole, **options).tolist() == plain(own, whole, **options).tolist()


def test_rotary_frequencies_need_no_new_engine() -> None:
    """transformers replaces those of `longrope` when a forward pass has other lengths than the one before."""
    model, own = families.build_longrope(16), families.build_longrope(16)
    with patch(model) as patched:
        for length in (18, 9, 20):
            ids = batch(1, length)["input_ids"]
            engine = patched.engine
            assert torch.equal(model(ids).logits, own(ids).logits)
            if length > 16:
                options = {"max_new_tokens": 6}
                assert model.generate(ids, **options).tolist() == own.generate(ids, **options).tolist()
            assert patched.engine is engine


def test_copies_are_not_patched() -> None:
    model = build()
    ids = batch()["input_ids"]
    with patch(model) as patched:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(-1)
        steps = patched.engine.stats().steps
        assert other.generate.__self__ is other
        assert other.generate(ids, max_new_tokens=3).tolist() != model.generate(ids, max_new_tokens=3).tolist()
        assert patched.engine.stats().steps == steps + 3


def test_a_model_is_patched_once_and_by_its_own_options() -> None:
    model = build()
    with patch(model), pytest.raises(ValueError, match="has another generate already"):
        patch(model)
    with pytest.raises(ValueError, match="keep_cache=1: must be true or false"):
        patch(model, keep_cache=1)
    for name, value in (("device", "cpu"), ("dtype", "float16"), ("tokenizer", None)):
        with pytest.raises(ValueError, match=f"{name}=.*is decided by the model"):
            patch(model, **{name: value})
    with pytest.raises(ValueError, match="model='Linear': must be a transformers model"):
        radixgen.patch(nn.Linear(2, 2))
    with pytest.raises(radixgen.UnsupportedModel):
        patch(families.build_unsupported()["mamba"]())
    assert "generate" not in vars(model)


def test_forward_hooks_are_refused() -> None:
    model = build()
    model(batch()["input_ids"], output_hidden_states=True)  # transformers registers some that only record
    with patch(model):
        model.generate(**batch(), max_new_tokens=2)
        model.get_input_embeddings().register_forward_hook(lambda *_: None)
        with pytest.raises(radixgen.UnsupportedModel, match=r"model.embed_tokens has a forward hook"):
            model.generate(**batch(), max_new_tokens=2)


def test_calls_from_threads_take_turns() -> None:
    model, own = build(), build()
    inputs = [batch(rows) for rows in (1, 2, 3, 4)]
    expected = [own.generate(**each, max_new_tokens=9).tolist() for each in inputs]
    with patch(model), ThreadPoolExecutor(4) as threads:
        actual = list(threads.map(lambda each: model.generate(**each, max_new_tokens=9).tolist(), inputs))
    assert actual == expected


def test_padding_is_left_out() -> None:
    ids = torch.tensor([[0, 0, 5], [7, 8, 9]])
    assert unpadded(ids, None) == ids.tolist()
    assert unpadded(ids, torch.tensor([[0, 0, 1], [1, 1, 1]])) == [[5], [7, 8, 9]]
    with pytest.raises(ValueError, match=r"attention_mask.shape=\(2, 2\): must be \(2, 3\)"):
        unpadded(ids, torch.ones(2, 2))


def test_the_attention_alone_names_what_to_call() -> None:
    model = build()
    with radixgen.Engine(families.build("llama"), kv_tokens=64):
        model.set_attn_implementation("radixgen")
    with pytest.raises(radixgen.UnsupportedModel, match=r"call radixgen.patch\(model\)"):
        model.generate(**batch(), max_new_tokens=2)


def test_pipelines_run_unchanged() -> None:
    """SmolLM2: texts in a batch, chats in a batch, and beams."""
    path = smollm2.fetch()
    texts = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    pipe = pipeline("text-generation", model=model, tokenizer=texts)
    prompts = ["The capital of France is", "Once upon a time, in a land far away,"]
    chats = [[{"role": "user", "content": text}] for text in ("What is 2 + 2?", "Name a colour, and why it is nice.")]

    def outputs() -> list[Any]:
        return [
            pipe(prompts, max_new_tokens=8, do_sample=False, batch_size=2),
            pipe(chats, max_new_tokens=8, do_sample=False, batch_size=2),
            pipe(prompts[0], max_new_tokens=6, num_beams=2, do_sample=False, return_full_text=False),
            model.generate(**texts(prompts, return_tensors="pt", padding=True), max_new_tokens=8).tolist(),
        ]

    expected = outputs()
    with patch(model, kv_tokens=1024) as patched:
        assert outputs() == expected
        assert patched.engine.stats().generated_tokens > 0
