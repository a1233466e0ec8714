"""nvcc's own view of every kernel: no warnings, no spills, tensor cores at work. Needs no GPU."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
KERNELS = [line for line in (CSRC / "sources_cuda.txt").read_text().split()]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ["80", "90a", "100"]
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-Werror=all-warnings", "-Xptxas=-v", "-cubin"]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def cuobjdump() -> str | None:
    """From the CUDA toolkit, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    try:
        import triton

        wheel = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except (ImportError, TypeError):
        return found
    return found or (str(wheel) if wheel.exists() else None)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """Per architecture and kernel file: the cubin, and what ptxas said."""
    folder = tmp_path_factory.mktemp("cubins")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    jobs = [(a, k) for k in KERNELS for a in ARCHITECTURES if f"sm_{a.rstrip('a')}" in known]

    def compile(job):
        architecture, kernel = job
        cubin = folder / f"{Path(kernel).stem}.{architecture}.cubin"
        command = [NVCC, *FLAGS, f"-arch=sm_{architecture}", str(CSRC / kernel), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return cubin, result.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return dict(zip(jobs, pool.map(compile, jobs), strict=True))


def test_sources_are_listed_once():
    assert sorted(KERNELS) == sorted(f"cuda/{path.name}" for path in (CSRC / "cuda").glob("*.cu"))


def test_no_kernel_spills(cubins):
    """ptxas -v: neither registers nor a stack frame in local memory."""
    for (architecture, kernel), (_, said) in cubins.items():
        for function, stack, stores, loads in re.findall(
            r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            said,
        ):
            assert (stack, stores, loads) == ("0", "0", "0"), (
                f"sm_{architecture} {kernel} {function}"
            )


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize("kernel", [k for k in KERNELS if "preact_conv" in k])
def test_convolutions_run_on_tensor_cores(cubins, kernel):
    """HMMA with operands by LDSM and sources by LDGSTS, in each 16-bit kernel; float32 on FFMA."""
    for (architecture, name), (cubin, _) in cubins.items():
        if name != kernel:
            continue
        code = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True).stdout
        functions = re.split(r"\n\s*Function : ", code)[1:]
        assert functions, f"sm_{architecture}"
        for function in functions:
            symbol = function.split()[0]
            if "f16" in symbol:  # bf16 as well
                for instruction in ("HMMA", "LDSM", "LDGSTS"):
                    assert instruction in function, f"sm_{architecture} {symbol}: no {instruction}"
            else:
                assert "HMMA" not in function, f"sm_{architecture} {symbol}"
