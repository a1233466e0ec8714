"""What the emulator finds wrong: races and waits too weak, put into copies of the kernels."""

import pytest
import torch
from cuda_emulator.build import broken, build
from cuda_emulator.cases import POINTWISE, SANITIZED, SHAPES, run
from cuda_emulator.emulator import Emulator

from fused_preact import reference

pytestmark = pytest.mark.skipif(SANITIZED, reason="builds by itself")


@pytest.mark.parametrize(
    ("kernel", "before", "shape", "dweight"),
    [
        ("preact_conv_wgrad", "  __syncthreads();\n    }\n", SHAPES[4], "preact_conv_wgrad"),
        (
            *("preact_conv_backward", "  __syncthreads();\n    fetch(tile"),
            *(POINTWISE[3], "preact_conv_backward (1)"),
        ),
    ],
)
def test_missing_barrier_is_found(emulator, tmp_path, kernel, before, shape, dweight):
    """A weight gradient without the barrier between the prologue and the multiplication."""
    cuda = broken(tmp_path, f"{kernel}.cu", before, before.replace("__syncthreads();", ""))
    namespace = f"{kernel}_race"
    library = build(
        tmp_path / "build", namespace, cuda=cuda, reuse=emulator.library.parent, optimise="-O0"
    )
    racy = Emulator(library, namespace)
    truth = run(reference, shape, torch.bfloat16, "relu", True)[dweight]
    found = run(racy.operators, shape, torch.bfloat16, "relu", True)[dweight]
    assert not torch.allclose(found, truth, rtol=0.1, atol=0.1 * truth.abs().max().item())


@pytest.mark.parametrize(
    ("kernel", "file", "shape", "result"),
    [
        ("preact_conv_forward", "conv_tiles.cuh", SHAPES[4], "preact_conv_forward"),
        ("preact_conv_wgrad", "preact_conv_wgrad.cu", SHAPES[4], "preact_conv_wgrad"),
        (
            "preact_conv_backward",
            "preact_conv_backward.cu",
            POINTWISE[3],
            "preact_conv_backward (1)",
        ),
    ],
)
def test_too_weak_a_wait_is_found(emulator, tmp_path, kernel, file, shape, result):
    """Copies that are not waited for are not there: each step waits for those of the one before."""
    before = "copies_wait(tiling.stages - 2)"
    cuda = broken(tmp_path, f"{kernel}.cu", before, before.replace("2", "1"), file)
    name = f"preact_weak_{kernel}"
    library = build(
        tmp_path / "build", name, cuda=cuda, reuse=emulator.library.parent, optimise="-O0"
    )
    truth = run(reference, shape, torch.bfloat16, "relu", True)[result]
    found = run(Emulator(library, name).operators, shape, torch.bfloat16, "relu", True)[result]
    assert not torch.allclose(found, truth, rtol=0.1, atol=0.1 * truth.abs().max().item())


def test_missing_barrier_of_a_warp_is_found(emulator, tmp_path):
    """The epilogue that reads the stage before the other lanes have written their part."""
    after = "      // not before: their registers"
    before = "      __syncwarp();\n" + after
    cuda = broken(tmp_path, "preact_conv_forward.cu", before, after, "conv_tiles.cuh")
    library = build(
        tmp_path / "build", "preact_warp", cuda=cuda, reuse=emulator.library.parent, optimise="-O0"
    )
    shape = SHAPES[4]
    truth = run(reference, shape, torch.bfloat16, "relu", True)["preact_conv_forward"]
    operators = Emulator(library, "preact_warp").operators
    found = run(operators, shape, torch.bfloat16, "relu", True)["preact_conv_forward"]
    assert not torch.allclose(found, truth, rtol=0.1, atol=0.1 * truth.abs().max().item())


def test_barrier_that_not_every_thread_reaches_is_named(emulator, tmp_path):
    before = "  const Affine bn(affine, p.channels, me.channel);\n"
    after = before + "  if (threadIdx.x < 7) __syncthreads();\n"
    cuda = broken(tmp_path, "bn_relu_forward.cu", before, after)
    library = build(
        tmp_path / "build", "preact_divergent", cuda=cuda, reuse=emulator.library.parent
    )
    divergent = Emulator(library, "preact_divergent").operators
    with pytest.raises(
        RuntimeError, match=r"bn_relu_forward.*barrier that 7 of 256 threads reached"
    ):
        divergent.bn_relu_forward(torch.zeros(1, 8, 4, 4), torch.zeros(4, 8), "relu")
