"""The CPU's vector loops are vectors, on the processor at hand and on those that it is not."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fused_preact

CPU = Path(__file__).resolve().parent.parent / "csrc" / "cpu"
BODY = 12  # lines after its directive in which a loop's report may lie


def refusals(source, flags):
    """Lines of a file in which g++ finds a branch that keeps a loop from being vectorised."""
    command = ["g++", *flags, "-c", str(source), "-o", "/dev/null", "-fopt-info-vec-missed"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = rf"{source.name}:(\d+):\d+: missed: +not vectorized: control flow in loop"
    return {int(line) for line in re.findall(pattern, report)}


def loops(source):
    lines = enumerate(source.read_text().splitlines(), 1)
    directives = [number for number, line in lines if "#pragma omp simd" in line]
    assert len(directives) > 1
    return {line for first in directives for line in range(first + 1, first + BODY)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose report this reads")
def test_no_branch_keeps_a_loop_from_being_vectorised():
    """For no instruction set; without -fno-trapping-math for those that have no masks."""
    flags = fused_preact.build_info()["flags"].split()
    slopes, epilogues, prologues = (CPU / f"{n}.cpp" for n in ("slopes", "epilogues", "prologues"))
    careful = [flag for flag in flags if flag != "-fno-trapping-math"]
    with ThreadPoolExecutor(2) as pool:
        files = [slopes, epilogues, prologues, prologues]
        *found, of_careful = pool.map(refusals, files, [flags, flags, flags, careful])
    for file, lines in zip(files, found, strict=False):
        assert lines & loops(file) == set(), file.name
    assert of_careful & loops(prologues) != set()
