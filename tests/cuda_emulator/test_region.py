"""Which pixels the kernels' windows and results have in each tile, against plain arithmetic."""

import os
import re
import subprocess

from cuda_emulator.build import CSRC, FLAGS, HERE


def regions(folder, headers=CSRC / "cuda"):
    """What region.cpp says, and whether it found no difference."""
    program = folder / "regions"
    includes = [f"-I{HERE}", f"-I{headers}", f"-I{CSRC / 'cuda'}", f"-I{CSRC}"]
    sources = [str(HERE / name) for name in ("region.cpp", "emulator.cpp", "counters.cpp")]
    command = [*os.environ.get("CXX", "c++").split(), *FLAGS, *includes, *sources]
    subprocess.run([*command, "-ldl", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    return result.stdout, result.returncode == 0


def test_pixels_are_where_plain_arithmetic_says(tmp_path):
    """Strides, padding, several images a patch, gathered pixels, phases of dgrad: one place."""
    said, same = regions(tmp_path)
    assert same, said
    found = re.search(r"(\d+) compared, (\d+) inside", said)
    compared, inside = int(found[1]), int(found[2])
    assert 100_000 < inside < compared


def test_region_that_rounds_down_is_found(tmp_path):
    text = (CSRC / "cuda" / "conv.cuh").read_text()
    before = "(static_cast<int>(left) + gather - 1) / gather"
    assert text.count(before) == 1
    (tmp_path / "conv.cuh").write_text(
        text.replace(before, "static_cast<int>(left) / gather").replace('"../', '"')
    )
    for header in (CSRC / "cuda").glob("*.cuh"):
        if header.name != "conv.cuh":
            (tmp_path / header.name).write_text(header.read_text().replace('"../', '"'))
    said, same = regions(tmp_path, tmp_path)
    assert not same and "not" in said
