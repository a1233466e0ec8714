"""The CUDA kernels of csrc/cuda, run by the emulator as torch.ops.fused_preact_emulator."""

import os
from pathlib import Path

import pytest
from cuda_emulator.build import build
from cuda_emulator.emulator import Emulator

NAMESPACE = "fused_preact_emulator"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    given = os.environ.get("PREACT_EMULATOR")
    library = Path(given) if given else build(tmp_path_factory.mktemp("emulator"), NAMESPACE)
    return Emulator(library, NAMESPACE)
