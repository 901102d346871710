"""The benchmarks of tree and planner run to their end at toy size. Nothing here looks at a clock."""

import json

import numpy as np
import pytest
import torch

from bench import attention, calibrate, plan, simulate, step, tree
from bench.report import Memory, Report
from bench.trees import WORKLOADS


@pytest.fixture(autouse=True)
def any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (plan, tree):
        monkeypatch.setattr(module, "measure_memory", lambda: Memory(compare=1e9, copy=1e9))


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


TOY = ["--runs", "2", "--pool", "30000", "--nodes", "60", "200", "--operations", "20"]


def test_tree_on_a_trace_made_up(capsys) -> None:
    assert tree.main(["--requests", "12", *TOY]) == 0
    figures = last_line(capsys)
    assert figures["benchmark"] == "tree" and not figures["conversation_trace"]
    for pool in ("unlimited", "limited"):
        assert len(figures[f"{pool}_seconds"]) == 2
        assert figures[f"{pool}_tokens_per_second"] > 0 and figures[f"{pool}_ratio_to_limit"] > 0
    assert 0 < figures["limited_hit_percent"] <= figures["unlimited_hit_percent"]
    assert figures["extend_ratio"] > 0 and figures["evict_ratio"] > 0


def test_tree_on_a_file(capsys, tmp_path) -> None:
    records = [
        {"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [0, 1]},
        {"timestamp": 1, "input_length": 1300, "output_length": 1, "hash_ids": [0, 1, 2]},
        {"timestamp": 2, "input_length": 700, "output_length": 1, "hash_ids": [0, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert tree.main([str(path), *TOY]) == 0
    figures = last_line(capsys)
    assert figures["prompt_tokens"] == 3000
    assert figures["unlimited_hit_percent"] == pytest.approx(100 * (1000 + 512) / 3000, abs=0.1)


def test_equal_ids_give_equal_tokens() -> None:
    long, short = tree.expand([7, 3, 9], 1536), tree.expand([5, 3], 600)
    assert long.dtype == np.int32 and long.size == 1536 and short.size == 600
    assert np.array_equal(long[512:600], short[512:600])
    assert not np.array_equal(long[:512], short[:512])
    assert long.min() >= 0 and np.unique(long).size > 1500


def test_plan(capsys) -> None:
    assert plan.main(["--leaves", "9", "--times", "3"]) == 0
    figures = last_line(capsys)
    assert figures["benchmark"] == "plan" and figures["leaves"] == 9
    for shape in plan.SHAPES:
        assert figures[f"{shape}_from_nothing_ms"] > 0 and figures[f"{shape}_carried_ms"] > 0
        assert figures[f"{shape}_nodes"] == 2 * 9 - 1
        assert set(figures[f"{shape}_pieces_ms"]) == {*(p.strip("_") for p in plan.PIECES), "rest"}


def test_a_missed_bound_fails_a_check(capsys) -> None:
    report = Report("x")
    report.figure("slow", 2.0, "slow", at_most=1.0)
    report.figure("fine", 2.0, "fine", at_least=1.0)
    assert report.finish(check=False) == 0 and report.finish(check=True) == 1
    assert last_line(capsys)["missed"] == ["slow"]


def test_simulate_on_a_trace_made_up(capsys) -> None:
    assert simulate.main(["--requests", "12", "--pools", "4e4", "1e6"]) == 0
    figures = last_line(capsys)
    assert [run["order"] for run in figures["runs"]] == ["arrival", "longest prefix"] * 2
    for run in figures["runs"]:
        assert 0 <= run["hit_rate"] <= figures["ideal_hit_rate"] + 1e-9
        assert run["computed"] + run["hit_rate"] <= 1 + run["preemptions"]
        assert run["latency_p50_seconds"] >= 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one takes minutes on a GPU")
def test_attention(capsys) -> None:
    assert attention.main([]) == 0
    (row,) = last_line(capsys)["rows"]
    assert set(row["contenders"]) == {"radixgen", "unshared", "prefix", "naive"}
    assert all(found["difference"] < 1e-6 for found in row["contenders"].values())
    assert calibrate.main([]) == 0


def test_every_workload_has_its_trees() -> None:
    for name, rows in WORKLOADS.items():
        built = [tree for _, tree in rows()]
        assert len(built) == {"W1": 12, "W5": 15, "W7": 12, "W8": 9, "W9": 18, "W12": 13}[name]
        for parents, lengths, standing in built:
            assert len(parents) == len(lengths) and max(standing) < len(parents)
            assert all(parent < node for node, parent in enumerate(parents))


def test_step(capsys, monkeypatch) -> None:
    monkeypatch.setattr(step, "SEQUENCES", 4)
    monkeypatch.setattr(step, "STEPS", 3)
    assert step.main([]) == 0
    figures = last_line(capsys)
    for case in ("greedy", "temperature", "top_p", "detokenized"):
        assert figures[f"{case}_ms"] > 0 and len(figures[f"{case}_pieces_ms"]) == 7
