"""What is loaded, and what is refused by name and with the reason."""

import os
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from oracle import StampModel
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PreTrainedModel

from radixgen import Engine, InvalidRequest, Limits, ModelNotFound, SamplingParams, UnsupportedModel
from radixgen.cache.storage import LayerShape

UNSUPPORTED = families.build_unsupported()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(name: str) -> None:
    model = UNSUPPORTED[name]()
    with pytest.raises(UnsupportedModel, match=model.config.model_type):
        Engine(model, kv_tokens=64)


def test_dynamic_rotary_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="dynamic"):
        Engine(families.build_dynamic_rope(), kv_tokens=64)


def test_rows_that_mix_outside_attention_are_refused() -> None:
    """A model whose layers look at their neighbours by other means would be silently wrong."""
    model = families.build("llama")
    layer = model.model.layers[0]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: plain(x) + x.roll(1, dims=1)
    with pytest.raises(UnsupportedModel, match="mixes"):
        Engine(model, kv_tokens=64)


@pytest.mark.parametrize("others_matter", [False, True])
def test_experts_may_differ_with_the_shape_of_a_step_but_not_with_other_rows(others_matter: bool) -> None:
    """Pins that rounding, which sends rows to other experts in half precision, was taken for rows that mix."""
    model = families.build("gpt-oss")
    layer = model.model.layers[0]
    plain = layer.input_layernorm.forward
    layer.input_layernorm.forward = lambda x: (plain(x) + (x.roll(1, 1) if others_matter else 0)) * x.shape[1]
    if not others_matter:
        Engine(model, kv_tokens=64).close()
        return
    with pytest.raises(UnsupportedModel, match="mixes"):
        Engine(model, kv_tokens=64)


def test_a_model_comes_back_as_it_was() -> None:
    model, ids = families.build("gemma3"), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(ids).logits
        with Engine(model, kv_tokens=64) as engine:
            engine.generate([5, 6, 7])
        assert torch.equal(model(ids).logits, before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    families.build("llama").save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_without_tokenizer_serves_token_ids(saved: Path) -> None:
    with Engine(saved, kv_tokens=64) as engine:
        output = engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))[0].outputs[0]
        assert len(output.token_ids) == 4 and output.text == ""
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            engine.generate("text")
        with pytest.raises(InvalidRequest, match="no chat template"):
            engine.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_dtypes(saved: Path, dtype: str, expected: torch.dtype) -> None:
    with Engine(saved, dtype=dtype, kv_tokens=64) as engine:
        assert engine._model.model.layer_shapes[0].dtype == expected
        assert len(engine.generate([5, 6, 7])[0].outputs[0].token_ids) == 16


def test_missing_and_broken_models(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such directory"):
        Engine(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        Engine(tmp_path / "empty")
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UnsupportedModel, match="could not load"):
        Engine(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ModelNotFound):
        Engine(saved)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"device": "nowhere"}, "device"),
        ({"attention": "magic"}, "attention"),
        ({"plan": "best"}, "plan"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"max_step_tokens": 0}, "max_step_tokens"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": families.MAX_POSITIONS + 1}, "max_model_len"),
    ],
)
def test_bad_options_are_named(saved: Path, options: dict, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        Engine(saved, **({"kv_tokens": 64} | options))


def test_the_pool_is_sized_from_memory() -> None:
    model: PreTrainedModel = families.build("llama")
    with Engine(model, max_model_len=8) as engine:
        assert engine.stats().kv_tokens_total == engine.limits.max_num_seqs * 8


class Cramped(StampModel):
    """No memory for more than `room` slots."""

    room = 100

    def allocate(self, slots: int) -> None:
        if slots > self.room:
            raise torch.OutOfMemoryError(f"{slots} slots")
        super().allocate(slots)


def test_a_pool_that_does_not_fit_is_made_smaller(caplog) -> None:
    limits = Limits(max_num_seqs=3)
    with Engine(Cramped(max_model_len=64), limits=limits) as engine:
        assert engine.stats().kv_tokens_total == 3 * 64 * 3 // 4 * 3 // 4 * 3 // 4
        assert engine.generate([[1, 2]], SamplingParams(max_tokens=3))[0].finished
    assert caplog.text.count("no memory for") == 3


def test_a_pool_of_which_an_eighth_does_not_fit_is_an_error() -> None:
    with pytest.raises(InvalidRequest, match="kv_tokens"):
        Engine(Cramped(max_model_len=100_000))


def test_a_pool_that_was_asked_for_is_not_made_smaller() -> None:
    with pytest.raises(InvalidRequest, match=r"kv_tokens.*101"):
        Engine(Cramped(), kv_tokens=101)


def test_bytes_of_a_token() -> None:
    assert LayerShape(kv_heads=3, head_dim=64, v_head_dim=32, dtype=torch.bfloat16).bytes_per_token == 3 * 96 * 2


def test_steps_are_as_large_as_the_models_own_device_takes(monkeypatch) -> None:
    """A model that is given as an object stays on the CPU of a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    with Engine(families.build("llama"), kv_tokens=64, attention="torch") as engine:
        assert engine.max_step_tokens == 2048
    with Engine(StampModel(), kv_tokens=64, attention="torch") as engine:
        assert engine.max_step_tokens == 8192


def test_a_model_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog) -> None:
    def broken(*_: object) -> None:
        raise OSError("no compiler on this machine")

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=broken))
    model = families.build("llama")
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with Engine(model, kv_tokens=64) as engine:
        expected = engine.generate([5, 6, 7], params)[0].outputs[0].token_ids
    with Engine(model, kv_tokens=64, torch_compile=True) as engine:
        assert engine.generate([5, 6, 7], params)[0].outputs[0].token_ids == expected
        engine.check()
    warnings = [record.message for record in caplog.records if "torch.compile failed" in record.message]
    assert len(warnings) == 1 and "no compiler on this machine" in warnings[0]


def test_what_is_compiled_is_kept_where_that_can_be_written(monkeypatch, tmp_path) -> None:
    """PyTorch names its own folder as soon as it is imported, which is no wish of the user's."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", "")

    def folder(cache: Path, before: Path) -> Path:
        monkeypatch.setenv("RADIXGEN_CACHE", str(cache))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(before))
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        with Engine(families.build("llama"), kv_tokens=64, torch_compile=True):
            return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])

    default = Path(default_cache_dir())
    assert folder(tmp_path / "new", default) == tmp_path / "new" / "inductor"
    assert Path(os.environ["TRITON_CACHE_DIR"]) == tmp_path / "new" / "inductor" / "triton"
    assert folder(tmp_path / "file", default) == default
    assert folder(tmp_path / "new", tmp_path / "wished") == tmp_path / "wished"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_compiled_blocks_answer_as_they_did_and_are_given_back(monkeypatch) -> None:
    """Twice, because a model that stayed compiled would be traced through the next engine's probe."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    model = families.build("llama")
    asked = [[5, 6, 7, 8], [5, 6, 9]]
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with Engine(model, kv_tokens=64) as engine:
        expected = [output.outputs[0].token_ids for output in engine.generate(asked, params)]
    for _ in range(2):
        with Engine(model, kv_tokens=64, torch_compile=True) as engine:
            assert [output.outputs[0].token_ids for output in engine.generate(asked, params)] == expected
        assert all(module._compiled_call_impl is None for module in model.modules())
