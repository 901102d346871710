"""Quantization of a loaded model's linear layers, by name: `int8`, `int4`, `gguf` and `fp8`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from radixgen.core import InvalidRequest, UnsupportedModel
from radixgen.kernels import fp8_linear, int4_linear, int8_linear
from radixgen.model.experts import expert_layers
from radixgen.model.gguf_blocks import GgufBlocks
from radixgen.model.quantized_linear import QuantizedWeight, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATIONS = {"int8": "cpu", "int4": "cpu", "gguf": "cpu", "fp8": "cuda"}
"""Names of quantizations, and the kind of device that each is for."""
_DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}

logger = logging.getLogger(__name__)


def check_quantization(quantization: str | None, device: torch.device) -> None:
    """Raise `InvalidRequest` if the name is unknown, or the device cannot multiply by such weights."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise InvalidRequest("quantization", quantization, f"must be None, {', '.join(QUANTIZATIONS)}")
    kind = QUANTIZATIONS[quantization]
    if device.type != kind:
        raise InvalidRequest("quantization", quantization, f"is for {_DEVICES[kind]}, and the device is {device}")
    if quantization == "int8" and not int8_linear.supported():
        raise InvalidRequest("quantization", quantization, "needs a PyTorch with oneDNN's 8-bit operators")
    if quantization in ("int4", "gguf") and not (int4_linear.supported() and int8_linear.supported()):
        raise InvalidRequest("quantization", quantization, "needs a PyTorch with 4- and 8-bit operators for CPUs")


def quantize_model(name: str, model: "PreTrainedModel", quantization: str, gguf: Path | None = None) -> None:
    """Quantize all linear layers of `model`, which is on its device. `gguf`: the file that it was read from, if any.

    The head, which matters most for accuracy, has 8 bits at least; beside FP8 layers it stays as it is, as in published
    checkpoints. Raises `UnsupportedModel` and `InvalidRequest`.
    """
    if expert_layers(model):
        raise UnsupportedModel(f"{name}: quantization={quantization!r} does not include a mixture of experts")
    head = model.get_output_embeddings()
    blocks = None
    if quantization == "gguf":
        if gguf is None:
            raise InvalidRequest("quantization", quantization, f"needs a .gguf file, and {name} is not read from one")
        blocks = GgufBlocks(gguf, model.dtype)

    def quantize(layer_name: str, layer: nn.Linear) -> QuantizedWeight | None:
        if quantization == "fp8":
            return None if layer is head else fp8_linear.quantize(layer.weight.data)
        if blocks is not None:
            return blocks.find(layer.weight.data) or int8_linear.quantize(layer.weight.data)
        if quantization == "int8" or layer is head:
            return int8_linear.quantize(layer.weight.data)
        if layer.in_features % int4_linear.GROUP:
            reason = f"{layer_name} has {layer.in_features} inputs, and int4 needs a multiple of {int4_linear.GROUP}"
            raise UnsupportedModel(f"{name}: {reason}; use quantization='int8'")
        return int4_linear.quantize(layer.weight.data)

    count = replace_linears(model, quantize)
    if count <= (quantization != "fp8"):
        raise UnsupportedModel(f"{name}: it has no linear layers to quantize, but for its head")
    logger.info("%s: %d linear layers in %s", name, count, quantization)
