"""Tests of the CUDA kernels. Their modules skip where the extension is not built, and tests without
the mark `no_gpu` where there is no GPU."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_gpu: runs on a machine without a GPU")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("no_gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
