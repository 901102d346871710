"""The model behind an engine: loaded on one device or over several, fused and compiled, its KV allocated."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from radixgen.cache import DiskTier, KVCopies, KVMover
from radixgen.cache.storage import free_host_bytes, kv_room
from radixgen.core import InvalidRequest, Limits, UnsupportedModel, check_integer
from radixgen.kernels.backend import backend
from radixgen.kernels.chip import Chip
from radixgen.kernels.quantized import KV_DTYPES
from radixgen.model.base import Model, SupportsDiskKV, SupportsHostKV, SupportsKVMoves
from radixgen.model.checkpoint import check_layers
from radixgen.model.kv_dir import check_kv_dir, default_host_tokens, open_kv_dir
from radixgen.model.loader import LoadedModel, check_load_format, load, load_tokenizer, resolve_device, resolve_dtype
from radixgen.model.onnx_model import OnnxModel, open_exported
from radixgen.model.onnx_step import is_exported
from radixgen.model.parallel import ParallelModel, shard
from radixgen.model.runner import MAX_GRAPH_ROWS, ModelRunner
from radixgen.model.tree_model import TreeModel
from radixgen.scheduler.cost import CostModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MAX_OFFLOADING_GIB = 2**20


class PreparedModel(NamedTuple):
    """A model behind the engine's interface, with its KV pool, and the sizes that were chosen."""

    model: Model
    tokenizer: "PreTrainedTokenizerBase | None"
    kv_tokens: int
    max_step_tokens: int
    host_kv: KVCopies | None
    disk: DiskTier | None
    kv_mover: KVMover | None


def prepare_model(
    model: "str | Path | PreTrainedModel | Model",
    tokenizer: "PreTrainedTokenizerBase | None",
    limits: Limits,
    *,
    load_format: str,
    dtype: str | torch.dtype,
    device: str,
    attention: str,
    kv_dtype: str,
    kv_tokens: int | None,
    host_kv_tokens: int,
    kv_offloading_size: float,
    kv_dir: str | Path | None,
    kv_dir_bytes: int | None,
    max_model_len: int | None,
    max_step_tokens: int | None,
    ranks: int,
    graphs: bool,
    torch_compile: bool | None,
    moves_kv: bool = False,
) -> PreparedModel:
    """Load a model and allocate its KV pool. The arguments and errors are those of `Engine`.

    `moves_kv`: whether KV is moved to other positions.
    """
    sizes = {"max_step_tokens": max_step_tokens, "kv_tokens": kv_tokens, "max_model_len": max_model_len}
    check_options(model, load_format, dtype, device, attention, kv_dtype, sizes)
    check_integer("tensor_parallel_size", ranks, 1, limits.max_ranks)
    check_integer("host_kv_tokens", host_kv_tokens, 0, 2**63 - 1)
    if not 0.0 <= kv_offloading_size <= _MAX_OFFLOADING_GIB:
        raise InvalidRequest("kv_offloading_size", kv_offloading_size, f"must be from 0 to {_MAX_OFFLOADING_GIB} GiB")
    check_kv_dir(kv_dir, kv_dir_bytes)
    if is_exported(model):
        options: dict[str, object] = {"load_format": load_format, "dtype": dtype, "device": device}
        options |= {"attention": attention, "kv_dtype": kv_dtype, "tensor_parallel_size": ranks}
        folder, model = model, open_exported(model, max_model_len, options)
        tokenizer = tokenizer or load_tokenizer(folder)
    max_step_tokens = max_step_tokens or default_step_tokens(model, device)
    if isinstance(model, OnnxModel):
        model.step.bounds.check("max_step_tokens", max_step_tokens, model.step.bounds.rows)
    max_graph_rows = min(max_step_tokens, MAX_GRAPH_ROWS)
    served: Model
    if ranks > 1:
        if not isinstance(model, str | Path):
            raise InvalidRequest("model", model, "must be a name or a path, of which each rank loads its share")
        served, loaded = shard(
            model,
            ranks,
            dtype=dtype,
            device=device,
            attention=attention,
            max_model_len=max_model_len,
            max_step_tokens=max_step_tokens,
            load_format=load_format,
            kv_dtype=kv_dtype,
            graphs=graphs,
            max_graph_rows=max_graph_rows,
            torch_compile=torch_compile,
            tokenizer=tokenizer,
        )
        tokenizer = loaded.tokenizer
    elif isinstance(model, Model):
        served = model
    else:
        loaded = _load(model, tokenizer, load_format, dtype, device)
        tokenizer = loaded.tokenizer
        tree_model = TreeModel(loaded.model, loaded.name, max_model_len, max_step_tokens)
        try:
            _accelerate(tree_model, graphs, torch_compile)
            served = ModelRunner(
                tree_model,
                attention,
                loaded.eos_token_ids,
                kv_dtype=kv_dtype,
                graphs=graphs,
                max_graph_rows=max_graph_rows,
            )
        except BaseException:
            tree_model.release()
            raise
    slots = allocate_kv(served, kv_tokens, limits, max_step_tokens)
    host_kv = None
    try:
        kv_mover = _kv_mover(served) if moves_kv else None
        if kv_dir is not None and not kv_offloading_size and isinstance(served, SupportsDiskKV):
            host_kv_tokens = host_kv_tokens or default_host_tokens(served, slots)
        host_kv = allocate_host_kv(served, host_kv_tokens, kv_offloading_size)
        disk = None if kv_dir is None else open_kv_dir(served, host_kv, kv_dir, kv_dir_bytes)
    except BaseException:
        if host_kv is not None:
            host_kv.release()
        served.release()
        raise
    return PreparedModel(served, tokenizer, slots, max_step_tokens, host_kv, disk, kv_mover)


def _kv_mover(model: Model) -> KVMover:
    """Return what moves the KV of `model`. Raises `UnsupportedModel`."""
    if not isinstance(model, SupportsKVMoves):
        raise UnsupportedModel(f"{model.name}: reuse='segments' needs a transformers model on a single rank")
    return model.kv_mover()


def check_options(
    model: object,
    load_format: str,
    dtype: str | torch.dtype,
    device: str,
    attention: str,
    kv_dtype: str,
    sizes: Mapping[str, int | None],
) -> None:
    """Raise `InvalidRequest` for an invalid option of `Engine`, before anything is loaded. `sizes`: at least 1, or None
    for the default.
    """
    for field, value in sizes.items():
        if value is not None:
            check_integer(field, value, 1, 2**63 - 1)
    resolve_dtype(dtype)
    if check_load_format(load_format) == "dummy" and not isinstance(model, str | Path):
        raise InvalidRequest("load_format", load_format, "goes with a model that is given by name")
    place = resolve_device(device)
    backend(attention, place)
    _check_kv_dtype(kv_dtype, model, place)


def _check_kv_dtype(kv_dtype: str, model: object, device: torch.device) -> None:
    if kv_dtype == "auto":
        return
    if kv_dtype not in KV_DTYPES:
        raise InvalidRequest("kv_dtype", kv_dtype, f"must be auto, {' or '.join(KV_DTYPES)}")
    if isinstance(model, Model):
        raise InvalidRequest("kv_dtype", kv_dtype, "must be auto: the model object stores its own KV")
    if kv_dtype == "fp8" and (device.type != "cuda" or not Chip.of(device).has_fp8):
        raise InvalidRequest("kv_dtype", kv_dtype, "needs a GPU of compute capability 8.9 or later; int8 runs anywhere")


def default_step_tokens(model: object, device: str) -> int:
    """Return the default maximum of rows per step: 8,192 on a GPU with 32 GiB or more, else 2,048. With
    `device="auto"`, a model object's own device counts. An exported model may have a lower bound.
    """
    if isinstance(model, OnnxModel):
        return min(2048, model.step.bounds.rows)
    own = getattr(model, "device", None)
    place = own if device == "auto" and isinstance(own, torch.device) else resolve_device(device)
    large = place.type == "cuda" and torch.cuda.get_device_properties(place).total_memory >= 32 << 30
    return 8192 if large else 2048


def runs_on_gpu(model: Model) -> bool:
    """Whether it is one of transformers' models, on GPUs."""
    return isinstance(model, ModelRunner | ParallelModel) and model.device.type == "cuda"


def costs_of(model: Model) -> tuple[CostModel, ...]:
    """What attention costs in its layers, where that is known."""
    return model.costs if isinstance(model, ModelRunner | ParallelModel) else ()


def dtype_of(model: Model) -> str:
    """Of the weights; of the logits where the model is not transformers'."""
    return str(model.model.model.dtype).removeprefix("torch.") if isinstance(model, ModelRunner) else "float32"


def allocate_kv(model: Model, requested: int | None, limits: Limits, max_step_tokens: int) -> int:
    """Allocate the model's KV and return the number of slots: `requested`, or what a share of the free memory should
    hold. If that default does not fit, a quarter less is tried each time, down to an eighth. Raises `InvalidRequest`.
    """
    slots = requested or _default_slots(model, limits, max_step_tokens)
    least = requested or slots // 8
    while True:
        try:
            model.allocate(slots)
        except (MemoryError, RuntimeError, ValueError) as error:
            fewer = slots * 3 // 4
            if not isinstance(error, ValueError) and fewer >= max(least, 1):
                logger.warning("no memory for %d KV slots (%s); trying %d", slots, error, fewer)
                slots = fewer
                continue
            model.release()
            raise InvalidRequest("kv_tokens", slots, f"no memory for so many: {error}") from error
        return slots


def allocate_host_kv(model: Model, tokens: int, gib: float) -> KVCopies | None:
    """Allocate the KV of `tokens` tokens, or of `gib` GiB, in host memory. Returns None if both are 0.

    Raises `InvalidRequest`.
    """
    if not tokens and not gib:
        return None
    field, value = ("kv_offloading_size", gib) if gib else ("host_kv_tokens", tokens)
    if tokens and gib:
        raise InvalidRequest(field, value, "give this or host_kv_tokens, not both")
    if not isinstance(model, SupportsHostKV):
        raise InvalidRequest(field, value, f"must be 0: {model.name} does not copy its KV to the host")
    size = model.kv_bytes_per_token
    tokens = tokens or int(gib * 2**30 / size)
    room = free_host_bytes() // size
    if not 0 < tokens <= room:
        limit = f"is for {tokens} tokens; the host's free memory holds 1 to {room} ({room * size / 2**30:.1f} GiB)"
        raise InvalidRequest(field, value, limit)
    try:
        return model.host_kv(tokens)
    except (MemoryError, OSError, RuntimeError) as error:
        raise InvalidRequest(field, value, f"no memory for so much: {error}") from error


def _load(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    load_format: str,
    dtype: str | torch.dtype,
    device: str,
) -> LoadedModel:
    if isinstance(model, str | Path):
        return load(model, dtype, device, load_format=load_format, tokenizer=tokenizer)

    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidRequest("model", model, "must be a name, a path or a transformers model")
    check_layers(type(model).__name__, model)
    if device != "auto":
        model = model.to(resolve_device(device))
    return LoadedModel(type(model).__name__, model.eval(), tokenizer)


def _accelerate(model: TreeModel, graphs: bool, torch_compile: bool | None) -> None:
    """Fuse linear layers on a GPU, and compile blocks where that is requested or the default."""
    cuda = model.device.type == "cuda"
    if cuda:
        model.fuse_linears()
    if torch_compile or (torch_compile is None and cuda and graphs):
        model.compile_blocks()


def _default_slots(model: Model, limits: Limits, max_step_tokens: int) -> int:
    """As many tokens as a share of the free memory holds. On a GPU the largest step has run by then, and has the memory
    that it takes; what CUDA graphs take comes out of the rest.
    """
    if isinstance(model, ModelRunner | ParallelModel) and model.device.type == "cuda":
        model.profile_run(max_step_tokens)
    if isinstance(model, ParallelModel):
        room = model.kv_room
    else:
        room = kv_room(model.device if isinstance(model, ModelRunner) else torch.device("cpu"))
    most = limits.max_num_seqs * model.max_model_len
    slots = min(room // model.kv_bytes_per_token, most)
    if slots < 1:
        raise UnsupportedModel(f"{model.name}: no memory is left for its KV cache")
    return slots
