"""What several test modules use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

#: What tests compile must not depend on what the machine has to do besides.
os.environ.setdefault("QCOMPILE_COSTS", "estimate")

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)  # tensors are small: a second thread only waits
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with real images and weights."""
    if not (DATA / "cifar10_exact" / "labels.npz").exists():
        pytest.skip("real images and weights are not at ../shared/data")
    return DATA
