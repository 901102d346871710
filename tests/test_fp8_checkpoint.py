"""Checkpoints in FP8, as compressed-tensors and ModelOpt write them: loaded with their scales, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import reference_greedy
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from radixgen import Engine, InvalidRequest, SamplingParams, UnsupportedModel
from radixgen.kernels import fp8_linear
from radixgen.model.loader import load
from radixgen.model.quantized_linear import QuantizedLinear

CUDA = torch.cuda.is_available()
FP8 = torch.float8_e4m3fn
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9], [3] * 33]
CONFIG = LlamaConfig(
    vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip
FP8_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}


def compressed(**changed: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors; `changed`: of its only group."""
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quantization_status": "compressed", "config_groups": {"group_0": FP8_GROUP | changed},
    }  # fmt: skip


def part(name: str, **changed: Any) -> dict[str, Any]:
    return {name: FP8_GROUP[name] | changed}


PER_ROW = compressed(**part("weights", strategy="channel"), **part("input_activations", strategy="token", dynamic=True))
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_scheme": None}


def write(path: Path, config: dict[str, Any] | None, *, channels: bool = False, fixed: bool = True,
          more: dict[str, Tensor] | None = None, shards: int = 1) -> dict[str, Tensor]:  # fmt: skip
    """Write a tiny Llama with FP8 weights and their scales. Returns its weights without quantization."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path)
    written = json.loads((path / "config.json").read_text())
    written |= {"dtype": "bfloat16"} | ({} if config is None else {"quantization_config": config})
    (path / "config.json").write_text(json.dumps(written))
    tensors, exact = {}, {}
    for name, weight in load_file(path / "model.safetensors").items():
        tensors[name] = exact[name] = weight.to(torch.bfloat16)
        if "_proj" in name:
            layer = name.removesuffix(".weight")
            scales = weight.abs().amax(1, keepdim=True) / 448
            scales = scales if channels else scales.max()
            tensors[name] = (weight / scales).to(FP8)
            tensors[f"{layer}.weight_scale"] = scales
            exact[name] = tensors[name].float() * scales
            if fixed:
                tensors[f"{layer}.input_scale"] = torch.tensor(0.02)
    tensors |= more or {}
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return exact
    (path / "model.safetensors").unlink()
    files = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return exact


def rounded(given: Tensor, scale: float | None) -> Tensor:
    """Inputs as FP8 holds them."""
    steps = given.abs().amax(-1, keepdim=True) / 448 if scale is None else torch.tensor(scale)
    return (given / steps).clamp(-448, 448).to(FP8).float() * steps


def expected_logits(exact: dict[str, Tensor], scale: float | None) -> Tensor:
    """Of a plain model with the dequantized weights, whose layers round their inputs."""
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    model.load_state_dict({name: weight.float() for name, weight in exact.items()})
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0], scale),))
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([PROMPTS[1]])).logits
    return logits


@pytest.mark.parametrize(
    ("config", "options", "scale"),
    [
        (compressed(), {}, 0.02),
        (compressed(), {"shards": 3}, 0.02),
        (PER_ROW, {"channels": True, "fixed": False}, None),
        (MODELOPT, {}, 0.02),
        (MODELOPT, {"more": {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}}, 0.02),
        (MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, {"channels": True, "fixed": False}, None),
    ],
)
def test_logits_are_those_of_scaled_weights(
    config: dict[str, Any], options: dict[str, Any], scale: float | None, tmp_path: Path
) -> None:
    exact = write(tmp_path, config, **options)
    model = load(tmp_path, "float32", "cpu").model
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 2 * 4, "queries, keys and values are one; so are gate and up"
    assert {module.codes.dtype for module in layers} == {FP8}
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits
    torch.testing.assert_close(logits, expected_logits(exact, scale), rtol=1e-3, atol=1e-3)


def test_scales_in_hf_quant_config(tmp_path: Path) -> None:
    exact = write(tmp_path, None)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with torch.no_grad():
        logits = load(tmp_path, "float32", "cpu").model(torch.tensor([PROMPTS[1]])).logits
    torch.testing.assert_close(logits, expected_logits(exact, 0.02), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(CUDA, reason="on a GPU the products are others")
@pytest.mark.parametrize("config", [MODELOPT, PER_ROW])
def test_engine_equals_generate_of_the_same_layers(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, config, channels=config is PER_ROW, fixed=config is MODELOPT)
    alone = load(tmp_path, "float32", "cpu").model
    expected = [reference_greedy(alone, prompt, 8).token_ids for prompt in PROMPTS]
    with Engine(tmp_path, dtype="float32", kv_tokens=128) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)] == expected
    with Engine(tmp_path, kv_tokens=128) as engine:
        assert engine.dtype == "bfloat16"


@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="FP8 on a GPU")
@pytest.mark.parametrize("config", [MODELOPT, PER_ROW])
@pytest.mark.parametrize("eager", [False, True])
def test_a_gpu_multiplies_in_fp8(config: dict[str, Any], eager: bool, tmp_path: Path) -> None:
    """Captured and compiled like other layers; the first tokens are those of a CPU unless the logits nearly tie."""
    write(tmp_path, config, channels=config is PER_ROW, fixed=config is MODELOPT)
    model = load(tmp_path, "bfloat16", "cuda").model
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and all(module._multiply.func is fp8_linear.fp8_linear for module in layers)
    tokens = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        expected = load(tmp_path, "bfloat16", "cpu").model(tokens).logits.float()
        logits = model(tokens.cuda()).logits.float().cpu()
    assert float((logits - expected).norm()) < 0.1 * float(expected.norm())
    with Engine(tmp_path, kv_tokens=256, enforce_eager=eager) as engine:
        (output,) = engine.generate([PROMPTS[1]], GREEDY)
    choice = expected[0, -1]
    assert float(choice.max() - choice[output.outputs[0].token_ids[0]]) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("config", "more", "says"),
    [
        (MODELOPT | {"quant_algo": "NVFP4"}, {}, "modelopt.*quant_algo is 'NVFP4'"),
        (compressed() | {"format": "pack-quantized"}, {}, "compressed-tensors.*format is 'pack-quantized'"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse"),
        (compressed(**part("weights", type="int")), {}, "weights are not in FP8"),
        (compressed(**part("weights", strategy="block")), {}, "scales of weights by 'block'"),
        (compressed(input_activations=None), {}, "input_activations are not in FP8"),
        (compressed(**part("input_activations", dynamic=True)), {}, "follows from the row alone"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {}, "quantized.*fp8.*only FP8 by"),
        ({"quant_method": "awq", "bits": 4}, {}, "quantized.*awq.*only FP8 by"),
        (MODELOPT, {"q_proj.weight_scale": torch.ones(4)}, "q_proj.weight_scale has 4 numbers instead of 1 or 64"),
        (MODELOPT, {"q_proj.weight_scale": torch.tensor(0.0)}, "q_proj.weight_scale is not positive"),
        (MODELOPT, {"q_proj.input_scale": torch.tensor(torch.inf)}, "q_proj.input_scale is not positive"),
        (MODELOPT, {"q_proj.weight": torch.zeros(64, 64).to(torch.float8_e5m2)}, "e5m2"),
        (MODELOPT, {"q_proj.output_scale": torch.ones(1)}, "no place.*q_proj.output_scale"),
        (PER_ROW, {}, "no place.*input_scale"),
    ],
)
def test_other_checkpoints_are_refused_by_name(
    config: dict[str, Any], more: dict[str, Tensor], says: str, tmp_path: Path
) -> None:
    write(tmp_path, config, more={f"model.layers.1.self_attn.{name}": tensor for name, tensor in more.items()})
    with pytest.raises(UnsupportedModel, match=says):
        load(tmp_path)


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_a_missing_scale_is_named(scale: str, tmp_path: Path) -> None:
    write(tmp_path, MODELOPT)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{scale}"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=rf"layers\.1\.mlp\.up_proj\.{scale} is missing"):
        load(tmp_path)


@pytest.mark.parametrize(("changed", "says"), [("embed_tokens", "no weight of a linear layer"), (None, "none of its")])
def test_fp8_in_other_places(changed: str | None, says: str, tmp_path: Path) -> None:
    exact = write(tmp_path, MODELOPT)
    tensors = {name: weight.to(torch.bfloat16) for name, weight in exact.items()}
    if changed:
        tensors[f"model.{changed}.weight"] = tensors[f"model.{changed}.weight"].to(FP8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=says):
        load(tmp_path)


def test_scales_without_a_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, None)
    with pytest.raises(UnsupportedModel, match=r"no place.*_scale"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "int8"}, "quantization=.*in FP8 already"),
        ({"load_format": "dummy"}, "FP8, which load_format='dummy' does not make"),
        pytest.param(
            {"tensor_parallel_size": 2},
            "FP8, which is not served over several ranks",
            marks=pytest.mark.skipif(CUDA, reason="ranks take the GPUs"),
        ),
    ],
)
def test_options_that_do_not_go_with_fp8(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, MODELOPT)
    with pytest.raises((UnsupportedModel, InvalidRequest), match=says):
        Engine(tmp_path, kv_tokens=64, device="cpu", **options)
