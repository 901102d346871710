"""A hash of everything but tokens that keys and values depend on."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from radixgen.cache.storage import LayerShape
from radixgen.model.fused_linear import named_tensors
from radixgen.version import VERSION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIECE_BYTES = 8 << 20
"""Bytes that a thread hashes at a time"""


def kv_fingerprint(model: "PreTrainedModel", shapes: Sequence[LayerShape]) -> bytes:
    """Hash the tensors of `model` as they are in memory, its config, the shapes of its KV and the versions of the code.

    So a checkpoint that is overwritten in place gets another fingerprint. Returns 32 bytes.
    """
    import transformers

    settings = {
        "versions": [VERSION, torch.__version__, transformers.__version__],
        "config": _public(model.config.to_dict()),
        "rotary": [getattr(module, "attention_scaling", None) for module in model.modules()],
        "kv": [astuple(shape) for shape in shapes],
    }
    total = sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, tensor in named_tensors(model):  # the buffers have the rotary frequencies
            total.update(repr((name, str(tensor.dtype), *tensor.shape)).encode())
            for digest in threads.map(_digest, _pieces(tensor)):
                total.update(digest)
    return total.digest()


def _public(config: object) -> object:
    """Return a config without its private entries, such as the path it was loaded from."""
    if isinstance(config, dict):
        return {key: _public(value) for key, value in config.items() if not str(key).startswith("_")}
    return config


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in parts; uint8 `[bytes]`."""
    if tensor.is_mkldnn:
        tensor = tensor.to_dense()
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    yield from content.split(_PIECE_BYTES)  # type: ignore[no-untyped-call]


def _digest(piece: Tensor) -> bytes:
    return sha256(piece.cpu().numpy().data).digest()
