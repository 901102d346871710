"""Load transformers' model and tokenizer by name.

transformers takes seconds to import, so the functions that use it import it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from radixgen.core import InvalidRequest, ModelNotFound, UnsupportedModel
from radixgen.model import smollm2
from radixgen.model.checkpoint import ADAPTER_FILES, check_adapter, check_gguf, check_whole
from radixgen.model.cpu_dtype import fastest_dtype
from radixgen.model.dummy import make_dummy
from radixgen.model.end_tokens import end_tokens
from radixgen.model.fp8_checkpoint import Fp8Checkpoint
from radixgen.model.quantize import quantize_model
from radixgen.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
LOAD_FORMATS = ("auto", "dummy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in `eval` mode, and its tokenizer, if any."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase | None"

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return end_tokens(self.name, self.model, self.tokenizer)


def resolve_device(device: str) -> torch.device:
    """Resolve a device name; `"auto"` is CUDA if available, else the CPU. Raises `InvalidRequest`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest("device", device, "must be auto, cpu or cuda[:index]") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InvalidRequest("device", device, "must be auto, cpu or cuda[:index]")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device", device, "this machine has no usable CUDA device")
    return chosen


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Resolve a dtype; `"auto"` stays, for `load` to choose. Raises `InvalidRequest`."""
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidRequest("dtype", dtype, f"must be auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_load_format(load_format: str) -> str:
    """Return `load_format` if it is valid. Raises `InvalidRequest`."""
    if load_format not in LOAD_FORMATS:
        raise InvalidRequest("load_format", load_format, f"must be {' or '.join(LOAD_FORMATS)}")
    return load_format


def load(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    *,
    load_format: str = "auto",
    ranks: int = 1,
    rank: int = 0,
    quantization: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    `name`: `smollm2`, a directory (safetensors, or one GGUF file), a `.gguf` file, or a hub id. `tokenizer` replaces
    the model's own. `dtype`: `"auto"` is the checkpoint's own on GPUs and with several ranks, and on a CPU that of
    `fastest_dtype`. `load_format`: `"auto"`, or `"dummy"` for random weights, which needs only the config.
    `quantization`: a name that `radixgen.model.quantize.check_quantization` accepts, or None. A checkpoint in FP8 stays
    in FP8.

    With `ranks` above 1, loads this process's shard of a model that `check_shards` accepts; all ranks of the process
    group load at the same time. Raises `ModelNotFound`, `UnsupportedModel` or `InvalidRequest`.
    """
    place, target = resolve_device(device), resolve_dtype(dtype)
    if target == "auto" and place.type == "cpu" and ranks == 1:
        target = fastest_dtype()
    source, options = _resolve(name)
    if check_load_format(load_format) == "dummy" and "gguf_file" in options:
        raise InvalidRequest("load_format", load_format, f"needs a model with a config.json, and {name} is a GGUF file")
    with quiet_transformers():
        config = _config(name, source, options)
        label = f"{name} ({config.model_type})"
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{label}: an encoder-decoder model")
        if "gguf_file" not in options:
            load_generation_config(name)  # transformers ignores an unreadable file, and its end tokens
        checkpoint = None if "gguf_file" in options else Fp8Checkpoint.detect(label, config, source)
        if checkpoint is not None:
            _check_fp8_options(label, load_format, ranks, quantization)
            target = _own_dtype(config, torch.bfloat16) if isinstance(target, str) else target
        if tokenizer is None:
            tokenizer = _tokenizer(source, options)
        if load_format == "dummy":
            model = _dummy(name, config, target, place, ranks, rank)
        else:
            model = _read(name, label, source, config, target, place, options, ranks, checkpoint)
        if quantization is not None:
            gguf = Path(source) / options["gguf_file"] if "gguf_file" in options else None
            quantize_model(label, model, quantization, gguf)
    return LoadedModel(str(name), model.eval(), tokenizer)


def _read(
    name: str | Path,
    label: str,
    source: str,
    config: Any,
    dtype: torch.dtype | str,
    device: torch.device,
    options: dict[str, Any],
    ranks: int,
    checkpoint: Fp8Checkpoint | None,
) -> "PreTrainedModel":
    """Read all weights of a model. `options`: those of `_source`."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options = dict(options)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if checkpoint is not None and hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would want packages, or refuse it
        options["config"] = config
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=ranks)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise UnsupportedModel(f"{name}: transformers could not load it: {error}") from error
    if ranks == 1:
        model = model.to(device)
    if checkpoint is not None:
        checkpoint.apply(model, info)
    check_whole(label, model, info)
    loaded: PreTrainedModel = model
    return loaded


def _check_fp8_options(label: str, load_format: str, ranks: int, quantization: str | None) -> None:
    """Raise for options that do not go with a checkpoint in FP8."""
    if quantization is not None:
        raise InvalidRequest("quantization", quantization, f"must be None: {label} is in FP8 already")
    if load_format == "dummy":
        raise UnsupportedModel(f"{label}: its weights are in FP8, which load_format='dummy' does not make")
    if ranks > 1:
        raise UnsupportedModel(f"{label}: its weights are in FP8, which is not served over several ranks")


def check_shards(name: str | Path, ranks: int) -> None:
    """Raise `UnsupportedModel` with the reason if `name` cannot be sharded over `ranks` processes."""
    source, options = _resolve(name)
    with quiet_transformers():
        config = _config(name, source, options).get_text_config()
    name = f"{name} ({config.model_type})"
    if options:
        raise UnsupportedModel(f"{name}: a GGUF file is not sharded; save the model as safetensors first")
    plan = config.base_model_tp_plan
    if not plan:
        raise UnsupportedModel(f"{name}: transformers has no tensor-parallel plan for it")
    if not any("att" in layer and style == "colwise" for layer, style in plan.items()):
        return
    heads = config.num_attention_heads
    for kind, count in ("query", heads), ("KV", getattr(config, "num_key_value_heads", None) or heads):
        if count % ranks:
            raise UnsupportedModel(f"{name}: its {count} {kind} heads can't be dealt evenly to {ranks} ranks")


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer of `name`, without the weights; None if it has none."""
    source, options = _resolve(name)
    with quiet_transformers():
        return _tokenizer(source, options)


def load_generation_config(name: str | Path) -> "GenerationConfig | None":
    """Load the `generation_config.json` of a model; None if it has none, like a `.gguf` file.

    Raises `ModelNotFound`, and `InvalidRequest` for a file that cannot be read.
    """
    source, _ = _resolve(name)
    return None if Path(name).suffix == ".gguf" else read_generation_config(source)


def read_generation_config(source: str, file: str = GENERATION_CONFIG) -> "GenerationConfig | None":
    """Read `file` from a directory or hub id; None if it does not exist. Raises `InvalidRequest`."""
    from transformers import GenerationConfig

    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(source, file)
        except (OSError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, OSError) and not Path(source, file).exists():
                return None
            raise InvalidRequest("generation_config", str(Path(source, file)), f"cannot be read: {error}") from error


def _resolve(name: str | Path) -> tuple[str, dict[str, Any]]:
    try:
        return _source(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelNotFound(f"{name}: {error}") from error


def _source(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Return where transformers finds `name`, and the options to read it with."""
    if str(name) == smollm2.NAME:
        return str(smollm2.fetch()), {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if any((path / name).is_file() for name in ("config.json", *ADAPTER_FILES)):
            return str(path), {}
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(path), {"gguf_file": ggufs[0].name}
        raise ModelNotFound(f"{name}: the directory holds no config.json and {len(ggufs)} GGUF files")
    if path.is_absolute() or str(name).startswith((".", "~")) or path.exists():
        raise ModelNotFound(f"{name}: no such directory or GGUF file")
    return str(name), {}


def _dummy(
    name: str | Path, config: Any, dtype: torch.dtype | str, device: torch.device, ranks: int, rank: int
) -> "PreTrainedModel":
    if isinstance(dtype, str):
        dtype = _own_dtype(config, torch.float32)
    try:
        return make_dummy(config, dtype, device, ranks, rank)
    except Exception as error:
        raise UnsupportedModel(f"{name}: transformers could not make it from its config: {error}") from error


def _own_dtype(config: Any, default: torch.dtype) -> torch.dtype:
    """Return the dtype that a config names, or `default`."""
    dtype: torch.dtype = getattr(config.get_text_config(), "dtype", None) or default
    return dtype


def _config(name: str | Path, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    check_adapter(str(name), source)
    if "gguf_file" in options:
        check_gguf(str(name), Path(source) / options["gguf_file"])
    try:
        return AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        raise ModelNotFound(f"{name}: transformers finds no model there: {error}") from error


def _tokenizer(source: str, options: dict[str, Any]) -> "PreTrainedTokenizerBase | None":
    """Load a tokenizer, or return None. A tokenizer of special tokens only, which transformers may invent, counts as
    none.
    """
    from transformers import AutoTokenizer

    gguf = {key: value for key, value in options.items() if key == "gguf_file"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None
    return tokenizer if len(tokenizer) > len(tokenizer.get_added_vocab()) else None
