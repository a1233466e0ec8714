"""The CUDA kernels of csrc/cuda, run by the emulator as torch.ops.fused_preact_emulator."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import build

NAMESPACE = "fused_preact_emulator"


class Emulator:
    """The operators of a library, and the emulator's controls."""

    def __init__(self, library: Path, namespace: str = NAMESPACE):
        torch.ops.load_library(library)
        self.library = library
        self.operators = getattr(torch.ops, namespace)
        self._controls = ctypes.CDLL(str(library))

    def seed(self, value: int) -> None:
        """Draw the order of threads and blocks anew."""
        self._controls.emulator_seed(ctypes.c_uint64(value))

    def traffic(self) -> tuple[int, int, int]:
        """Bytes of 16-bit tensors read and written, bank conflicts; since the last call."""
        out = (ctypes.c_int64 * 3)()
        self._controls.emulator_traffic(out)
        return tuple(out)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    given = os.environ.get("PREACT_EMULATOR")
    library = Path(given) if given else build(tmp_path_factory.mktemp("emulator"), NAMESPACE)
    return Emulator(library)
