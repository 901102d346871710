"""Keys moved to other positions: equal to those computed there, in every family, unless positions are learned."""

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from radixgen.cache import KVMoves
from radixgen.cache.storage import KVStorage, LayerShape
from radixgen.core import UnsupportedModel
from radixgen.kernels.quantized import read, write
from radixgen.model.layer_call import LayerCall
from radixgen.model.moved_keys import KeyMover, Rotary, find_rotaries
from radixgen.model.reference import causal_attention
from radixgen.model.tree_model import TreeModel

LEARNED = {"gpt2", "opt"}
"""Families that add a learned vector per position to the embeddings."""
ROTARY = [name for name in families.FAMILIES if name not in LEARNED]


def first_layer(model: TreeModel, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of layer 0, which depend on each token and its position alone."""
    calls: list[LayerCall] = []

    def attend(call: LayerCall) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return causal_attention(call, [tokens.numel()])

    model.forward(tokens, positions, tokens[:1] * 0, attend)
    return calls[0].k.clone(), calls[0].v.clone()


@pytest.mark.parametrize("name", ROTARY)
def test_moved_keys_are_those_of_the_new_positions(name: str) -> None:
    model = TreeModel(families.build(name), name, None)
    try:
        rotaries = find_rotaries(model)
        assert len(rotaries) == len(model.layer_shapes)
        tokens, old = torch.arange(3, 40), torch.arange(5, 42)
        new = torch.cat([torch.arange(200, 219), torch.arange(1, 19)])
        k, v = first_layer(model, tokens, old)
        moved_k, moved_v = first_layer(model, tokens, new)
        turned = rotaries[0].turn(k, rotaries[0].angles(old, new))
        torch.testing.assert_close(turned, moved_k, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v, moved_v)
        assert not torch.allclose(k, moved_k, atol=1e-2), "the positions do not matter"
    finally:
        model.release()


def test_layers_without_positions_are_copied() -> None:
    model = TreeModel(families.build("smollm3"), "smollm3", None)
    try:
        assert [rotary.inv_freq.numel() > 0 for rotary in find_rotaries(model)] == [True, False, True, False]
    finally:
        model.release()


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_models_with_learned_positions_are_refused(name: str) -> None:
    model = TreeModel(families.build(name), name, None)
    try:
        with pytest.raises(UnsupportedModel, match=f"{name}.*reuse='segments' cannot move its keys"):
            find_rotaries(model)
    finally:
        model.release()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [1, 2048, 2049])
def test_mover_against_one_token_at_a_time(interleaved: bool, first: int, dtype: torch.dtype, tokens: int) -> None:
    """Each key, turned pair by pair in float64; values and all other slots stay as they are."""
    generator = np.random.default_rng(tokens)
    rotaries = [Rotary(torch.tensor([1.0, 0.3, 0.01, 1e-4, 1e-5]), first, interleaved), Rotary(torch.empty(0))]
    device = torch.device("cpu")
    storage = KVStorage([LayerShape(2, 13, 7, dtype)] * 2, 2 * tokens + 5, device)
    slots = torch.arange(2 * tokens + 5)
    torch.manual_seed(0)
    for pool in (*storage.keys, *storage.values):
        rows = torch.randn(slots.numel(), *pool.shape[1:])
        write(pool, slots, rows.to(dtype) if dtype.itemsize > 1 else rows)
    before = [[read(pool, slots, torch.float64) for pool in pools] for pools in (storage.keys, storage.values)]
    mixed = generator.permutation(slots.numel())
    moves = KVMoves(mixed[:tokens], mixed[tokens : 2 * tokens], *generator.integers(0, 9_000, (2, tokens)))
    KeyMover(storage, rotaries, device).move(moves)
    for layer, rotary in enumerate(rotaries):
        keys, values = (read(pools[layer], slots, torch.float64) for pools in (storage.keys, storage.values))
        expected_keys, expected_values = before[0][layer].clone(), before[1][layer].clone()
        expected_values[moves.targets] = before[1][layer][moves.sources]
        for source, target, old, new in zip(*(array.tolist() for array in moves), strict=True):
            expected_keys[target] = turned(before[0][layer][source], rotary, new - old)
        assert torch.equal(values, expected_values)
        tolerance = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.int8: 4e-2}.get(dtype, 3e-1)
        torch.testing.assert_close(keys, expected_keys, rtol=0, atol=tolerance)


def turned(key: Tensor, rotary: Rotary, distance: int) -> Tensor:
    """One token's keys `[kv_heads, head_dim]` `distance` positions further, a pair of dimensions at a time."""
    result, pairs = key.clone(), rotary.inv_freq.numel()
    for pair, frequency in enumerate(rotary.inv_freq.double().tolist()):
        one = rotary.first + (2 * pair if rotary.interleaved else pair)
        two = one + 1 if rotary.interleaved else one + pairs
        angle = torch.tensor(frequency * distance, dtype=torch.float64)
        result[:, one] = key[:, one] * angle.cos() - key[:, two] * angle.sin()
        result[:, two] = key[:, two] * angle.cos() + key[:, one] * angle.sin()
    return result
