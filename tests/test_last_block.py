"""The last block leaves out rows that give no logits, and nobody notices."""

import families
import numpy as np
import pytest
import torch
from test_exactness import greedy

from radixgen import Engine
from radixgen.core import Plan
from radixgen.kernels import torch_backend
from radixgen.model import last_block
from radixgen.model.last_block import LastBlock
from radixgen.model.tree_model import TreeModel
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, plan

COST = CostModel(tiles=(TileCost(4, 2.0, 1.0), TileCost(16, 6.0, 2.0)), partial=0.1, mix=True, group=2)


def random_plan(rng: np.random.Generator, mode: PlanMode) -> tuple[Plan, int]:
    """A plan of up to 13 rows, and how many slots it reads."""
    count = int(rng.integers(1, 8))
    parents = np.array([int(rng.integers(-1, max(node, 1))) if node else -1 for node in range(count)], np.int32)
    lengths = rng.integers(1, 9, count).astype(np.int32)
    starts, ends = np.zeros(count, np.int32), np.cumsum(lengths)
    for node in range(count):
        if parents[node] >= 0:
            starts[node] = starts[parents[node]] + lengths[parents[node]]
    forest = Forest(parents, starts, lengths, np.arange(count + 1), (ends - lengths).astype(np.int64), lengths)
    nodes = rng.integers(0, count, int(rng.integers(1, 14))).astype(np.int32)
    positions = (starts[nodes] + rng.integers(0, lengths[nodes])).astype(np.int32)
    return plan(forest, nodes, positions, mode=mode, cost=COST), int(ends[-1])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("mode", PLAN_MODES)
def test_a_plan_of_some_rows_answers_them_as_the_whole_does(mode: PlanMode, window: int | None) -> None:
    rng, cpu = np.random.default_rng(0), torch.device("cpu")
    for _ in range(40):
        whole, slots = random_plan(rng, mode)
        q, k, v = torch.randn(whole.num_rows, 4, 8), torch.randn(slots, 2, 8), torch.randn(slots, 2, 8)
        rows = np.unique(rng.integers(0, whole.num_rows, int(rng.integers(1, whole.num_rows + 1))))
        out, lse = torch_backend.TorchAttention(whole, window, cpu)(q, k, v, 0.3)
        some, some_lse = torch_backend.TorchAttention(whole.select(rows), window, cpu)(q[rows], k, v, 0.3)
        torch.testing.assert_close(some, out[rows])
        torch.testing.assert_close(some_lse, lse[rows])


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek-v3", "gpt-oss", "cohere"])
def test_only_rows_that_give_logits_are_computed(name: str) -> None:
    seen: list[int] = []
    with Engine(families.build(name), kv_tokens=64, max_step_tokens=8) as engine:
        model = engine._model.model
        block = model._last_block.block
        hook = block.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
        engine.generate([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 12, 13]], greedy(1))
        hook.remove()
        assert seen == [1, 1]
        assert block.self_attn is model._last_block.self_attn
    assert not any(isinstance(module, LastBlock) for module in model.model.modules())


def test_a_block_that_cannot_do_with_some_rows_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output would be another one, as seen when it is loaded."""
    pick = last_block._select_rows
    monkeypatch.setattr(last_block, "_select_rows", lambda value, rows, count: pick(value, rows.flip(0), count))
    model = TreeModel(families.build("llama"), "llama", None)
    assert not model.picks_rows
    assert not any(isinstance(module, LastBlock) for module in model.model.modules())
