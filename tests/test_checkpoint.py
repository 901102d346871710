"""A checkpoint of which a part would be left out is refused by name; a chat ends where its tokenizer says."""

import json
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from radixgen import Engine, UnsupportedModel
from radixgen.model.end_tokens import chat_end_tokens, end_tokens
from radixgen.model.loader import load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    families.build("llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(path: Path, **own: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | own))


def add(path: Path, **weights: Tensor) -> None:
    held = load_file(path / "model.safetensors")
    save_file(held | {name.replace("__", "."): weight for name, weight in weights.items()},
              path / "model.safetensors", {"format": "pt"})  # fmt: skip


@pytest.mark.parametrize("name", ["mlp__up_proj__weight_scale", "self_attn__q_norm__weight"])
def test_weights_without_a_place_are_refused(saved: Path, name: str) -> None:
    add(saved, **{f"model__layers__0__{name}": torch.ones(12)})
    with pytest.raises(UnsupportedModel, match=r"no place.*model\.layers\.0\." + name.replace("__", r"\.")):
        Engine(saved, kv_tokens=64)


def test_more_layers_than_the_config_are_refused(saved: Path) -> None:
    change_config(saved, num_hidden_layers=1)
    with pytest.raises(UnsupportedModel, match=r"no place.*model\.layers\.1\."):
        Engine(saved, kv_tokens=64)


def test_shapes_that_do_not_fit_are_refused(saved: Path) -> None:
    change_config(saved, intermediate_size=32)
    with pytest.raises(UnsupportedModel, match=r"shape|mismatch"):
        Engine(saved, kv_tokens=64)


def test_buffers_of_old_checkpoints_are_harmless(saved: Path) -> None:
    add(saved, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
    Engine(saved, kv_tokens=64).close()


@pytest.mark.parametrize("method", ["modelopt", "fp8", "gptq", "of_tomorrow"])
def test_quantized_weights_are_refused_by_name(saved: Path, method: str) -> None:
    change_config(saved, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModel, match=f"quantized.*{method}"):
        Engine(saved, kv_tokens=64)


def test_a_quantization_beside_the_config_is_refused(saved: Path) -> None:
    (saved / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"hf_quant_config\.json"):
        Engine(saved, kv_tokens=64)


def tokenizer(template: str | None, eos: str | None) -> PreTrainedTokenizerFast:
    words = {"?": 0, "<end>": 1, "<turn>": 2, "radixgen-answer": 3, "unknown": 4}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="unknown")),
        eos_token=eos,
        additional_special_tokens=["<turn>"],
    )
    made.chat_template = template
    return made


TURNS = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("configured", "template", "eos", "ends", "chats"),
    [
        (7, TURNS, "<end>", {7}, {1, 2}),
        ([7, 8], PLAIN, "<end>", {7, 8}, {1}),
        (None, TURNS, None, set(), {2}),
        (None, None, "<end>", set(), {1}),
        (None, "{{ raise_exception('no') }}", None, set(), set()),
        (10**6, PLAIN, None, set(), set()),
    ],
)
def test_end_tokens(
    configured: object, template: str | None, eos: str | None, ends: set[int], chats: set[int], caplog
) -> None:
    """Those of the model for all requests, and what chats have besides."""
    model = families.build("llama")
    model.generation_config.eos_token_id = configured
    assert end_tokens("it", model, tokenizer(template, eos)) == ends
    assert chat_end_tokens(tokenizer(template, eos)) == chats
    assert ("no end token" in caplog.text) == (not ends | chats)


def test_a_special_token_that_has_no_name_of_its_own_ends_a_turn() -> None:
    made = tokenizer(TURNS.replace("<turn>", "<over>"), None)
    made.add_tokens([AddedToken("<over>", special=True)])
    assert chat_end_tokens(made) == {made.convert_tokens_to_ids("<over>")}


def test_another_tokenizer_has_its_own_end_tokens(saved: Path) -> None:
    """Given beside a name it was ignored."""
    given = tokenizer(TURNS, "<end>")
    with Engine(saved, tokenizer=given, kv_tokens=64) as engine:
        assert engine.tokenizer is given and {1, 2} <= engine.inputs.chat_eos_token_ids


def test_the_default_model_s_chats_end_at_its_template_s_token() -> None:
    loaded = load("smollm2")
    loaded.model.generation_config.eos_token_id = 0
    assert loaded.tokenizer is not None
    assert loaded.eos_token_ids == {0} and chat_end_tokens(loaded.tokenizer) == {2}


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma2"])
def test_a_model_without_tokenizer_files_has_no_tokenizer(family: str, tmp_path: Path) -> None:
    """For these transformers makes one up, which knows a few special tokens: no others would ever be drawn."""
    families.build(family).save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer is None
