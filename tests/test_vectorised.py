"""The CPU's vector loops are vectors, on the processor at hand and on those that it is not."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fused_preact

ROWS = Path(__file__).resolve().parent.parent / "csrc" / "cpu" / "rows.cpp"
BODY = 12  # lines after its directive in which a loop's report may lie


def refusals(flags):
    """Lines of rows.cpp in which g++ finds a branch that keeps a loop from being vectorised."""
    command = ["g++", *flags, "-c", str(ROWS), "-o", "/dev/null", "-fopt-info-vec-missed"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = r"rows\.cpp:(\d+):\d+: missed: +not vectorized: control flow in loop"
    return {int(line) for line in re.findall(pattern, report)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose report this reads")
def test_no_branch_keeps_a_loop_from_being_vectorised():
    """For no instruction set; without -fno-trapping-math for those that have no masks."""
    flags = fused_preact.build_info()["flags"].split()
    lines = enumerate(ROWS.read_text().splitlines(), 1)
    directives = [number for number, line in lines if "#pragma omp simd" in line]
    loops = {line for first in directives for line in range(first + 1, first + BODY)}
    assert len(directives) > 5
    assert refusals(flags) & loops == set()
    flags.remove("-fno-trapping-math")
    assert refusals(flags) & loops != set()
