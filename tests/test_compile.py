"""The kernels' machine code for chips that this machine need not have: no spills, and what they were made for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """In a process of its own, because this one may have Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.kernels", "--disassemble", "90"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict] = json.loads(done.stdout.splitlines()[-1])["configurations"]
    return found


@pytest.mark.slow
def test_nothing_is_spilled(compiled: list[dict]) -> None:
    assert {one["chip"] for one in compiled} == {80, 90}
    assert [one for one in compiled if one["spilled"]] == []


def test_shared_memory_fits(compiled: list[dict]) -> None:
    for one in compiled:
        assert one["shared"] <= {80: 163, 90: 227}[one["chip"]] * 1024, one


def test_hopper_s_own_instructions(compiled: list[dict]) -> None:
    """Wide tiles multiply by warpgroup, and heads of a power of two come by bulk copies."""
    blocks = {"sum_scores", "weigh_blocks", "choose_blocks", "attend_blocks"}
    others = {"attend", "merge", "write_kv", "expand_keys", "all_reduce_kernel"}
    assert {one["kernel"] for one in compiled} == blocks | others
    hopper = [one for one in compiled if one["chip"] == 90 and one["kernel"] == "attend"]
    for one in hopper:
        if one["tiles"] >= 64:
            assert one["HGMMA"], one
        if one["head_dim"] in (64, 128, 256):
            assert one["UTMALDG"], one
