"""`load_format="dummy"`: random weights made from a config alone."""

from pathlib import Path

import families
import pytest
import torch

from radixgen import Engine, InvalidRequest, SamplingParams
from radixgen.model.dummy import make_dummy
from radixgen.model.fused_linear import named_tensors

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[3, 4, 5, 6], [3, 4, 9]]


def config_alone(name: str, folder: Path) -> Path:
    families.build(name).config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def tokens(engine: Engine) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


def test_one_process_makes_the_same_model_again(tmp_path: Path) -> None:
    folder = config_alone("llama", tmp_path)
    with (
        Engine(folder, load_format="dummy", kv_tokens=64) as one,
        Engine(folder, load_format="dummy", kv_tokens=64) as other,
    ):
        assert one.tokenizer is None
        assert tokens(one) == tokens(other)
        models = [engine._model.model.model for engine in (one, other)]
        weights = [{name: tensor.detach() for name, tensor in named_tensors(model)} for model in models]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        drawn = [weight for weight in weights[0].values() if weight.ndim > 1]
        assert all(0.015 < float(weight.std()) < 0.025 for weight in drawn)
        up = [weight for name, weight in weights[0].items() if "mlp.up_proj" in name]
        assert len(up) == 2 and not torch.equal(*up)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_two_ranks_make_a_share_each(name: str, tmp_path: Path) -> None:
    """What rank 0 has is its share and no more, and what is not sharded is one process's."""
    folder = config_alone(name, tmp_path)
    config = families.build(name).config
    whole = dict(make_dummy(config, torch.float32, torch.device("cpu")).named_parameters())
    with Engine(folder, load_format="dummy", kv_tokens=64, kv_dtype="int8", tensor_parallel_size=2) as engine:
        found = tokens(engine)
        assert tokens(engine) == found and all(len(one) == 6 for one in found)
        assert {shape.dtype for shape in engine._model.runner.kv_shapes} == {torch.int8}
        shards = [local(one) for one in engine._model.runner.model.model.parameters()]
        assert sum(one.numel() for one in shards) < 0.6 * sum(one.numel() for one in whole.values())


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@pytest.mark.parametrize(
    ("model", "load_format", "says"),
    [
        ("folder", "safetensors", "load_format=.*must be auto or dummy"),
        ("object", "dummy", "load_format=.*given by name"),
        ("gguf", "dummy", "load_format=.*GGUF"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(model: str, load_format: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    given = {"folder": tmp_path, "object": families.build("llama"), "gguf": tmp_path / "model.gguf"}[model]
    with pytest.raises(InvalidRequest, match=says):
        Engine(given, load_format=load_format, kv_tokens=64)
