"""Write a decoder step of a model to an ONNX file, for runtimes and compilers other than PyTorch."""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from radixgen.core import InvalidRequest, UnsupportedModel
from radixgen.kernels.tree_attention_op import to_standard_operators, tree_attention
from radixgen.model.layer_call import LayerCall
from radixgen.model.loader import LoadedModel, load
from radixgen.model.onnx_step import METADATA, MODEL_FILE, StepBounds, StepDescription
from radixgen.model.tree_model import TreeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OPSET = 24
WEIGHTS = ("float32", "int8")

Tables = Sequence[Sequence[Tensor]]
"""Tensors by window and group."""


class DecoderStep(nn.Module):
    """A step of a decoder as a function of tensors; `radixgen.model.onnx_step` has its inputs and outputs."""

    def __init__(self, tree: TreeModel) -> None:
        super().__init__()
        self.model = tree.model
        self._tree = tree
        self._windows = list(dict.fromkeys(tree.windows))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        write_slots: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        unit_rows: Tables,
        unit_slots: Tables,
        unit_bias: Tables,
        partials: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        new_keys, new_values = list(keys), list(values)

        def attend(call: LayerCall) -> tuple[Tensor, Tensor]:
            layer, window = call.layer, self._windows.index(call.window)
            new_keys[layer] = _written(keys[layer], write_slots, call.k)
            new_values[layer] = _written(values[layer], write_slots, call.v)
            heads = call.k.shape[1]
            return tree_attention(
                call.q,
                new_keys[layer].view(heads, -1, call.k.shape[2]),
                new_values[layer].view(heads, -1, call.v.shape[2]),
                unit_rows[window],
                unit_slots[window],
                unit_bias[window],
                partials[window],
                call.scale,
                call.softcap,
                call.sinks,
            )

        logits = self._tree.trace(token_ids, positions, logit_rows, attend)
        return logits, new_keys, new_values


def _written(pool: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Return the pool `[kv_heads * slots, head_dim]` with `rows` `[rows, kv_heads, head_dim]` at `slots` `[rows]`.

    A scatter, because the exporter transposes the whole pool for `index_put`.
    """
    heads = rows.shape[1]
    first = torch.arange(heads).unsqueeze(1) * (pool.shape[0] // heads)
    index = (first + slots).flatten().unsqueeze(1).expand(-1, pool.shape[1])
    return pool.scatter(0, index, rows.transpose(0, 1).flatten(0, 1))


def export_onnx(
    model: "str | Path | PreTrainedModel",
    folder: str | Path,
    *,
    weights: str = "float32",
    max_model_len: int | None = None,
    bounds: StepBounds | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> StepDescription:
    """Write the model's step in float32 to `folder`, with its config and tokenizer, so that `Engine(folder)` serves it.

    `weights="int8"` stores the matrices of linear layers in 8 bits, with a scale for each block of 32 inputs, for
    onnxruntime's own operator `MatMulNBits`, which quantizes its input in such blocks as it runs.
    `bounds`: maximum sizes of a step. Raises `InvalidRequest`, `ModelNotFound` and `UnsupportedModel`.
    """
    if weights not in WEIGHTS:
        raise InvalidRequest("weights", weights, f"must be {' or '.join(WEIGHTS)}")
    folder = Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise InvalidRequest("folder", str(folder), "must be empty or new")
    name, network, tokenizer, ends = _load(model, tokenizer)
    tree = TreeModel(network, name, max_model_len)
    try:
        step = StepDescription(
            name=tree.name,
            vocab_size=tree.vocab_size,
            max_model_len=tree.max_model_len,
            eos_token_ids=tuple(sorted(ends)),
            layers=tuple((s.kv_heads, s.head_dim, s.v_head_dim) for s in tree.layer_shapes),
            windows=tuple(tree.windows),
            bounds=bounds or StepBounds(),
        )
        program = export_step(tree, step)
        folder.mkdir(parents=True, exist_ok=True)
        _write(program, step, folder, weights)
    finally:
        tree.release()
    network.config.save_pretrained(folder)
    if network.generation_config is not None:
        network.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return step


def _load(
    model: "str | Path | PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None"
) -> "tuple[str, PreTrainedModel, PreTrainedTokenizerBase | None, frozenset[int]]":
    if isinstance(model, str | Path):
        loaded = load(model, "float32", "cpu", tokenizer=tokenizer)
    else:
        if model.dtype != torch.float32 or model.device.type != "cpu":
            raise InvalidRequest("model", f"{model.dtype} on {model.device}", "must be in float32 on the CPU")
        loaded = LoadedModel(type(model).__name__, model.eval(), tokenizer)
    return loaded.name, loaded.model, loaded.tokenizer, loaded.eos_token_ids


def export_step(tree: TreeModel, step: StepDescription) -> torch.export.ExportedProgram:
    """Return the step as a program whose attention is `radixgen::tree_attention`, for any step within its bounds."""
    inputs, sizes = _example(step), _sizes(step)
    with torch.no_grad(), _quiet():
        try:
            return torch.export.export(DecoderStep(tree), inputs, dynamic_shapes=sizes, strict=False)
        except Exception as error:
            raise UnsupportedModel(f"{tree.name}: torch.export cannot follow it: {error}") from error


def _example(step: StepDescription) -> tuple[Any, ...]:
    """Return inputs in which sizes differ, and none is 1."""
    rows, slots, windows, groups = 5, 11, range(len(step.distinct_windows)), range(step.bounds.groups)

    def table(*base: int, dtype: torch.dtype = torch.int64) -> list[list[Tensor]]:
        return [[torch.zeros([size + g for size in base], dtype=dtype) for g in groups] for _ in windows]

    return (
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
        torch.arange(3),
        torch.arange(rows),
        [torch.zeros(heads * slots, size) for heads, size, _ in step.layers],
        [torch.zeros(heads * slots, size) for heads, _, size in step.layers],
        table(2, 3),
        table(2, 7),
        table(2, 3, 7, dtype=torch.float32),
        [torch.zeros(rows, 2, dtype=torch.int64) for _ in windows],
    )


def _sizes(step: StepDescription) -> tuple[Any, ...]:
    """Return the sizes that may differ from step to step, with their bounds, for each input."""
    size, bounds = torch.export.Dim, step.bounds
    rows, slots = size("rows", max=bounds.rows), size("slots")
    windows, groups = range(len(step.distinct_windows)), range(bounds.groups)

    def each(name: str, most: int) -> list[list[Any]]:
        return [[size(f"{name}_{w}_{g}", max=most) for g in groups] for w in windows]

    pieces, heights = each("pieces", bounds.units), each("unit_rows", bounds.rows)
    widths = each("unit_keys", bounds.keys)
    pool = [{0: heads * slots if heads > 1 else slots} for heads, _, _ in step.layers]
    return (
        {0: rows},
        {0: rows},
        {0: size("logit_rows", max=bounds.rows)},
        {0: rows},
        pool,
        pool,
        [[{0: pieces[w][g], 1: heights[w][g]} for g in groups] for w in windows],
        [[{0: pieces[w][g], 1: widths[w][g]} for g in groups] for w in windows],
        [[{0: pieces[w][g], 1: heights[w][g], 2: widths[w][g]} for g in groups] for w in windows],
        [{0: rows, 1: size(f"partials_{w}", max=bounds.units)} for w in windows],
    )


def _write(program: torch.export.ExportedProgram, step: StepDescription, folder: Path, weights: str) -> None:
    with torch.no_grad(), _quiet():
        made = torch.onnx.export(
            to_standard_operators(program),
            dynamo=True,
            opset_version=OPSET,
            input_names=step.input_names(),
            output_names=step.output_names(),
            verbose=False,
            optimize=False,  # takes minutes
        )
    assert made is not None
    _simplify(made.model)
    made.model.metadata_props[METADATA] = step.to_json()
    if weights == "float32":
        made.save(folder / MODEL_FILE, external_data=True)
        return
    with tempfile.TemporaryDirectory(dir=folder) as unquantized:
        made.save(Path(unquantized) / MODEL_FILE, external_data=True)
        _quantize(Path(unquantized) / MODEL_FILE, folder / MODEL_FILE)


def _simplify(model: Any) -> None:
    """Fold constants, transposed weights among them, and compute once what all layers have in common."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for simplify in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        simplify(model)


def _quantize(source: Path, target: Path) -> None:
    """Quantize constant matrices in blocks of 32 inputs. Per matrix, as `quantize_dynamic` does, the inputs' outliers
    cost 30 % of SmolLM2's perplexity.
    """
    import onnx

    with _logging_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    blocks = DefaultWeightOnlyQuantConfig(bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=blocks)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Restore the root logger, which onnxruntime's quantizer configures when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of packages that are not there and of its own code."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
