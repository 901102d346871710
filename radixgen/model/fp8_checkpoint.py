"""Checkpoints with weights and inputs in FP8: compressed-tensors (`float-quantized`) and NVIDIA ModelOpt.

The dtype in the file says which weights are in FP8, and each has a tensor `weight_scale` beside it. transformers loads
their codes as numbers of the model's dtype, which is exact, and knows nothing of the scales.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from radixgen.core import UnsupportedModel
from radixgen.kernels.fp8_linear import DTYPE, Fp8Weight
from radixgen.model.checkpoint import find_file
from radixgen.model.quantized_linear import replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HF_QUANT_CONFIG = "hf_quant_config.json"
_KV_SCALES = ("k_scale", "v_scale")
_DTYPES = {"F8_E4M3": True, "F8_E5M2": False}
"""FP8 dtypes of safetensors, and whether they can be served"""

logger = logging.getLogger(__name__)


class Fp8Checkpoint:
    """What a checkpoint says of its FP8 weights."""

    def __init__(self, name: str, source: str, *, fixed_inputs: bool) -> None:
        """`source`: directory or hub id. `fixed_inputs`: whether scales of inputs are in the file; else one per row."""
        self._name, self._source, self._fixed_inputs = name, source, fixed_inputs

    @classmethod
    def detect(cls, name: str, config: Any, source: str) -> "Fp8Checkpoint | None":
        """Return the checkpoint that `config` or `hf_quant_config.json` describes; None if it is not quantized.

        Raises `UnsupportedModel` if it is quantized in another way.
        """
        facts = getattr(config, "quantization_config", None)
        if facts is not None:
            facts = facts if isinstance(facts, dict) else vars(facts)
            method = getattr(facts.get("quant_method"), "value", facts.get("quant_method")) or "no method"
            where = f"quantization_config: {method}"
        elif (facts := _read_json(source, HF_QUANT_CONFIG)) is not None:
            method, where = "modelopt", HF_QUANT_CONFIG
            facts = facts.get("quantization") or {}
        else:
            return None
        refused = f"{name}: its weights are quantized ({where})"
        if method == "compressed-tensors":
            return cls(name, source, fixed_inputs=_compressed_tensors(facts, refused))
        if method == "modelopt":
            return cls(name, source, fixed_inputs=_modelopt(facts, refused))
        raise UnsupportedModel(f"{refused}; of such checkpoints only FP8 by compressed-tensors or ModelOpt is served")

    def apply(self, model: "PreTrainedModel", info: dict[str, Any]) -> None:
        """Replace linear layers whose weights are in FP8, and remove the scales from what `info` lists as left out.

        `model`: loaded without its `quantization_config`. `info`: as for `check_whole`. Raises `UnsupportedModel`.
        """
        with ExitStack() as stack:
            tensors = _Tensors(self._source, stack)
            codes = set(self._fp8_names(tensors))
            used: set[str] = set()

            def quantize(layer: str, linear: nn.Linear) -> Fp8Weight | None:
                if f"{layer}.weight" not in codes:
                    return None
                codes.discard(f"{layer}.weight")
                weight = self._weight(layer, linear, tensors)
                used.add(f"{layer}.weight_scale")
                if self._fixed_inputs:
                    used.add(f"{layer}.input_scale")
                return weight

            replace_linears(model, quantize)
            if codes:
                raise UnsupportedModel(f"{self._name}: {min(codes)} is in FP8, and is no weight of a linear layer")
        left_out = {str(key) for key in info["unexpected_keys"]} - used
        if kv_scales := {key for key in left_out if key.rpartition(".")[2] in _KV_SCALES}:
            logger.info("%s: its %d scales of keys and values are not used", self._name, len(kv_scales))
        info["unexpected_keys"] = left_out - kv_scales

    def _fp8_names(self, tensors: "_Tensors") -> Iterator[str]:
        names = {name: _DTYPES[dtype] for name, dtype in tensors.dtypes() if dtype in _DTYPES}
        if not names:
            raise UnsupportedModel(f"{self._name}: its config says FP8, and none of its weights is")
        for name, served in names.items():
            if not served:
                raise UnsupportedModel(f"{self._name}: {name} is in FP8 of 5 exponent bits (e5m2); only e4m3 is served")
            yield name

    def _weight(self, layer: str, linear: nn.Linear, tensors: "_Tensors") -> Fp8Weight:
        device = linear.weight.device
        scales = self._scale(f"{layer}.weight_scale", (1, linear.out_features), tensors).to(device)
        inputs = self._scale(f"{layer}.input_scale", (1,), tensors).to(device) if self._fixed_inputs else None
        return Fp8Weight(linear.weight.data.to(DTYPE), scales, inputs)

    def _scale(self, key: str, sizes: tuple[int, ...], tensors: "_Tensors") -> Tensor:
        scale = tensors.get(key)
        if scale is None:
            raise UnsupportedModel(f"{self._name}: {key} is missing, the scale of a weight in FP8")
        scale = scale.float().flatten()
        if scale.numel() not in sizes:
            raise UnsupportedModel(f"{self._name}: {key} has {scale.numel()} numbers instead of {_either(sizes)}")
        if not bool((scale > 0).all() and scale.isfinite().all()):
            raise UnsupportedModel(f"{self._name}: {key} is not positive and finite")
        return scale


class _Tensors:
    """The safetensors files of a checkpoint."""

    def __init__(self, source: str, stack: ExitStack) -> None:
        from safetensors import safe_open

        self._files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(source)]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def dtypes(self) -> Iterator[tuple[str, str]]:
        for name, file in self._file_of.items():
            yield name, file.get_slice(name).get_dtype()

    def get(self, name: str) -> Tensor | None:
        if name not in self._file_of:
            return None
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def _files(source: str) -> list[str]:
    from transformers.utils.hub import get_checkpoint_shard_files

    if index := find_file(source, "model.safetensors.index.json"):
        return list(get_checkpoint_shard_files(source, index)[0])
    single = find_file(source, "model.safetensors")
    return [] if single is None else [single]


def _read_json(source: str, file: str) -> dict[str, Any] | None:
    """Read a JSON object from a directory or hub id; None if there is no such file, or it cannot be looked up."""
    path = find_file(source, file)
    if path is None:
        return None
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _compressed_tensors(facts: Mapping[str, Any], refused: str) -> bool:
    """Return whether inputs have fixed scales. Raises `UnsupportedModel` for what is not FP8 weights and inputs."""
    if facts.get("format") != "float-quantized":
        raise UnsupportedModel(f"{refused}; its format is {facts.get('format')!r}, and must be 'float-quantized'")
    if (facts.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnsupportedModel(f"{refused}; sparse weights are not served")
    fixed = {_fixed_inputs(group, refused) for group in (facts.get("config_groups") or {}).values()}
    if len(fixed) != 1:
        raise UnsupportedModel(f"{refused}; its config_groups do not agree on how inputs are scaled")
    return fixed.pop()


def _fixed_inputs(group: Mapping[str, Any], refused: str) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    for what, scheme in (("weights", weights), ("input_activations", inputs)):
        if (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
            raise UnsupportedModel(f"{refused}; its {what} are not in FP8")
    if weights.get("strategy") not in ("tensor", "channel"):
        raise UnsupportedModel(f"{refused}; scales of weights by {weights.get('strategy')!r} are not served")
    how = inputs.get("strategy"), bool(inputs.get("dynamic"))
    if how not in (("tensor", False), ("token", True)):
        raise UnsupportedModel(f"{refused}; inputs must have a fixed scale, or one that follows from the row alone")
    return how == ("tensor", False)


def _modelopt(facts: Mapping[str, Any], refused: str) -> bool:
    """As `_compressed_tensors`."""
    algorithms = {"FP8": True, "FP8_PER_CHANNEL_PER_TOKEN": False}
    algorithm = facts.get("quant_algo")
    if algorithm not in algorithms:
        raise UnsupportedModel(f"{refused}; quant_algo is {algorithm!r}, and must be {_either(tuple(algorithms))}")
    return algorithms[algorithm]


def _either(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, dict.fromkeys(values)))
