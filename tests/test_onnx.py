"""Models that `radixgen export` wrote, served over onnxruntime."""

from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import texts
import torch
from reference import compare
from test_exactness import prompts
from typer.testing import CliRunner

from radixgen import Engine, InvalidRequest, SamplingParams, TreeAttention
from radixgen.cli import app
from radixgen.core import Chunk
from radixgen.model.onnx_step import MODEL_FILE, StepBounds, StepDescription, is_exported

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NEW_TOKENS = 12
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and the folder of its export."""
    from radixgen.model.onnx_export import export_onnx

    folder = tmp_path_factory.mktemp(request.param) / "exported"
    export_onnx(families.build(request.param), folder, bounds=StepBounds(groups=2))
    return request.param, folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a tokenizer, and the folder of its export by the command line, in 8 bits."""
    source = texts.saved_model(tmp_path_factory.mktemp("model"))
    folder = tmp_path_factory.mktemp("int8") / "exported"
    result = CliRunner().invoke(app, ["export", str(source), str(folder), "--format", "onnx", "--weights", "int8"])
    assert result.exit_code == 0 and "2,048 rows" in result.stdout, result.output
    return source, folder


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 7}, {"plan": "naive"}, {"kv_tokens": 96}])
def test_greedy_tokens_are_those_of_transformers(model: tuple[str, Path], options: dict) -> None:
    family, folder = model
    oracle = families.build(family)
    with Engine(folder, **{"kv_tokens": 600} | options) as engine:
        outputs = engine.generate(prompts(families.VOCAB), GREEDY)
    for prompt, output in zip(prompts(families.VOCAB), outputs, strict=True):
        assert not compare(oracle, prompt, output.outputs[0].token_ids, NEW_TOKENS).mismatches


def test_a_step_reads_little_more_than_its_plan(model: tuple[str, Path]) -> None:
    family, folder = model
    read = []
    for served in (families.build(family), folder):
        with Engine(served, kv_tokens=600, max_model_len=families.MAX_POSITIONS) as engine:
            engine.generate(prompts(families.VOCAB), GREEDY)
            read.append(engine.stats().kv_bytes_read)
    assert read[0] <= read[1] <= 1.1 * read[0]


def test_a_step_writes_the_pool_in_place(model: tuple[str, Path]) -> None:
    from radixgen.model.onnx_model import OnnxModel

    served = OnnxModel(model[1])
    with Engine(served, kv_tokens=64) as engine:
        engine.generate([3, 4, 5], SamplingParams(max_tokens=1))
        written = {int((pool != 0).any(1).sum()) for pool in served._pool}
        assert written == {3 * served.step.layers[0][0]}


def test_bounds_are_kept(model: tuple[str, Path]) -> None:
    from radixgen.model import onnx_model

    served = onnx_model.OnnxModel(model[1])
    object.__setattr__(served.step, "bounds", StepBounds(groups=2, rows=16, units=2))
    with pytest.raises(InvalidRequest, match="max_step_tokens=17: must be at most 16"):
        Engine(served, kv_tokens=64, max_step_tokens=17)
    with Engine(served, kv_tokens=256) as engine:
        assert engine.max_step_tokens == 16
        outputs = engine.generate([[3, 4], [5, 6, 7], [8, 9]], SamplingParams(max_tokens=3, n=3, temperature=1.0))
        reasons = [one.stop_reason for output in outputs for one in output.outputs if one.finish_reason == "error"]
    assert reasons and all("units=" in reason and "at most 2" in reason for reason in reasons)


def test_chosen_blocks_are_refused(model: tuple[str, Path]) -> None:
    from radixgen.model.onnx_model import OnnxModel

    plan = TreeAttention([-1], [[(0, 4)]], [0]).plan
    none = np.zeros(0, np.int64)
    with pytest.raises(InvalidRequest, match="TopBlocks"):
        OnnxModel(model[1]).run(replace(plan, unit_blocks=np.ones_like(plan.unit_blocks)), none, none, none)


def test_options_of_other_models_are_refused(model: tuple[str, Path], tmp_path: Path) -> None:
    from radixgen.model.onnx_export import export_onnx

    for options in (
        {"dtype": "bfloat16"}, {"attention": "torch"}, {"kv_dtype": "int8"}, {"tensor_parallel_size": 2},
        {"load_format": "dummy"}, {"max_model_len": families.MAX_POSITIONS + 1}, {"host_kv_tokens": 64},
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=next(iter(options))):
            Engine(model[1], **{"kv_tokens": 64} | options)
    with pytest.raises(InvalidRequest, match="folder"):
        export_onnx("smollm2", model[1])
    with pytest.raises(InvalidRequest, match="weights"):
        export_onnx("smollm2", tmp_path, weights="int4")
    with pytest.raises(InvalidRequest, match="model"):
        export_onnx(families.build("llama").to(torch.bfloat16), tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"nothing")
    with pytest.raises(InvalidRequest, match="cannot be loaded by onnxruntime"):
        Engine(tmp_path)
    assert is_exported(model[1]) and not is_exported("smollm2") and not is_exported(None)


def test_the_command_writes_what_the_engine_serves_in_8_bits(small: tuple[Path, Path]) -> None:
    """Also its tokenizer; weights of 8 bits change log-probabilities a little."""
    source, folder = small
    prompt, scores = "abcdefgh" * 4, []
    for served in (source, folder):
        with Engine(served, kv_tokens=256) as engine:
            output = engine.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
            scores.append([max(entry.values()) for entry in output.prompt_logprobs[1:]])
    difference = np.abs(np.subtract(*scores))
    assert 0 < difference.max() < 0.3


def test_the_command_refuses_other_formats(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "smollm2", str(tmp_path / "new"), "--format", "tflite"])
    assert result.exit_code == 1 and "format='tflite': must be onnx" in result.stderr


def test_tvm_compiles_a_step(model: tuple[str, Path]) -> None:
    pytest.importorskip("tvm")
    from bench.tvm_step import compile_step, record_step
    from radixgen.model.onnx_model import OnnxModel

    step = record_step(OnnxModel(model[1]), range(3, 63), [[1], [2, 3], [4, 5, 6], [7, 8]])
    np.testing.assert_allclose(compile_step(model[1], step.inputs)(), step.logits, rtol=1e-4, atol=1e-4)


def test_descriptions_survive_json() -> None:
    step = StepDescription("a", 3, 9, (1, 2), ((1, 2, 3), (4, 5, 6)), (None, Chunk(4)), StepBounds(groups=5))
    assert StepDescription.from_json(step.to_json()) == step
    assert len(set(step.input_names())) == len(step.input_names()) == 4 + 4 + 2 * 5 * 3 + 2
