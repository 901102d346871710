"""Shared by all tests."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

PACKAGE = Path(__file__).parent.parent / "radixgen"
if not all((PACKAGE / name).is_dir() for name in ("kernels", "scheduler")):
    pytest.exit("this copy has lost the links radixgen/kernels and radixgen/scheduler: run `make links`", returncode=4)

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run on the CPU, in NumPy.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # Engines compile by default on a GPU, which takes a minute for each kind of model; tests of that turn it on again.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

# Two threads that spin on two shared cores are slower than one: for what tests start, and below for this process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test first, so that no worker begins one when the other has nothing left to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def heeded_interrupts() -> None:
    """A shell's background jobs, and what they start, ignore Ctrl-C; tests raise it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_collections_at_start() -> Iterator[None]:
    """Each `EngineThread` begins with a collection of all of torch and transformers: half a second a test."""
    with pytest.MonkeyPatch.context() as patch:
        quick = SimpleNamespace(collect=lambda: 0, freeze=gc.freeze, unfreeze=gc.unfreeze)
        patch.setattr("radixgen.engine.thread.gc", quick)
        yield
