"""What Triton makes of the kernels, in the default configurations, for GPUs that are not there."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (a CPU build of torch)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compiled import (
    MATRIX_INSTRUCTIONS,
    SHARED_MEMORY,
    Machine,
    compiling,
    convolution,
    pointwise,
)

ONE, TWO, X3 = (1, 1), (2, 2), (3, 3)
FEW, ODD = "3x3 of few channels", "3x3 of odd channels"
CONVOLUTIONS = {  # name: dtype, input shape, output channels, kernel size, stride, padding
    "3x3 bfloat16": (torch.bfloat16, (32, 64, 16, 16), 64, X3, ONE, (1, 1, 1, 1)),
    "1x1 bfloat16": (torch.bfloat16, (32, 256, 16, 16), 64, ONE, ONE, (0, 0, 0, 0)),
    "3x3 float32": (torch.float32, (32, 64, 16, 16), 64, X3, ONE, (1, 1, 1, 1)),
    "3x3 stride 2 float16": (torch.float16, (32, 64, 16, 16), 128, X3, TWO, (0, 1, 0, 1)),
    FEW: (torch.bfloat16, (32, 16, 16, 16), 16, X3, ONE, (1, 1, 1, 1)),
    ODD: (torch.bfloat16, (32, 65, 16, 16), 17, X3, ONE, (1, 1, 1, 1)),
}


TESTED = "sm_80", "sm_90", "sm_100", "gfx942"
CASES = [(target, name) for target in TESTED for name in list(CONVOLUTIONS)[:3]]
CASES += [("sm_80", "3x3 stride 2 float16"), ("sm_80", ODD)]
CASES += [("gfx90a", "3x3 float32")]  # where Triton refuses TF32


@pytest.mark.parametrize(("target", "name"), CASES)
def test_convolutions(target, name, tmp_path):
    """Matrix instructions of the architecture, no spills, no more shared memory than there is.

    float32 is in TF32 where there is one, as PyTorch allows by default, and so uses them as well.
    """
    with compiling(target) as kernels:
        convolution(*CONVOLUTIONS[name])
    for machine in (Machine(target, kernel, tmp_path) for kernel in kernels):
        if machine.name.startswith("preact_conv"):
            assert machine.multiplies_with(MATRIX_INSTRUCTIONS[target]), machine.name
        assert machine.spilled == 0, machine.name
        assert machine.shared <= SHARED_MEMORY[target], machine.name


@pytest.mark.parametrize(("target", "name"), [("sm_90", FEW), ("sm_100", FEW), ("sm_100", ODD)])
def test_narrow_convolutions(target, name, tmp_path):
    """Likewise; wgrad, of fewer rows than a warp group multiplies, by a warp's instruction."""
    with compiling(target) as kernels:
        convolution(*CONVOLUTIONS[name])
    for machine in (Machine(target, kernel, tmp_path) for kernel in kernels):
        if machine.name.startswith("preact_conv"):
            instruction = MATRIX_INSTRUCTIONS["sm_80" if "wgrad" in machine.name else target]
            assert machine.multiplies_with(instruction), machine.name
        assert machine.spilled == 0, machine.name
        assert machine.shared <= SHARED_MEMORY[target], machine.name


def test_transformed_operand_comes_from_registers(tmp_path):
    """wgmma's first operand: h in forward, dy where BatchNorm's backward pass is finished."""
    with compiling("sm_90") as kernels:
        convolution(*CONVOLUTIONS["3x3 bfloat16"])
    machines = [Machine("sm_90", kernel, tmp_path) for kernel in kernels]
    transforming = [m for m in machines if m.name.startswith("preact_conv")][:4]
    assert [machine.name.split("_")[2] for machine in transforming] == [
        *("forward", "forward", "dgrad", "wgrad")
    ]
    for machine in transforming:
        assert machine.multiplies_with(r"HGMMA\S* R\d+, R\d+, gdesc"), machine.name
        assert not machine.multiplies_with(r"HGMMA\S* R\d+, gdesc"), machine.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TESTED)
def test_other_operators(target, dtype, tmp_path):
    """No spills, no more shared memory than there is."""
    with compiling(target) as kernels:
        pointwise(dtype, (32, 65, 16, 16))
    for machine in (Machine(target, kernel, tmp_path) for kernel in kernels):
        assert machine.spilled == 0, machine.name
        assert machine.shared <= SHARED_MEMORY[target], machine.name


def test_exact_float32(tmp_path):
    """Where TF32 is not allowed, no kernel uses it."""
    with compiling("sm_90") as kernels:
        convolution(*CONVOLUTIONS["3x3 float32"], allow_tf32=False)
    for machine in (Machine("sm_90", kernel, tmp_path) for kernel in kernels):
        assert not machine.multiplies_with("HG?MMA"), machine.name
        assert machine.spilled == 0, machine.name
