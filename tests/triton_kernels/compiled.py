"""Kernels compiled by Triton's own compiler for GPUs that are not there."""

import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fused_preact.triton
from fused_preact.triton import config

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
}
# What a thread block may have: CUDA's programming guide, compute capabilities; AMD CDNA's LDS.
SHARED_MEMORY = {
    **{"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10},
    **{"gfx942": 64 << 10, "gfx90a": 64 << 10},
}
# The matrix units' instructions; UTCHMMA is PTX's tcgen05.mma.
MATRIX_INSTRUCTIONS = {
    **{"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC.?MMA"},
    **{"gfx942": "v_mfma_", "gfx90a": "v_mfma_"},
}


class AbsentGpu:
    """What JITFunction.warmup asks of a driver; each target is a device of its own."""

    def __init__(self, target: str) -> None:
        self.number, self.target = list(TARGETS).index(target), TARGETS[target]

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiling(target: str):
    """Operators on CPU tensors compile what they would launch on target; yields those kernels."""
    kernels = []

    def compile_only(kernel, grid):
        return lambda *args, **options: kernels.append(kernel.warmup(*args, grid=grid, **options))

    triton.runtime.driver.set_active(AbsentGpu(target))
    with (
        mock.patch.object(JITFunction, "__getitem__", compile_only),
        mock.patch.object(config, "architecture", lambda: target),
    ):
        yield kernels


class Machine:
    """One compiled kernel: its name, machine code, shared memory and what it spills, in bytes."""

    def __init__(self, target: str, kernel, folder: Path) -> None:
        self.name, self.shared = kernel.metadata.name, kernel.metadata.shared
        if target.startswith("sm_"):
            cubin = folder / "kernel.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            self.code = _cuobjdump("-sass", cubin)
            self.spilled = int(re.search(r"STACK:(\d+)", _cuobjdump("-res-usage", cubin))[1])
        else:
            self.code = kernel.asm["amdgcn"]
            self.spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", self.code)[1])

    def multiplies_with(self, instruction: str) -> bool:
        return re.search(rf"\b{instruction}", self.code) is not None


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def convolution(dtype, shape, channels, kernel_size, stride, padding, *, allow_tf32=True):
    """Forward and backward of one convolution, each as with everything that it can have."""
    op = fused_preact.triton
    input = torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(channels, shape[1], *kernel_size, dtype=dtype)
    affine, output_affine = torch.ones(4, shape[1]), torch.ones(4, channels)
    rest = list(stride), list(padding), [1, 1], 1, "relu"
    output, *_ = op.preact_conv_forward(input, affine, weight, None, *rest, False, allow_tf32)
    next_bn = output_affine[0], output_affine[1], 1e-5
    op.preact_conv_forward(input, affine, weight, output, *rest, True, allow_tf32, *next_bn)
    deferred = output, output, output_affine, torch.ones(2, channels)
    for grad in deferred, (output, None, None, None):
        op.preact_conv_dgrad(*grad, weight, input, affine, input, *rest, True, allow_tf32)
        op.preact_conv_wgrad(*grad, input, affine, list(kernel_size), *rest, allow_tf32)


def pointwise(dtype, shape):
    """The other operators."""
    op = fused_preact.triton
    input = torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(shape[1])
    affine = op.bn_affine(op.bn_stats(input), vector, vector, 1e-5)
    op.bn_update_running([vector] * 2, [vector] * 2, [affine[:2]] * 2, [0.1, 0.9], [9, 9])
    op.bn_relu_forward(input, affine, "silu")
    _, sums = op.bn_relu_backward(input, input, affine, "silu", True)
    op.residual_grad(input, input, input, affine, sums)
