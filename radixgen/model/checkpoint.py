"""Checks that a checkpoint can be loaded, and that all of it was."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixgen.core import UnsupportedModel
from radixgen.core.adapters import ADAPTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Buffers computed from the config. Old versions of transformers saved them."""
_GGUF_TYPE = re.compile(rb"general\.type\x08\0\0\0(.{8})", re.DOTALL)
"""Key and type of GGUF's `general.type`, followed by the length of its string value."""
_GGUF_HEAD_BYTES = 1 << 16
_MAX_NAMES = 3
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_adapter(name: str, source: str) -> None:
    """Raise `UnsupportedModel` if `source` is an adapter (LoRA), or contains one beside a model."""
    for file in ADAPTER_FILES:
        if find_file(source, file) is not None:
            raise UnsupportedModel(f"{name}: it holds an adapter ({file}); {ADAPTERS}")


def check_gguf(name: str, path: Path) -> None:
    """Raise `UnsupportedModel` if a GGUF file declares an adapter or anything else but a model."""
    with path.open("rb") as file:
        head = file.read(_GGUF_HEAD_BYTES)
    match = _GGUF_TYPE.search(head)
    if match and (kind := head[match.end() :][: int.from_bytes(match[1], "little")]) != b"model":
        reason = ADAPTERS if kind == b"adapter" else "give the model's own file"
        raise UnsupportedModel(f"{name}: its GGUF file holds no model ({kind[:40].decode(errors='replace')}); {reason}")


def check_layers(name: str, model: "PreTrainedModel") -> None:
    """Raise `UnsupportedModel` if PEFT has put adapters into `model`."""
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise UnsupportedModel(f"{name}: it holds an adapter in its layers; {ADAPTERS}")


def check_whole(name: str, model: "PreTrainedModel", info: dict[str, Any]) -> None:
    """Raise `UnsupportedModel`, with examples, if weights were left out, are missing or have the wrong shape.

    `info`: the result of `from_pretrained(output_loading_info=True)`.
    """
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    left_out = {key for key in info["unexpected_keys"] if key not in tied and not _BUFFERS.search(key)}
    unfit = {str(key[0]) if isinstance(key, tuple) else str(key) for key in info.get("mismatched_keys", ())}
    for keys, reason in (
        (set(info["missing_keys"]), "are missing"),
        (unfit, "have another shape than its config says"),
        (left_out, "have no place in the model that its config describes"),
    ):
        if keys:
            some = ", ".join(sorted(keys)[:_MAX_NAMES])
            raise UnsupportedModel(f"{name}: {len(keys)} weights {reason}, {some} among them")


def find_file(source: str, file: str) -> str | None:
    """Return the path of a file in a directory or hub model. None also if the lookup fails, since loading will report
    the reason.
    """
    from transformers.utils import cached_file

    options = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        path: str | None = cached_file(source, file, **options)
    except (OSError, ValueError):
        return None
    return path
