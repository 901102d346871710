"""What is run before the first request: every kind of step, and nothing of it stays."""

import asyncio

import families
import numpy as np
import pytest
import torch
from torch import Tensor

from radixgen import AsyncEngine, Engine, Limits, SamplingParams
from radixgen.model import graphs
from radixgen.model.graphs import bucket, buckets
from radixgen.model.runner import ModelRunner
from radixgen.model.warm_up import warm_up_steps
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.serve.http.health import Health

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = {"kv_tokens": 40, "max_model_len": 32, "max_step_tokens": 6, "debug": True}
SEQUENCES = 2
PROMPTS = [[1, 2, 3, index] for index in range(SEQUENCES)]
PARAMS = [SamplingParams(max_tokens=5 + index) for index in range(SEQUENCES)]


def engine(attention: str = "torch", *, warm_up: bool = False) -> Engine:
    limits = Limits(max_num_seqs=SEQUENCES)
    model = families.build("llama").to(DEVICE)
    return Engine(model, attention=attention, limits=limits, warm_up=warm_up, **OPTIONS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the graphs that are made."""
    rows, init = [], graphs._Graph.__init__

    def noted(self: object, *arguments: object) -> None:
        rows.append(arguments[3].rows)
        init(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs._Graph, "__init__", noted)
    return rows


def test_no_later_step_makes_a_graph(made: list[int]) -> None:
    pytest.importorskip("triton")
    with engine("triton") as cold:
        expected = [output.outputs[0].token_ids for output in cold.generate(PROMPTS, PARAMS)]
        before = cold.stats()
    assert made
    made.clear()
    with engine("triton", warm_up=True) as warm:
        assert set(made) == {bucket(size) for size in buckets(OPTIONS["max_step_tokens"])}
        assert warm.stats().steps == 0
        made.clear()
        assert [output.outputs[0].token_ids for output in warm.generate(PROMPTS, PARAMS)] == expected
        warm.score([1, 2], [[3, 4, 5, 6], [7]])
        assert not made
        warm.check()
        assert before.steps < warm.stats().steps


def test_nothing_stays() -> None:
    with engine() as cold, engine(warm_up=True) as warm:
        assert warm.stats() == cold.stats()
        assert warm._core.tree.num_nodes == 0 and warm._core.tree.pool.free == OPTIONS["kv_tokens"]
        warm.check()
        told: list[tuple[int, int]] = []
        for _ in range(2):
            drawn = [[output.outputs[0].token_ids for output in one.generate(PROMPTS, PARAMS)] for one in (cold, warm)]
            assert drawn[0] == drawn[1]
            told.clear()
            warm.warm_up(lambda done, total: told.append((done, total)))
            assert told == [(done, len(told)) for done in range(1, len(told) + 1)] and told
        assert warm.stats() == cold.stats()
        warm.check()


def test_a_kind_that_fails_is_left_to_whoever_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with engine() as cold:
        expected = [output.outputs[0].token_ids for output in cold.generate(PROMPTS, PARAMS)]
    run = ModelRunner._run_eagerly

    def fails(self: ModelRunner, plan: object, token_ids: np.ndarray, *arguments: object) -> Tensor:
        if token_ids.size == OPTIONS["max_step_tokens"]:
            raise torch.OutOfMemoryError("too large")
        return run(self, plan, token_ids, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "_run_eagerly", fails)
        warm = engine(warm_up=True)
    with warm:
        assert caplog.text.count("could not be warmed up: too large") == 1
        assert [output.outputs[0].token_ids for output in warm.generate(PROMPTS, PARAMS)] == expected
        warm.check()


def test_a_graph_that_fails_has_one_warning(
    made: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton_backend = pytest.importorskip("radixgen.kernels.triton_backend")
    attend = triton_backend.TritonStaticAttention.__call__

    def refuse(self: object, q: Tensor, *arguments: object) -> object:
        if q.shape[0] == 2:
            raise torch.OutOfMemoryError("no memory")
        return attend(self, q, *arguments)

    monkeypatch.setattr(triton_backend.TritonStaticAttention, "__call__", refuse)
    with engine("triton", warm_up=True) as warm:
        failed = warm.stats().failed_captures
        assert 1 <= failed <= len(warm._model.costs)  # type: ignore[attr-defined]
        warnings = [
            record for record in caplog.records if record.name.startswith(("radixgen.model.runner", "radixgen.warm"))
        ]
        assert len(warnings) == failed and "steps like one of 2 rows run without CUDA graphs" in caplog.text
        made.clear()
        assert len(warm.generate([[1, 2]], SamplingParams(max_tokens=4))[0].outputs[0].token_ids) == 4
        assert not made


def test_a_model_of_another_kind_has_nothing_to_warm_up() -> None:
    from oracle import StampModel

    with Engine(StampModel(50, 64), kv_tokens=64, warm_up=True) as served:
        assert served.warm_up_steps() == []


def test_the_profile_run_leaves_no_pool() -> None:
    with engine() as served:
        model = served._model
        assert isinstance(model, ModelRunner)
        model.profile_run(6)
        assert model.storage.keys[0].shape[0] == 0 and model.kv_bytes_read == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 2_000])
def test_steps_stay_inside_of_pool_and_context(size: int) -> None:
    costs = [CostModel(), CostModel(tiles=(TileCost(16, 1.0, 1.0), TileCost(64, 2.0, 3.0)), group=4, mix=True)]
    steps = list(warm_up_steps(costs, max_rows=300, graph_rows=280, max_logits=200, max_depth=size))
    assert [one.rows for one in steps if one.cost is costs[0] and one.num_logits == one.rows] == [
        1, 256, 128, 64, 32, 16, 8, 4, 2
    ]  # fmt: skip
    for step in steps:
        plan = step.plan(size, size)
        assert plan.num_rows == step.rows and plan.tile_rows <= step.cost.tiles[-1].rows
        assert (plan.segment_starts + plan.segment_lengths + plan.segment_room).max() <= size
        assert plan.row_positions.min() >= 0 and plan.row_positions.max() < size
        if step.num_logits == step.rows:
            assert plan.growing.size == plan.num_rows  # it can be begun ahead of its tokens
        if step.depth > 1:
            assert plan.row_extra.max() + 1 == step.depth


def test_buckets() -> None:
    assert buckets(0) == [] and buckets(1) == [1] and buckets(5) == [1, 2, 4, 5]
    assert buckets(400) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 400]
    assert {bucket(rows) for rows in range(1, 401)} == {bucket(size) for size in buckets(400)}


def test_requests_are_served_between_its_steps() -> None:
    with engine() as cold:
        expected = [output.outputs[0].token_ids for output in cold.generate(PROMPTS, PARAMS)]

    async def test() -> None:
        async with AsyncEngine(engine()) as served:
            told: list[int] = []
            warming = asyncio.create_task(served.warm_up(lambda done, _: told.append(done)))
            found = [
                [token async for delta in served.generate(prompt, one) for token in delta.outputs[0].token_ids]
                for prompt, one in zip(PROMPTS, PARAMS, strict=True)
            ]
            await warming
            assert found == expected and told
            await served.check()

    asyncio.run(test())


def test_ready_waits_for_all_kinds_and_tells_how_many_are_left() -> None:
    async def test() -> None:
        async with AsyncEngine(engine()) as served:
            health = Health(served, 60.0, lambda _: False, warm_up=True)
            told = []
            watching = asyncio.create_task(health.watch())
            while not health.warm:
                assert health.fault() is None
                if (state := health.unready()) not in told:
                    told.append(state)
                await asyncio.sleep(0)
            watching.cancel()
            assert told[0] == "the model is warming up" and any(": 1 of " in str(state) for state in told)
            assert health.unready() is None
            assert (await served.stats()).num_nodes == 0

    asyncio.run(test())
