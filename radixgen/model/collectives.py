"""Collectives of a tensor-parallel forward pass, in place of transformers' own.

transformers wraps every sharded module in a function that converts between distributed and plain tensors. The wrapper
also serves training, and can be neither fused, compiled nor captured. Here each module works on its rank's shard as a
plain tensor, and communication is done by custom operators, opaque to `torch.compile`: an all-reduce of partial sums
and an all-gather of columns (Shoeybi et al., "Megatron-LM", 2019, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, library, nn

from radixgen.model.fused_linear import FusedLinearSlice
from radixgen.model.rank_all_reduce import RANK_ALL_REDUCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SILENT: ContextVar[bool] = ContextVar("radixgen_silent", default=False)

_SUMS = {"rowwise", "rowwise_rep", "rowwise_split_input"}
_GATHERS = {"colwise_gather_output", "colwise_rep"}
_EXPERTS = {"moe_tp_experts"}
_LOCAL = {"colwise", "packed_colwise", "packed_rowwise", "replicated_with_grad_allreduce", "mla_kv_a_proj", "replicate"}
"""Styles without communication in a forward pass."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The rank of this process and the size of its process group."""

    index: int
    size: int


class RowParallelLinear(nn.Module):
    """A linear layer sharded along its inputs: partial sums are all-reduced, then the bias is added, which is not
    sharded.
    """

    def __init__(self, layer: nn.Module, bias: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, given: Tensor) -> Tensor:
        parts = self.layer.parts(given) if isinstance(self.layer, FusedLinearSlice) else None
        if parts is None or parts.shape[0] == 1:
            output: Tensor = self.layer(given) if parts is None else parts[0]
            torch.ops.radixgen.all_reduce_(output)
        else:
            output = torch.ops.radixgen.all_reduce_parts(parts, given.dtype)
        return output if self.bias is None else output + self.bias


class GatherColumns(nn.Module):
    """All-gather of columns: `width` in all, dealt to `size` ranks as by `Tensor.chunk`."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.gathers = True
        """Whether a forward pass gathers them; otherwise it returns this rank's columns."""

    def forward(self, given: Tensor) -> Tensor:
        return self.gather(given) if self.gathers else given

    def gather(self, given: Tensor) -> Tensor:
        """Return the columns of all ranks."""
        gathered: Tensor = torch.ops.radixgen.all_gather(given, self.width, self.size)
        return gathered


class SelectColumns(nn.Module):
    """Select this rank's columns of a tensor that every rank holds whole."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, given: Tensor) -> Tensor:
        return given[..., self.columns]


def use_plain_collectives(model: "PreTrainedModel", rank: Rank) -> bool:
    """Replace transformers' wrappers in a sharded model by the modules and operators here.

    Returns False, with nothing changed, if the model's plan has a style that is not supported. It then runs with
    transformers' wrappers.
    """
    wrapped = {name: module for name, module in model.named_modules() if _is_wrapped(module)}
    styles = {name: _style(model.tp_plan, name) for name in wrapped}
    if not all(_is_known(module, styles[name]) for name, module in wrapped.items()):
        return False
    register()
    sharded = {module for module in wrapped.values() if any(map(_is_shard, module.parameters(recurse=False)))}
    _unwrap_parameters(model)
    for module in model.modules():
        module._backward_hooks.clear()  # hooks would split a compiled block
    for name, module in wrapped.items():
        del module.forward
        if module not in sharded:
            continue
        if isinstance(module, nn.Linear):
            _replace(model, name, _sharded_linear(module, str(styles[name]), rank))
        elif isinstance(module, nn.Embedding):
            _shard_lookup(module, rank)
        elif styles[name] in _EXPERTS:
            module.register_forward_hook(_sum_output)
    return True


@contextmanager
def silent() -> Iterator[None]:
    """Skip communication in this thread's collectives. Results have the right shape and arbitrary values."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def register() -> None:
    """Register the operators with PyTorch."""
    if hasattr(torch.ops.radixgen, "all_reduce_"):
        return

    @library.custom_op("radixgen::all_reduce_", mutates_args=("given",))
    def all_reduce(given: Tensor) -> None:
        if not _SILENT.get():
            RANK_ALL_REDUCE.all_reduce(given)

    @all_reduce.register_fake
    def _(given: Tensor) -> None: ...

    @library.custom_op("radixgen::all_reduce_parts", mutates_args=())
    def all_reduce_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
        return parts.sum(0).to(dtype) if _SILENT.get() else RANK_ALL_REDUCE.all_reduce_parts(parts, dtype)

    @all_reduce_parts.register_fake
    def _(parts: Tensor, dtype: torch.dtype) -> Tensor:
        return parts.new_empty(parts.shape[1:], dtype=dtype)

    @library.custom_op("radixgen::all_gather", mutates_args=())
    def all_gather(given: Tensor, width: int, size: int) -> Tensor:
        most = -(-width // size)
        if _SILENT.get():
            return given.new_zeros((*given.shape[:-1], width))
        if RANK_ALL_REDUCE.supports(given.dtype, given.nbytes * size):
            return _gather_by_sum(given, most, width)
        missing = most - given.shape[-1]
        own = (nn.functional.pad(given, (0, missing)) if missing else given).reshape(-1, most)
        parts = own.new_empty((size * own.shape[0], most))
        _gather_into(parts, own)
        beside = parts.view(size, -1, most).transpose(0, 1).reshape(*given.shape[:-1], size * most)
        return beside[..., :width].contiguous()

    @all_gather.register_fake
    def _(given: Tensor, width: int, size: int) -> Tensor:
        return given.new_empty((*given.shape[:-1], width))


def gather_ranks(own: Tensor) -> Tensor:
    """All-gather of a small int32 tensor, as an all-reduce: `[ranks, *own.shape]`."""
    parts = own.new_zeros((dist.get_world_size(), *own.shape))
    parts[dist.get_rank()] = own
    RANK_ALL_REDUCE.all_reduce(parts)
    return parts


def _gather_by_sum(own: Tensor, most: int, width: int) -> Tensor:
    """All-gather as an all-reduce: each rank fills the other ranks' columns with zeros."""
    first = dist.get_rank() * most
    whole = own.new_zeros((*own.shape[:-1], width))
    whole[..., first : first + own.shape[-1]] = own
    RANK_ALL_REDUCE.all_reduce(whole)
    return whole


def _gather_into(parts: Tensor, own: Tensor) -> None:
    """All-gather `own` along the first dimension. PyTorch renamed the function in 2.13."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(parts, own)


def _is_wrapped(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__name__", "") == "tp_forward"


def _style(plan: dict[str, str], name: str) -> str | None:
    from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

    return plan.get(replace_layer_number_by_wildcard(name))


def _is_known(module: nn.Module, style: str | None) -> bool:
    if isinstance(module, nn.Linear):
        return style in _SUMS | _GATHERS | _LOCAL
    return style == "embedding_rowwise" if isinstance(module, nn.Embedding) else style in _EXPERTS | _LOCAL


def _is_shard(parameter: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) and not all(placement.is_replicate() for placement in parameter.placements)


def _unwrap_parameters(model: nn.Module) -> None:
    """Replace each distributed parameter by its local shard. Tied parameters stay tied."""
    from torch.distributed.tensor import DTensor

    local: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in local:
                    local[parameter] = nn.Parameter(parameter.to_local().data, requires_grad=False)
                parameters[name] = local[parameter]


def _sharded_linear(layer: nn.Linear, style: str, rank: Rank) -> nn.Module:
    inputs, outputs = layer.in_features, layer.out_features
    layer.out_features, layer.in_features = layer.weight.shape
    if style in _GATHERS:
        return nn.Sequential(layer, GatherColumns(outputs, rank.size))
    if style not in _SUMS:
        return layer
    bias = layer.bias
    layer.register_parameter("bias", None)
    summed = RowParallelLinear(layer, bias)
    if style != "rowwise_split_input":
        return summed
    first = rank.index * -(-inputs // rank.size)
    return nn.Sequential(SelectColumns(slice(first, first + layer.in_features)), summed)


def _shard_lookup(embedding: nn.Embedding, rank: Rank) -> None:
    """Look up the embeddings of this rank's rows, and all-reduce the results."""
    first, rows = rank.index * -(-embedding.num_embeddings // rank.size), embedding.weight.shape[0]
    embedding.padding_idx = None  # only matters for gradients
    look_up = embedding.forward

    def forward(token_ids: Tensor) -> Tensor:
        own = token_ids - first
        output = look_up(own.clamp(0, rows - 1)).masked_fill(((own < 0) | (own >= rows))[..., None], 0)
        torch.ops.radixgen.all_reduce_(output)
        return output

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def _sum_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    torch.ops.radixgen.all_reduce_(output)
    return output


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new
