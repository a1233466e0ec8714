"""The parity suite again, in Triton's interpreter: kernels run on the CPU, one program at a time.

Reruns (test_determinism) are left out: nothing runs at the same time as anything else there. In
processes of its own, since the interpreter must be chosen before triton is imported.
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
PARTS = {  # name: files, and what of them; "triton" is in the name of all that runs on a backend
    # its opcheck is of the C++ operators, interpreted/ has its own; planning depends on no kernel
    "operators": (["ops"], "not test_opcheck and not test_backend"),
    # float64 is no dtype of these kernels. What a single gradient runs is decided above them: one
    # kind of unit, of two shapes, stands for the eleven
    "functions": (
        ["test_bn_relu.py", "test_preact_conv2d.py", "test_preact_unit.py", "test_autocast.py"],
        "triton and not gradcheck and (not test_single_gradients or bottleneck)",
    ),
    # interpreted/ trains ResNet-20 instead of deeper ones; "functions" compiles units
    "models": (
        ["test_blocks.py", "test_resnet.py"],
        "triton and not 1001 and not deep_model and not compiles",
    ),
    "kernels": (["triton_kernels/interpreted"], ""),
}


@pytest.fixture(scope="module")
def started():
    """All parts at once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    processes = {}
    for part, (paths, selected) in PARTS.items():
        files = [TESTS / path for path in paths]
        command = [sys.executable, "-m", "pytest", *files, "-q", "-rs", "-k", selected]
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
    """Passes where the backend is triton."""
    output, _ = started[part].communicate()
    print(output[-4000:])
    assert started[part].returncode == 0, output[-4000:]
