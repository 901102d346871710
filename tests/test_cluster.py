"""The scripts of examples/cluster with SmolLM2: routing, a killed worker, a drain. How soon is left to the scripts."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent.parent / "examples/cluster"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dynamo", "smg"])
def test_cluster(script: str) -> None:
    if find_spec(script) is None:
        pytest.skip(f"needs pip install 'radixgen[{script}]', which is made for Linux on x86-64")
    command = [sys.executable, str(CLUSTER / f"{script}.py"), "--talks", "3", "--turns", "2", "--within", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
