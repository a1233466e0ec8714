"""The report of predicted times: it runs, and counts what the real models call."""

from collections import Counter

import kernel_report
import predicted_and_measured
import pytest
import torch
from cuda_emulator.emulator import COPIED
from kernel_report import DEVICES, Report
from machine_code import Instruction, Loop, cuobjdump, known_architectures, nvcc
from measure import layer_by_layer, runs_units
from step_calls import by_kernel, shape_class, step_calls, weight_gradient
from torch.utils._python_dispatch import TorchDispatchMode

from fused_preact import PreActBlock, PreActBottleneck, PreActResNet, backend

SHAPE = (2, 3, 32, 32)
H100 = next(device for device in DEVICES if device.name == "H100")


def bottlenecks():
    return PreActResNet(PreActBottleneck, [2, 1], widths=(16, 32))


def blocks():
    return PreActResNet(PreActBlock, [2, 1], widths=(16, 32))


class OurCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if runs_units(function):
            with self:
                return layer_by_layer(function, args, kwargs)
        if function.namespace == "fused_preact":
            self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [bottlenecks, blocks])
def test_calls_are_those_of_the_real_model(build):
    """Taken without data, they are the ones of a training step on real tensors."""
    model = build().to(memory_format=torch.channels_last)
    images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    with OurCalls() as real:
        with backend("cpu"), torch.autocast("cpu", torch.bfloat16):
            output = model(images)
        output.float().sum().backward()
    calls = [c for c in step_calls(build, SHAPE) if c.operator.startswith("fused_preact")]
    taken = Counter(call.operator for call in calls if not call.weight_gradients)
    assert taken and taken == real.names
    wgrads = [call for call in calls if weight_gradient(call) is not None]
    assert wgrads == [wgrad for call in calls for wgrad in call.weight_gradients]


needs_code = pytest.mark.skipif(
    nvcc() is None or cuobjdump() is None, reason="no nvcc, or no cuobjdump"
)


@needs_code
@pytest.mark.parametrize("warpgroups", [False, True])
def test_report_of_a_small_network(emulator, kernels, warpgroups):
    """A row for each launch, none faster than its floor; the step's sum has every launch once."""
    if warpgroups and "90a" not in known_architectures():
        pytest.skip("this nvcc knows no sm_90a")
    calls = step_calls(bottlenecks, SHAPE)
    by_name = {
        kernel.name: kernel
        for (architecture, _), instances in kernels.items()
        for kernel in instances
        if architecture == H100.architecture
    }
    report = Report({H100.architecture: by_name}, emulator, warpgroups=warpgroups)
    rows = report.step(H100, calls)
    ours = [call for call in calls if call.operator.startswith("fused_preact")]
    ours = report.by_kernel(H100, ours)
    for operator in {call.operator for call in ours}:
        of_each = [len(report.launches(H100, call)) for call in ours if call.operator == operator]
        name = operator.split("::")[1]
        assert all(of_each), name
        assert sum(row.count for row in rows if row.operator == name) == sum(of_each), name
    for row in rows:
        assert row.predicted >= max(row.bytes, row.roles, kernel_report.LAUNCH), row
        assert row.resident_blocks >= 1 or not row.kernel, row
        assert row.issue > 0 or "preact_conv" not in row.kernel, row
        assert (row.roles > 0) == ("_by_warpgroups" in row.kernel), row
    assert any(row.roles for row in rows) == warpgroups
    text = kernel_report.markdown(H100, by_name, {"R-1001": rows})
    assert "prediction" in text and "preact_conv_wgrad" in text


def test_units_are_measured_layer_by_layer(monkeypatch):
    """Every call of a layer, and no call of units, which would count its layers twice."""
    monkeypatch.setattr(predicted_and_measured, "_seconds", lambda call: 1.0)
    calls = [c for c in step_calls(bottlenecks, SHAPE) if c.operator.startswith("fused_preact")]
    predicted = {(c.operator.split("::")[1], shape_class(c)): 1.0 for c in calls}
    rows = predicted_and_measured.measure(calls, predicted)
    layers = [call for call in calls if not call.weight_gradients]
    assert sum(row.count for row in rows) == len(layers) < len(calls)
    assert not any("units" in row.operator for row in rows)


def test_gradients_without_a_common_kernel_are_measured_apart(monkeypatch):
    """As the report predicts them: a weight gradient and a gradient of the input, and the sum's."""
    monkeypatch.setattr(predicted_and_measured, "_seconds", lambda call: 1.0)
    calls = [call for call in step_calls(blocks, SHAPE) if call.operator.endswith("conv_backward")]
    parts = [part for call in calls for part in by_kernel(call, lambda _: False)]
    predicted = {(c.operator.split("::")[1], shape_class(c)): 1.0 for c in parts}
    rows = Counter()
    for row in predicted_and_measured.measure(calls, predicted):
        rows[row.operator] += row.count
    sums = sum(call.operator == "fused_preact::residual_conv_backward" for call in calls)
    assert 0 < sums < len(calls)
    assert rows == {
        "preact_conv_dgrad": len(calls),
        "preact_conv_wgrad": len(calls),
        "residual_grad": sums,
    }


def test_partial_weight_gradients_are_those_of_wgrad(emulator):
    """Of a residual sum too, whose call begins with another kernel."""
    report = Report({}, emulator)
    calls = step_calls(blocks, SHAPE)
    sums = [call for call in calls if call.operator == "fused_preact::residual_conv_backward"]
    for call in sums:
        _, wgrad, _ = by_kernel(call, lambda _: False)
        assert report.partial_bytes(H100, call) == report.partial_bytes(H100, wgrad)
    assert sums


def test_small_1x1_gradients_have_one_kernel(emulator):
    """Both of them, of bottlenecks; 3x3 convolutions have two."""
    calls = step_calls(bottlenecks, SHAPE)
    kernels = Counter(
        c.operator.split("::")[1] for c in Report({}, emulator).by_kernel(H100, calls)
    )
    assert kernels["preact_conv_backward"] >= 4
    assert kernels["preact_conv_wgrad"] >= 3
    assert kernels["residual_conv_backward"] >= 1


@needs_code
def test_main_loops_multiply(kernels):
    """What the report calls the main loop holds every kernel's multiplications, and their loads.

    In tiles of 32 channels by 16 of the source a tap has four, and as much else to do.
    """
    for (architecture, _), instances in kernels.items():
        for kernel in instances:
            if "preact_conv" in kernel.name and "f16" in kernel.name:
                loop = kernel.main_loop
                of_tap, others = (4, 11) if ", 32, 16>" in kernel.name else (16, 8)
                assert loop.count("HMMA") >= of_tap, f"sm_{architecture} {kernel.name}"
                assert 0 < loop.count("LDSM") < loop.count("HMMA")
                assert len(loop.instructions) < others * loop.count("HMMA")


def code(*lines: str) -> list[Instruction]:
    """One instruction every 16 bytes; a branch says where to."""
    found = []
    for i, line in enumerate(lines):
        opcode, _, target = line.partition(" ")
        found.append(Instruction(16 * i, opcode, int(target, 16) if target else None))
    return found


def test_longest_way_takes_one_of_two():
    """Of code for each of two cases; what moves single numbers, or is SiLU's, is no way."""
    first = ["LDG.E.128", "BRA 0x50", "FADD", "FADD", "BRA! 0x60"]
    loop = Loop(code(*first, "FMUL", "STG.E.128", "BRA 0x0"))
    names = [i.name for i in loop.longest_way()]
    assert names == ["LDG", "BRA", "FADD", "FADD", "BRA!", "STG", "BRA"]
    for slow in ("STG.E", "MUFU.EX2"):
        first[2] = slow
        loop = Loop(code(*first, "FMUL", "STG.E.128", "BRA 0x0"))
        assert [i.name for i in loop.longest_way()] == ["LDG", "BRA", "FMUL", "STG", "BRA"]


def test_multiplications_of_an_instruction():
    """As many as m16n8k16, of each warp; what waits for a warpgroup's has none."""
    of_each = {"HMMA.16816.F32.BF16": 1, "HGMMA.64x128x16.F32": 16, "HGMMA.64x8x16.F16": 0}
    assert {i.opcode: i.multiplications for i in code(*of_each, "FFMA")} == of_each | {"FFMA": 0}


def test_warps_with_roles_are_told_apart(emulator):
    """Of a 1x1: each of eight warps multiplies 16 x 64 x 32 numbers a tile, three fill windows."""
    u, weight = torch.zeros(2, 32, 16, 16).bfloat16(), torch.zeros(64, 32, 1, 1).bfloat16()
    u = u.contiguous(memory_format=torch.channels_last)
    with emulator.recording(4, 227 * 1024, warpgroups=True) as launches:
        emulator.operators.preact_conv_forward(
            *(u, None, weight, None, (1, 1), (0,) * 4, (1, 1), 1, "relu", False)
        )
    (launch,) = launches
    assert launch.grid == (4, 1, 1)  # one tile of 128 pixels each
    assert [warp.multiplications for warp in launch.warps] == [8 * 2] * 8 + [0] * 4
    filled = [warp.transformed for warp in launch.warps]
    assert filled[:8] == [0] * 8 and sum(filled[8:11]) == 128 * 4 // 32 and filled[11] == 0


@needs_code
def test_copies_of_windows_and_of_weights_are_told_apart(kernels):
    """In 16 bits each has its loops; where weights have none, asking for them is an error."""
    for instances in kernels.values():
        for kernel in instances:
            if "preact_conv" not in kernel.name or "f16" not in kernel.name:
                continue
            assert kernel.per_copy(weights=False) > 0
            if not kernel.copies_weights:
                with pytest.raises(LookupError, match="found no loop for LDGSTS"):
                    kernel.per_copy(weights=True)
            else:
                assert kernel.per_copy(weights=True) > 0


def test_copies_of_weights_are_counted(emulator):
    """Of a 1x1's resident weights, 64 x 32 numbers: each 16 bytes once, 32 lanes at a time."""
    u, weight = torch.zeros(2, 32, 16, 16).bfloat16(), torch.zeros(64, 32, 1, 1).bfloat16()
    u = u.contiguous(memory_format=torch.channels_last)
    with emulator.recording(2, 163 * 1024) as launches:
        emulator.operators.preact_conv_forward(
            *(u, None, weight, None, (1, 1), (0,) * 4, (1, 1), 1, "relu", False)
        )
    assert launches[0].weight_copies == 64 * 32 * 2 // 16 // 32
    copied = launches[0].accesses[COPIED, 16] - launches[0].weight_copies
    assert copied == u.numel() * 2 // 16 // 32 // launches[0].grid[0]
