"""Tests that need a GPU, marked gpu: `pytest -m gpu`. Without one they are skipped.

A file is named after the backend that it runs on.
"""

from pathlib import Path

import pytest
import torch

from fused_preact import ops

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, and what its backend needs")


def pytest_collection_modifyitems(items):
    status = ops.backend_status()
    for item in items:
        if HERE in item.path.parents:
            backend = item.path.stem.removeprefix("test_")
            reason = status[backend] if torch.cuda.is_available() else "this torch sees no GPU"
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"{backend}: {reason}"))
