"""Shared by all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two threads that spin on two shared cores are slower than one."""
    torch.set_num_threads(1)
