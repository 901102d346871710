"""Linear layers with weights of 8 and 4 bits: products against plain ones, and engines against `generate`."""

from pathlib import Path

import families
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from reference import reference_greedy
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from radixgen import Engine, InvalidRequest, SamplingParams, UnsupportedModel
from radixgen.kernels import compiled_digits, fp8_linear, int4_linear, int8_linear, skinny_gemm
from radixgen.kernels.fp8_linear import Fp8Weight
from radixgen.model.fused_linear import FusedLinearSlice, restore_linears
from radixgen.model.gguf_blocks import GgufBlocks
from radixgen.model.loader import load
from radixgen.model.quantize import quantize_model
from radixgen.model.quantized_linear import QuantizedLinear, replace_linears

CUDA = torch.cuda.is_available()
FP8_GPU = CUDA and torch.cuda.get_device_capability() >= (8, 9)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 160, "initializer_range": 0.3}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], [5, 6, 7, 8, 9, 10], [11] * 33]

cpu_only = pytest.mark.skipif(CUDA, reason="engines take the GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the norm, as `bench.quantized_weights` tells errors: a GPU adds up products in FP8 with few bits."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert float((actual - expected).float().norm()) <= tolerance * float(expected.float().norm())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest number."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 33), (65, 96), (192, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_products_equal_those_of_dequantized_weights(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Inputs with an outlier a hundred times larger than the rest, as transformers' layers have them."""
    given = torch.randn(2, rows, inputs, dtype=dtype)
    given[..., 0] *= 100
    whole = int8_linear.quantize(torch.randn(outputs, inputs))
    weight = int8_linear.pack(whole)
    assert torch.equal(int8_linear.dequantize(weight), whole.codes * whole.scales[:, None])
    product = int8_linear.int8_linear(given, weight)
    assert_close(product, int8_linear.int8_linear_reference(given, weight), 3e-4 if dtype == torch.float32 else 8e-3)
    for row in range(rows):
        assert torch.equal(int8_linear.int8_linear(given[:1, row : row + 1], weight), product[:1, row : row + 1])


@pytest.mark.parametrize("rows", [0, 1, 3, 33])
@pytest.mark.parametrize("inputs", [1, 33, 576])
@pytest.mark.parametrize("size", [1.0, 1e-35, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_digits_are_those_of_operators(rows: int, inputs: int, size: float, dtype: torch.dtype) -> None:
    given = (torch.randn(rows, inputs) * size).to(dtype)
    digits, steps = int8_linear.split_digits(given)
    for actual, expected in zip(compiled_digits.split_digits(given), (digits, steps), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    high, low = digits.float().chunk(2)
    torch.testing.assert_close((high + low / 254) * steps, given.float(), rtol=1e-5, atol=max(size / 1e3, 1e-34))


def test_8_bit_rows_of_zeros_and_of_no_number() -> None:
    weight = int8_linear.pack(int8_linear.quantize(torch.randn(5, 8)))
    given = torch.stack((torch.zeros(8), torch.full((8,), torch.nan), torch.ones(8)))
    product = int8_linear.int8_linear(given, weight)
    assert bool((product[0] == 0).all() and product[1].isnan().all() and product[2].isfinite().all())
    assert int8_linear.int8_linear(given[:0], weight).shape == (0, 5)


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (7, 64), (65, 96), (192, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bit_products_equal_those_of_dequantized_weights(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    given = torch.randn(2, rows, inputs, dtype=dtype)
    whole = int4_linear.quantize(torch.randn(outputs, inputs))
    weight = int4_linear.pack(whole)
    groups = whole.codes.view(outputs, -1, int4_linear.GROUP) * whole.scales[..., None] + whole.minima[..., None]
    assert_close(int4_linear.dequantize(weight).float(), groups.flatten(1), 8e-3)
    product, expected = int4_linear.int4_linear(given, weight), int4_linear.int4_linear_reference(given, weight)
    size = float(given.float().norm(dim=-1).max() * groups.flatten(1).norm(dim=1).max())
    assert product.dtype == dtype and float((product - expected).abs().max()) <= 4e-3 * size
    assert torch.equal(int4_linear.int4_linear(given[:1, :1], weight), product[:1, :1])


def test_4_bits_keep_what_4_bits_hold() -> None:
    """Also groups that are all one number, and groups of zeros."""
    weight = torch.randint(0, 16, (3, 96)).float() - 4
    weight.view(3, 3, 32)[..., :2] = torch.tensor([-4.0, 11.0])
    weight[0, 32:64] = 2.5
    weight[1, :32] = 0.0
    whole = int4_linear.quantize(weight)
    groups = whole.codes.view(3, -1, int4_linear.GROUP) * whole.scales[..., None] + whole.minima[..., None]
    torch.testing.assert_close(groups.flatten(1), weight)


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("scales", [1, None])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (384, 512), (4096, 14_336)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not FP8_GPU, reason="FP8"))])
def test_fp8_products(rows: int, fixed: bool, scales: int | None, outputs: int, inputs: int, device: str) -> None:
    """The widths of a large model only on a GPU, where few rows have a kernel of their own."""
    if device == "cpu" and inputs > 512:
        pytest.skip("as the smaller ones")
    given = torch.randn(2, rows, inputs, device=device, dtype=torch.bfloat16)
    codes = (torch.randn(outputs, inputs, device=device) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = Fp8Weight(
        codes,
        torch.rand(scales or outputs, device=device) + 0.5,
        torch.full((1,), 0.01, device=device) if fixed else None,
    )
    product = fp8_linear.fp8_linear_reference(given, weight)
    exact = linear(given.float(), codes.float() * weight.scales[:, None]).to(torch.bfloat16)
    assert_close(product, exact, 0.05)
    assert not torch.equal(product, exact)
    if skinny := skinny_gemm.supports(weight.codes):
        skinny_gemm.register()
        assert_near(fp8_linear.fp8_linear(given, weight, skinny=True), product, 0.01)
    assert skinny == (device == "cuda" and torch.cuda.get_device_capability() == (9, 0) and inputs > 64)
    if fp8_linear.supports(weight):
        assert_near(fp8_linear.fp8_linear(given, weight), product, 0.01)
    else:
        assert device == "cpu"


def test_fp8_inputs_beyond_a_fixed_scale_are_clipped() -> None:
    weight = Fp8Weight(torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(1), torch.ones(1))
    assert fp8_linear.fp8_linear_reference(torch.full((1, 16), 1e6), weight).tolist() == [[16 * 448.0] * 16]


def network(**layers: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_layers_with_one_input_share_a_product(bias: bool) -> None:
    torch.manual_seed(0)
    layers = {
        "gate_proj": nn.Linear(64, 5, bias),
        "up_proj": nn.Linear(64, 9, bias),
        "down_proj": nn.Linear(5, 64, bias),
    }
    model = network(**layers)
    given = torch.randn(4, 64)
    expected = [layers["gate_proj"](given), layers["up_proj"](given)]
    assert replace_linears(model, lambda name, layer: int8_linear.quantize(layer.weight.data)) == 3
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2
    for actual, wanted in zip([model.gate_proj(given), model.up_proj(given)], expected, strict=True):
        assert_close(actual, wanted, 0.02)
    restore_linears(model)
    assert isinstance(model.gate_proj, FusedLinearSlice)


@torch.no_grad()
def test_layers_of_two_kinds_stay_apart() -> None:
    model = network(gate_proj=nn.Linear(64, 5), up_proj=nn.Linear(64, 9))
    given = torch.randn(4, 64)
    expected = [model.gate_proj(given), model.up_proj(given)]
    kinds = {"gate_proj": int8_linear.quantize, "up_proj": int4_linear.quantize}
    assert replace_linears(model, lambda name, layer: kinds[name](layer.weight.data)) == 2
    for actual, wanted in zip([model.gate_proj(given), model.up_proj(given)], expected, strict=True):
        assert_close(actual, wanted, 0.15)


@cpu_only
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_engine_equals_generate_of_the_quantized_model(quantization: str, config: type, tmp_path: Path) -> None:
    """Qwen2 has biases."""
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_config(config(**SIZES))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain.save_pretrained(tmp_path)
    alone = load(tmp_path, "float32", "cpu", quantization=quantization).model
    assert not any(isinstance(module, nn.Linear) for module in alone.modules())
    expected = [reference_greedy(alone, prompt, 12).token_ids for prompt in PROMPTS]
    with Engine(tmp_path, quantization=quantization, dtype="float32", kv_tokens=256, device="cpu") as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert all(output.exact for output in outputs)


@cpu_only
def test_compiled_blocks_multiply_by_quantized_weights_too(saved: Path) -> None:
    with Engine(saved, quantization="int8", kv_tokens=256, device="cpu") as engine:
        expected = engine.generate(PROMPTS, GREEDY)
    with Engine(saved, quantization="int8", kv_tokens=256, device="cpu", torch_compile=True) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@cpu_only
def test_kv_on_disk_belongs_to_the_quantized_weights(saved: Path, tmp_path: Path) -> None:
    """KV of the model in float32 is not taken for that of the quantized one."""
    prompt, options = [[7] * 130], {"kv_tokens": 256, "device": "cpu", "kv_dir": tmp_path / "kv"}
    cached = []
    for quantization in None, "int8", "int8", "int4":
        with Engine(saved, quantization=quantization, **options) as engine:
            cached.append(engine.generate(prompt, GREEDY)[0].num_cached_tokens)
    assert [bool(count) for count in cached] == [False, False, True, False]


def test_fp8_keeps_the_head(saved: Path) -> None:
    plain, model = load(saved, "float32", "cpu").model, load(saved, "float32", "cpu").model
    quantize_model("it", model, "fp8")
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    given = torch.randn(3, SIZES["hidden_size"])
    with torch.no_grad():
        for name in "q_proj", "k_proj", "v_proj", "o_proj":
            layers = [each.get_submodule(f"model.layers.1.self_attn.{name}") for each in (model, plain)]
            actual, expected = (layer(given) for layer in layers)
            assert_close(actual, expected, 0.06)
            assert not torch.equal(actual, expected)


@pytest.mark.skipif(not FP8_GPU, reason="FP8")
@pytest.mark.parametrize("eager", [False, True])
def test_an_engine_in_fp8(eager: bool, tmp_path: Path) -> None:
    """In the widths that few rows have a kernel for, captured and compiled or not: about the tokens of bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
    found = []
    for quantization in None, "fp8":
        options = {"dtype": "bfloat16", "kv_tokens": 512, "enforce_eager": eager, "quantization": quantization}
        with Engine(tmp_path, **options) as engine:
            outputs = engine.generate(PROMPTS, params)
            found.append([set(output.outputs[0].logprobs[0]) for output in outputs])
    assert all(len(plain & quantized) >= 3 for plain, quantized in zip(*found, strict=True))


@cpu_only
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "int3"}, "quantization=.*must be None, int8, int4, gguf, fp8"),
        ({"quantization": "fp8"}, "quantization=.*is for a GPU"),
        ({"quantization": "gguf"}, r"quantization=.*needs a \.gguf file"),
        ({"quantization": "int8", "tensor_parallel_size": 2}, "quantization=.*tensor_parallel_size"),
    ],
)
def test_what_cannot_be_quantized_is_refused(options: dict[str, object], says: str, saved: Path) -> None:
    with pytest.raises(InvalidRequest, match=says):
        Engine(saved, kv_tokens=64, **options)


@cpu_only
def test_a_model_object_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"quantization=.*given by name"):
        Engine(families.build("llama"), quantization="int8", kv_tokens=64)


@cpu_only
@pytest.mark.parametrize(
    ("family", "quantization", "says"),
    [
        ("llama", "int4", r"layers\.0\.self_attn\.q_proj has 48 inputs, and int4 needs a multiple of 32"),
        ("mixtral", "int8", "does not include a mixture of experts"),
        ("gpt2", "int4", "no linear layers to quantize"),
    ],
)
def test_models_that_cannot_be_quantized_are_refused(family: str, quantization: str, says: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=says):
        load(tmp_path, quantization=quantization)


def write_gguf(path: Path, model: nn.Module, kind: GGMLQuantizationType) -> dict[str, np.ndarray]:
    """Write a Llama as GGUF, its matrices in `kind` and the embedding in Q8_0; returns the matrices as they are there.

    As in llama.cpp, rows of queries and keys are in another order than transformers'.
    """
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    places = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
              "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
              "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    names = {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}" for layer in range(2)
             for theirs, ours in places.items()}  # fmt: skip
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    written = {}
    for name, tensor in model.state_dict().items():
        theirs = name.removesuffix(".weight")
        values = tensor.float().numpy()
        if theirs.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if theirs.endswith("q_proj") else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(f"{names[theirs]}.weight", values)
            continue
        used = GGMLQuantizationType.Q8_0 if theirs in ("model.embed_tokens", "lm_head") else kind
        packed = quantize(np.ascontiguousarray(values), used)
        written[theirs] = dequantize(packed, used)
        writer.add_tensor(f"{names[theirs]}.weight", packed, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@cpu_only
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_blocks_are_kept(kind: GGMLQuantizationType, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "it.gguf"
    written = write_gguf(path, AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), kind)
    plain = load(path, dtype, "cpu").model
    blocks = GgufBlocks(path, dtype)
    for name, expected in written.items():
        held = plain.get_submodule(name).weight.data
        found = blocks.find(held)
        if expected.shape[0] == SIZES["vocab_size"]:
            assert found is None, "Q8_0 is not of 4 bits"
            continue
        assert found is not None
        values = found.codes.view(len(held), -1, 32) * found.scales[..., None] + found.minima[..., None]
        assert torch.equal(values.flatten(1).to(dtype), held), name
        if not name.endswith(("q_proj", "k_proj")):
            np.testing.assert_array_equal(values.flatten(1).numpy(), expected)
    assert blocks.find(plain.get_submodule("lm_head").weight.data + 1) is None
    with Engine(path, quantization="gguf", dtype=dtype, kv_tokens=256, device="cpu") as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
    alone = load(path, dtype, "cpu", quantization="gguf").model
    if dtype == torch.float32:
        expected_tokens = [reference_greedy(alone, prompt, 12).token_ids for prompt in PROMPTS]
        assert [output.outputs[0].token_ids for output in outputs] == expected_tokens


@cpu_only
def test_a_gguf_file_without_4_bit_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    write_gguf(path, AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), GGMLQuantizationType.Q8_0)
    with pytest.raises(UnsupportedModel, match="no matrices in Q4_0 or Q4_1, only F32, Q8_0"):
        Engine(path, quantization="gguf", kv_tokens=64)
