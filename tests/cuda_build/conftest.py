"""Every instance of the CUDA kernels, compiled once for all tests here."""

import pytest
from machine_code import KERNELS, compile_cubins, known_architectures, read_kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """By architecture and file: every instance of its kernels. A warning of nvcc is an error."""
    cubins = compile_cubins(tmp_path_factory.mktemp("cubins"), KERNELS, known_architectures())
    return {
        (architecture, file): list(read_kernels(file, cubin, said).values())
        for (architecture, file), (cubin, said) in cubins.items()
    }
