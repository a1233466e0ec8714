"""benchmarks/gpu_check.sh where there is no GPU: it says what it could not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu_check.sh"


def run(folder, *tools):
    """With Python and the tools named, fakes that succeed, in place of what the machine has."""
    path = folder / "bin"
    path.mkdir()
    scripts = dict.fromkeys(tools, "exit 0") | {"python": f'exec {sys.executable} "$@"'}
    for name, command in scripts.items():
        (path / name).write_text(f"#!/bin/sh\n{command}\n")
        (path / name).chmod(0o755)
    for name in ("bash", "mkdir", "dirname", "tee", "sed", "grep", "timeout"):
        found = next(p for p in ("/bin", "/usr/bin") if (Path(p) / name).exists())
        (path / name).symlink_to(Path(found) / name)
    result = subprocess.run(
        [str(path / "bash"), str(SCRIPT), str(folder / "out")],
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
    )
    return result, (folder / "out" / "not_done.txt").read_text().splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, which it would use for minutes")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a shell script for Linux")
def test_nothing_is_left_out_silently(tmp_path):
    result, not_done = run(tmp_path, "ncu")
    assert result.returncode == 1, result.stdout + result.stderr
    text = "\n".join(not_done)
    assert "machine: FAILED" in text  # nvidia-smi
    assert {"no nvcc", "no compute-sanitizer", "no nsys"} <= set(not_done)
    assert "no ncu" not in not_done and "no Python module torch" not in not_done
    assert "no GPU that torch sees: no build, no tests, no measurements" in not_done
    assert all(line in result.stdout for line in not_done)
