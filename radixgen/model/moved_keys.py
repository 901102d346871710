"""Keys at new positions: KV is copied between slots, and keys are turned by the difference of the positions.

Rotary embeddings (Su et al., arXiv 2104.09864) turn each pair of a key's dimensions by an angle that is proportional to
the position. So a key that was computed at one position becomes that of another by turning it further. Which pairs, and
by which angles, is read from the model itself: a sequence of one token attends only to itself, so that its keys at two
positions differ by the rotation alone, in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from radixgen.cache import KVMoves
from radixgen.cache.storage import KVStorage
from radixgen.core import UnsupportedModel
from radixgen.kernels.quantized import KV, QuantizedKV, as_bytes, read, write
from radixgen.kernels.upload import upload
from radixgen.model.layer_call import LayerCall
from radixgen.model.reference import causal_attention
from radixgen.model.tree_model import TreeModel

_CHUNK_TOKENS = 2048
"""Tokens that are copied at a time, so that little memory is needed."""
_TOLERANCE = 1e-4
"""Of the largest key, in float32; other data types round more."""


@dataclass(frozen=True, eq=False, slots=True)
class Rotary:
    """How positions turn the keys of a layer. Without pairs, not at all."""

    inv_freq: Tensor
    """`[pairs]` float32: angle per position."""
    first: int = 0
    """First dimension that turns; `2 * pairs` do."""
    interleaved: bool = False
    """Whether a pair is two adjacent dimensions; otherwise its second one is `pairs` dimensions further."""

    def angles(self, positions: Tensor, new_positions: Tensor) -> Tensor:
        """Return by which angles keys turn, float64 `[tokens, pairs]`. Rounded as in models, which multiply positions
        in float32.
        """
        before, after = (places.float()[:, None] * self.inv_freq for places in (positions, new_positions))
        return after.double() - before.double()

    def turn(self, keys: Tensor, angles: Tensor) -> Tensor:
        """Return `keys` `[tokens, kv_heads, head_dim]` float32, turned by `angles` `[tokens, pairs]`."""
        pairs = self.inv_freq.numel()
        if not pairs:
            return keys
        cos, sin = (part.float()[:, None] for part in (angles.cos(), angles.sin()))
        turned = keys.clone()
        stop = self.first + 2 * pairs
        if self.interleaved:
            one, two = slice(self.first, stop, 2), slice(self.first + 1, stop, 2)
        else:
            one, two = slice(self.first, stop - pairs), slice(stop - pairs, stop)
        turned[..., one] = keys[..., one] * cos - keys[..., two] * sin
        turned[..., two] = keys[..., two] * cos + keys[..., one] * sin
        return turned


class KeyMover:
    """As `radixgen.cache.KVMover`, for the storage of one model."""

    def __init__(self, storage: KVStorage, rotaries: Sequence[Rotary], device: torch.device) -> None:
        """`rotaries`: those of all layers."""
        self._storage = storage
        self._rotaries = rotaries
        self._device = device

    @torch.inference_mode()
    def move(self, moves: KVMoves) -> None:
        self._storage.bounds.forget(moves.targets)
        for first in range(0, moves.sources.size, _CHUNK_TOKENS):
            self._move(KVMoves(*(array[first : first + _CHUNK_TOKENS] for array in moves)))

    def _move(self, moves: KVMoves) -> None:
        sources, targets, positions, new_positions = (upload(array, self._device) for array in moves)
        angles: dict[Rotary, Tensor] = {}
        for keys, values, rotary in zip(self._storage.keys, self._storage.values, self._rotaries, strict=True):
            if rotary not in angles:
                angles[rotary] = rotary.angles(positions, new_positions)
            turned = rotary.turn(read(keys, sources, torch.float32), angles[rotary])
            write(keys, targets, turned.to(torch.float32 if isinstance(keys, QuantizedKV) else keys.dtype))
            _copy(values, sources, targets)


def _copy(pool: KV, sources: Tensor, targets: Tensor) -> None:
    """Copy the content of slots as it is."""
    if isinstance(pool, QuantizedKV):
        data = as_bytes(pool.data)
        data.index_copy_(0, targets, data[sources])
        pool.scales.index_copy_(1, targets, pool.scales[:, sources])
    else:
        pool.index_copy_(0, targets, pool[sources])


def find_rotaries(model: TreeModel) -> list[Rotary]:
    """Return how positions turn the keys of each layer of `model`.

    Raises `UnsupportedModel` if something else than a rotation depends on the position, as with learned positions.
    """
    far = model.max_model_len - 1
    near_keys, near_values = _probe_position(model, 0)
    far_keys, far_values = _probe_position(model, far)
    rotaries: dict[int, list[Rotary]] = {}
    found: list[Rotary] = []
    for layer, (near, expected) in enumerate(zip(near_keys, far_keys, strict=True)):
        width = near.shape[-1]
        if width not in rotaries:
            rotaries[width] = _candidates(model, width)
        candidates = rotaries[width]
        errors = [_error(candidate, near, expected, far) for candidate in candidates]
        best = int(np.argmin(errors))
        if errors[best] > _tolerance(near) or not _same(near_values[layer], far_values[layer]):
            reason = f"layer {layer}'s keys and values depend on positions by more than a rotation"
            raise UnsupportedModel(f"{model.name}: reuse='segments' cannot move its keys: {reason}")
        found.append(candidates[best])
    return found


def _probe_position(model: TreeModel, position: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and values of all layers of a sequence of one token: of each `[1, kv_heads, dim]`."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(call: LayerCall) -> tuple[Tensor, Tensor]:
        keys.append(call.k.clone())
        values.append(call.v.clone())
        return causal_attention(call, [1])

    token, place = (torch.tensor([number], device=model.device) for number in (model.vocab_size // 2, position))
    model.forward(token, place, torch.zeros_like(token), attend)
    return keys, values


def _candidates(model: TreeModel, width: int) -> list[Rotary]:
    """Return the rotations that may be those of a layer with keys of `width` dimensions: those of all buffers of
    frequencies, in both orders of dimensions, at the beginning and at the end of keys; and none.
    """
    candidates = [Rotary(torch.empty(0, device=model.device))]
    for name, buffer in model.model.named_buffers():
        pairs = buffer.numel()
        if not name.endswith("inv_freq") or not 0 < 2 * pairs <= width:
            continue
        for first in {0, width - 2 * pairs}:
            candidates += [Rotary(buffer.float(), first, interleaved) for interleaved in (False, True)]
    return candidates


def _error(rotary: Rotary, near: Tensor, expected: Tensor, far: int) -> float:
    """Return how far keys at position 0, turned to position `far`, are from those that were computed there."""
    angles = rotary.angles(torch.zeros(1, device=near.device), torch.full((1,), far, device=near.device))
    return float((rotary.turn(near.float(), angles) - expected.float()).abs().max())


def _same(near: Tensor, far: Tensor) -> bool:
    return float((near.float() - far.float()).abs().max()) <= _tolerance(near)


def _tolerance(values: Tensor) -> float:
    return max(_TOLERANCE, 8 * torch.finfo(values.dtype).eps) * float(values.abs().max()) + 1e-9
