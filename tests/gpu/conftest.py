"""Tests that need a GPU, marked gpu: `pytest -m gpu`. Without one they are skipped."""

from pathlib import Path

import pytest

from fused_preact import ops

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and the CUDA kernels")


def pytest_collection_modifyitems(items):
    reason = ops.backend_status()["cuda"]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"cuda: {reason}"))
