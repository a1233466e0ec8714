"""The suite again, in Triton's interpreter: kernels run on the CPU, a program after the other.

In processes of its own, since the interpreter must be chosen before triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (a CPU build of torch)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("these are in it already", allow_module_level=True)

TESTS = Path(__file__).parents[1]
TOO_SLOW = "not 56 and not many and not 200 and not 5x5 and not 7x7 and not 33"
PARTS = {
    "operators": ("ops", f"{TOO_SLOW} and not test_opcheck and not test_backend"),
    "preact_conv2d": (
        "test_preact_conv2d.py",
        f"{TOO_SLOW} and (test_grid or far_from_zero or constant or overwritten or float16)",
    ),
    "kernels": ("triton_kernels/interpreted", ""),
}


@pytest.fixture(scope="module")
def started():
    """All parts at once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    processes = {}
    for part, (path, selected) in PARTS.items():
        command = [sys.executable, "-m", "pytest", TESTS / path, "-q", "-rs", "-k", selected]
        processes[part] = subprocess.Popen(
            [*command, "-p", "no:cacheprovider"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("part", PARTS)
def test_suite(part, started):
    """Passes where the backend is triton; what takes the interpreter long is left out."""
    output, _ = started[part].communicate()
    print(output[-4000:])
    assert started[part].returncode == 0, output[-4000:]
