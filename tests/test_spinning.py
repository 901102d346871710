"""Idle OpenMP threads sleep if radixgen is imported before torch; otherwise an engine says what to set."""

import os
import subprocess
import sys

import families
import pytest
import torch

from radixgen import Engine

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def policy_after(imports: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", f"{imports}\nimport os; print(os.environ.get('OMP_WAIT_POLICY'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=others | environment).stdout.strip()


def test_threads_sleep_if_radixgen_comes_first() -> None:
    assert policy_after("from radixgen import TreeAttention") == "PASSIVE"
    assert policy_after("from radixgen import TreeAttention", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy_after("from radixgen import TreeAttention", KMP_BLOCKTIME="0") == "None"


def test_nothing_is_set_once_it_is_too_late() -> None:
    assert policy_after("import torch; from radixgen import TreeAttention") == "None"


@pytest.mark.parametrize(
    ("threads", "variable", "warns"), [(2, None, True), (1, None, False), (2, VARIABLES[1], False)]
)
def test_an_engine_warns(monkeypatch, caplog: pytest.LogCaptureFixture, threads, variable, warns) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with Engine(families.build("llama"), kv_tokens=64):
        assert ("its 2 threads spin" in caplog.text) == warns
