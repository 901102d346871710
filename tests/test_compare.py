"""The comparison of whole engines: what its workloads ask, the limits that they are held against, and its table."""

import json
import random

import numpy as np
import pytest
import torch

from bench import parallel, profile
from bench.compare import run, table
from bench.device import Ceilings
from bench.limits import StepLimit, WorkloadLimit, distinct
from bench.profile import Kernel, busy_ns, gaps, kind_of
from bench.shapes import SHAPES, Shape
from bench.workloads import TOY, Answers, Ask, Workloads, describe

CEILINGS = Ceilings(read=1e9, copy=1e9, matrix=1e12)


class Echo:
    """Answers every sample with its place, and keeps what it was asked."""

    def __init__(self) -> None:
        self.about = {"engine": "echo", "step_tokens": 64}
        self.asked: list[Ask] = []

    def answer(self, ask: Ask) -> Answers:
        self.asked.append(ask)
        return [[[index % 90] * ask.new for index in range(ask.n)] for _ in ask.prompts]

    def reset(self) -> None:
        self.asked.clear()


@pytest.mark.parametrize("name", list(describe(TOY)))
def test_a_workload_is_the_same_for_every_engine(name: str) -> None:
    engines, step_limit = [Echo(), Echo()], StepLimit(SHAPES["toy"], CEILINGS)
    told = [run(engine, name, Workloads(TOY, 97), step_limit) for engine in engines]
    assert engines[0].asked == engines[1].asked
    assert all(0 <= token < 97 for ask in engines[0].asked for prompt in ask.prompts for token in prompt)
    made = sum(len(ask.prompts) * ask.n * ask.new for ask in engines[0].asked if ask.timed)
    assert told[0]["tokens"] == made
    assert 0 < told[0]["limit_seconds"] == told[1]["limit_seconds"]
    first = run(engines[0], name, Workloads(TOY, 97, seed=1), step_limit, first=True)
    assert first["tokens"] == sum(len(ask.prompts) * ask.n for ask in engines[0].asked if ask.timed)


def test_distinct_tokens_are_those_of_a_tree() -> None:
    chosen = random.Random(3)
    for _ in range(50):
        paths = [[chosen.randrange(2) for _ in range(chosen.randrange(9))] for _ in range(chosen.randrange(9))]
        nodes = {tuple(path[:length]) for path in paths for length in range(1, len(path) + 1)}
        assert distinct([np.array(path, np.int32) for path in paths]) == len(nodes)


def test_the_limit_by_hand() -> None:
    shape = Shape(layers=1, hidden=2, inner=3, q_heads=2, kv_heads=1, vocab=5, head_dim=4)
    layer, head, key = 2 * (4 * 2 + 4 * 2 + 4 * 2) + 3 * 2 * 3, 2 * 5, 2 * 4 * 2
    step, prompts = StepLimit(shape, Ceilings(read=1.0, copy=1.0, matrix=1e30)), [[1, 2, 3], [1, 2, 4]]
    first = WorkloadLimit(step, step_tokens=100).seconds(Ask(prompts, 1, n=3), [[[7]] * 3] * 2)
    limit = WorkloadLimit(step, step_tokens=100)
    whole = limit.seconds(Ask(prompts, 2, n=3), [[[7, 7]] * 3] * 2)
    assert first == 2 * (layer + head) + 4 * key
    assert whole - first == pytest.approx(2 * (layer + head) + (4 + 6) * key)
    assert limit.seconds(Ask([[1, 2, 3, 7, 7]], 1), [[[9]]]) == 2 * (layer + head) + 5 * key


def test_the_table_has_a_line_a_workload_and_says_what_is_missing() -> None:
    ours = {"latency": {"seconds": 2.0, "first_seconds": 0.5, "limit_seconds": 1.0, "ms_per_token": 5.0}}
    theirs = {"latency": {"seconds": 3.0, "first_seconds": 0.5}}
    lines = table({"radixgen": ours, "vllm": theirs}, ["latency", "prefill"], describe(TOY))
    assert "(2.00×)" in lines[2] and "1.50×" in lines[2] and "5.00 ms" in lines[2]
    assert lines[3].count("–") == 4


def test_what_runs_at_the_same_time_is_busy_once_and_gaps_are_found() -> None:
    kernels = [
        Kernel("attend", 0, 5_000_000),
        Kernel("merge", 2_000_000, 4_000_000),
        Kernel("nvjet_a", 9_000_000, 9_500_000),
    ]
    assert busy_ns(kernels) == 5_500_000
    assert gaps(kernels, 3) == [(4.0, "attend", "nvjet_a")]
    assert [kind_of(kernel.name) for kernel in kernels] == [
        "attention, narrower tiles", "merge of partial results", "product",
    ]  # fmt: skip
    assert kind_of("attend_wide") == "attention, 128-row tiles" and kind_of("x" * 50) == "x" * 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one takes minutes on a GPU")
def test_profile(capsys) -> None:
    assert profile.main(["--workloads", "latency"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["latency"]["steps"] > 3


def test_summaries_of_several_gpus() -> None:
    """The limit names what was measured alone, and one GPU is what the others are compared with."""
    one = {"seconds": 2.0, "ms_a_step": 4.0, "rows": 1, "limit_ms": 3.5}
    found = {
        "reduce": {"us": {"1 x 8": 10.0}},
        "exact": {"equal": 2, "different": ["beams: [1] became [2]"]},
        "many": {"layers": 4, "hidden": 8, "workloads": {"latency": one | {"seconds": 1.0, "limit_ms": 1.75}}},
    }
    assert parallel.summary("reduce", found, 2) == ["all-reduce of 1 x 8: 10.0 µs"]
    assert parallel.summary("exact", found, 2)[0] == "exact: 2 of 3 answers equal"
    (line,) = parallel.summary("many", found, 2)
    assert line.endswith("limit 1.830 = 1.750 read + 0.080 of 8 all-reduces")
    found["one"] = {"layers": 4, "hidden": 8, "workloads": {"latency": one}}
    assert parallel.summary("one", found, 2)[-1] == "2 ranks over one, latency: 2.00×"
    found["one"] = {"failed": "exit status 1"}
    assert parallel.summary("one", found, 2) == ["one: exit status 1"]


def test_one_process_is_timed_at_toy_size() -> None:
    *_, found = parallel._time_engine("one", 1)
    assert set(found["workloads"]) == {"latency", "prefix", "prefill"}
    assert all(one["seconds"] > 0 for one in found["workloads"].values())
