"""The CUDA kernels in the emulator under AddressSanitizer and UBSan."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulator.build import broken, build
from cuda_emulator.cases import SANITIZED

pytestmark = pytest.mark.skipif(
    SANITIZED or not sys.platform.startswith("linux"), reason="runs itself"
)


def sanitized_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python under AddressSanitizer, which must be there before anything else."""
    asan = subprocess.run(
        [*os.environ.get("CXX", "c++").split(), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    stdcpp = asan.replace("libasan", "libstdc++")
    preload = f"{asan} {stdcpp}" if Path(stdcpp).exists() else asan
    options = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **options, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    return build(folder, "fused_preact_emulator", sanitize=True, optimise="-Og")


def test_sanitizers_find_nothing(sanitized):
    """The tests of operators, and of warpgroups."""
    operators, warpgroups = (
        str(Path(__file__).with_name(f"test_{name}.py")) for name in ("emulator", "warpgroups")
    )

    def run(part: tuple[str, str]) -> subprocess.CompletedProcess:
        arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", part[0], "-k", part[1]]
        return sanitized_python(*arguments, PREACT_EMULATOR=str(sanitized))

    parts = [
        (operators, "reference or stages"),
        (operators, "not (reference or stages)"),
        (warpgroups, "reference and bfloat16 and whole"),
    ]
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, parts):
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
            assert re.search(r"\d{2,} passed", result.stdout), result.stdout


def test_out_of_bounds_write_is_found(sanitized, tmp_path):
    """bn_stats that writes one variance too far."""
    before = "store(stats + p.channels.count + c, total"
    cuda = broken(tmp_path, "bn_stats.cu", before, before.replace(" + c", " + c + 1"))
    library = build(
        tmp_path / "build",
        "preact_overrun",
        cuda=cuda,
        sanitize=True,
        reuse=sanitized.parent,
        optimise="-O0",
    )
    script = (
        "import torch, sys; torch.ops.load_library(sys.argv[1]);"
        "torch.ops.preact_overrun.bn_stats(torch.zeros(1, 16, 4, 4))"
    )
    result = sanitized_python("-c", script, str(library))
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr and "WRITE of size 4" in result.stderr
