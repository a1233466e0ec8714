"""The report of predicted times: it runs, and counts what the real models call."""

from collections import Counter

import kernel_report
import pytest
import torch
from kernel_report import DEVICES, Report
from machine_code import cuobjdump, nvcc
from step_calls import step_calls
from torch.utils._python_dispatch import TorchDispatchMode

from fused_preact import PreActBlock, PreActBottleneck, PreActResNet, backend

SHAPE = (2, 3, 32, 32)
H100 = next(device for device in DEVICES if device.name == "H100")


def bottlenecks():
    return PreActResNet(PreActBottleneck, [2, 1], widths=(16, 32))


def blocks():
    return PreActResNet(PreActBlock, [1, 1], widths=(16, 32))


class OurCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_preact":
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [bottlenecks, blocks])
def test_calls_are_those_of_the_real_model(build):
    """Taken without data, they are the ones of a training step on real tensors.

    Where a convolution has both gradients, the report has the two launches that they are on a GPU.
    """
    model = build().to(memory_format=torch.channels_last)
    images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    with OurCalls() as real:
        with backend("cpu"), torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        output.float().sum().backward()
    both = real.names.pop("fused_preact::preact_conv_backward")
    real.names += {f"fused_preact::preact_conv_{half}": both for half in ("dgrad", "wgrad")}
    taken = [c.operator for c in step_calls(build, SHAPE) if c.operator.startswith("fused_preact")]
    assert taken and Counter(taken) == real.names


@pytest.mark.skipif(nvcc() is None or cuobjdump() is None, reason="no nvcc, or no cuobjdump")
def test_report_of_a_small_network(emulator, kernels):
    """A row for each launch, none faster than its floor; the step's sum has every launch once."""
    calls = step_calls(bottlenecks, SHAPE)
    by_name = {
        kernel.name: kernel
        for (architecture, _), instances in kernels.items()
        for kernel in instances
        if architecture == H100.architecture
    }
    report = Report({H100.architecture: by_name}, emulator)
    rows = report.step(H100, calls)
    ours = [call for call in calls if call.operator.startswith("fused_preact")]
    for operator in {call.operator for call in ours}:
        of_each = [len(report.launches(H100, call)) for call in ours if call.operator == operator]
        name = operator.split("::")[1]
        assert all(of_each), name
        assert sum(row.count for row in rows if row.operator == name) == sum(of_each), name
    for row in rows:
        assert row.predicted >= max(row.bytes, kernel_report.LAUNCH), row
        assert row.resident_blocks >= 1 or not row.kernel, row
        assert row.issue > 0 or "preact_conv" not in row.kernel, row
    text = kernel_report.markdown(H100, by_name, {"R-1001": rows})
    assert "prediction" in text and "preact_conv_wgrad" in text


@pytest.mark.skipif(nvcc() is None or cuobjdump() is None, reason="no nvcc, or no cuobjdump")
def test_main_loops_multiply(kernels):
    """What the report calls the main loop holds every kernel's multiplications, and their loads."""
    for (architecture, _), instances in kernels.items():
        for kernel in instances:
            if "preact_conv" in kernel.name and "f16" in kernel.name:
                loop = kernel.main_loop
                assert loop.count("HMMA") >= 32, f"sm_{architecture} {kernel.name}"
                assert 0 < loop.count("LDSM") < loop.count("HMMA")
                assert len(loop.instructions) < 8 * loop.count("HMMA")
