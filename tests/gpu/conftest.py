"""Tests of the CUDA kernels. Without a GPU or without the built extension they skip with the
reason; those marked `no_gpu` need the extension alone."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_gpu: runs on a machine without a GPU")


def _missing(needs_gpu: bool) -> str | None:
    try:
        from star_attention.ops import cuda  # noqa: F401
    except ImportError as error:
        return f"the CUDA extension is not built: {error}"
    if needs_gpu and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing(needs_gpu=item.get_closest_marker("no_gpu") is None)
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
