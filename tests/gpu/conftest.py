"""`make test-gpu`: everything here runs on a GPU. GPU_TESTS=cpu tries the tests themselves without one."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = torch.device(os.environ.get("GPU_TESTS", "cuda"), 0)
torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are to be as exact as products
REASON = "needs a GPU that this torch can use"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def on_gpu(device: torch.device) -> None:
    """Skips a test of what only a GPU has."""
    if device.type != "cuda":
        pytest.skip(REASON)
