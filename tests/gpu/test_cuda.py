"""The CUDA kernels on a GPU: parity, CUDA graphs, reruns, no synchronisation, large tensors."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_emulator.cases import SHAPES, TOLERANCES, Shape, calls, results, run
from cuda_emulator.test_emulator import assert_close
from cuda_emulator.test_warpgroups import SHAPES as WARPGROUP_SHAPES
from numerics import Case, assert_rule, make_case
from predicted_and_measured import measure, predictions, table
from step_calls import STEPS, step_calls

import fused_preact
from fused_preact import _C, PreActBottleneck, reference

DTYPES = list(TOLERANCES)
OPERATORS = torch.ops.fused_preact
TESTS = Path(__file__).resolve().parent.parent
PATHS = [str(TESTS), str(TESTS.parent / "benchmarks")]
CONV3 = (72, (3, 3), (1, 1), (1, 1, 1, 1))
UNITS = {
    "bn_relu": {"shape": (2, 24, 5, 7)},
    "1x1": {"convs": [(72, (1, 1), (1, 1), (0,) * 4)], "residual": True},
    "3x3": {"convs": [CONV3], "shape": (4, 64, 16, 16)},
    "stride 2": {"convs": [(65, (3, 3), (2, 2), (0, 1, 0, 1))], "shape": (3, 33, 9, 7)},
    "constant channel": {"convs": [CONV3], "constant": True},
    "silu": {"convs": [CONV3], "activation": "silu"},
    "eval": {"convs": [CONV3], "training": False},
    "bottleneck": {
        "convs": [(16, (1, 1), (1, 1), (0,) * 4), CONV3, (64, (1, 1), (1, 1), (0,) * 4)],
        "shape": (4, 64, 14, 14),
        "shortcut": "input",
    },
}


def on_gpu(case: Case) -> Case:
    """The same case with its data on the GPU."""

    def bn(one):
        return one and type(one)(*(v.cuda() if torch.is_tensor(v) else v for v in one))

    def conv(one):
        return one and one._replace(weight=one.weight.cuda())

    return replace(
        case,
        input=case.input.cuda(),
        bns=[bn(one) for one in case.bns],
        convs=[conv(one) for one in case.convs],
        projection=conv(case.projection),
        residual=None if case.residual is None else case.residual.cuda(),
        grad_output=case.grad_output.cuda(),
    )


class OnGpu:
    """The CUDA operators, for tensors that lie on the CPU."""

    def __getattr__(self, name):
        def call(*arguments, **options):
            moved, named = torch.utils._pytree.tree_map_only(
                torch.Tensor, torch.Tensor.cuda, (arguments, options)
            )
            result = getattr(OPERATORS, name)(*moved, **named)
            return result.cpu() if torch.is_tensor(result) else tuple(r.cpu() for r in result)

        return call


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_match_reference(shape, dtype, whole):
    """Each within a few roundings of its dtype, relative to the largest value, and twice alike."""
    ours, again = (run(OnGpu(), shape, dtype, "relu", whole) for _ in range(2))
    truth = run(reference, shape, dtype, "relu", whole)
    for name, true in truth.items():
        assert torch.equal(ours[name], again[name]), name
        if true.numel():
            error = (ours[name].float() - true.float()).abs().max()
            assert error <= TOLERANCES[dtype] * true.abs().max().float().clamp_min(1e-3), name


@pytest.mark.parametrize(
    "dtype,allow_tf32",
    [*((dtype, False) for dtype in DTYPES), (torch.float32, True)],
    ids=[*map(str, DTYPES), "tf32"],
)
@pytest.mark.parametrize("unit", UNITS)
def test_units_keep_the_tolerance_rule(unit, dtype, allow_tf32):
    torch.backends.cudnn.allow_tf32 = allow_tf32
    with fused_preact.backend("cuda"):
        assert_rule(on_gpu(make_case(dtype, **UNITS[unit])), dtype, allow_tf32=allow_tf32)


def assert_sanitizer_finds_nothing(tool: str, script: str) -> None:
    """A tool of compute-sanitizer, while a Python script that imports the tests runs."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    script = f"import sys; sys.path[:0] = {PATHS}\n{script}"
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.fixture
def warpgroups():
    """Convolutions multiply with wgmma, where they can."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma: compute capability 9.0")
    if not hasattr(_C, "use_warpgroups"):
        pytest.skip("wgmma: no kernels for 9.0a are built")
    _C.use_warpgroups(True)
    yield
    _C.use_warpgroups(False)


# 170 tiles of 256 positions: larger tiles want as many as an H100 has multiprocessors
LARGE = [
    Shape(40, 64, 32, 32, 64, (3, 3), padding=(1, 1, 1, 1)),
    Shape(40, 128, 32, 32, 128, (3, 3), padding=(1, 1, 1, 1)),
    Shape(44, 256, 28, 28, 256, (1, 1)),
    Shape(44, 320, 28, 28, 128, (1, 1)),
    Shape(44, 128, 28, 28, 320, (1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*WARPGROUP_SHAPES, *LARGE], ids=str)
def test_warpgroups_match_reference(warpgroups, shape, dtype):
    """Whole and bare: as the other kernels are held to it, and twice alike."""
    for whole in (True, False):
        for name, arguments in calls(shape, dtype, whole).items():
            ours, again, truth = (
                results(operators, name, arguments) for operators in (OnGpu(), OnGpu(), reference)
            )
            assert_close(ours, truth, dtype)
            for key, value in ours.items():
                assert torch.equal(value, again[key]), f"{name}: {key}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_units_by_warpgroups_keep_the_tolerance_rule(warpgroups, unit, dtype):
    with fused_preact.backend("cuda"):
        assert_rule(on_gpu(make_case(dtype, **UNITS[unit])), dtype, allow_tf32=False)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_warpgroups_under_compute_sanitizer(warpgroups, tool):
    script = (
        "import torch\nfrom fused_preact import _C\nfrom gpu.test_cuda import OnGpu\n"
        "from cuda_emulator.cases import run\n"
        "from cuda_emulator.test_warpgroups import SHAPES\n"
        "_C.use_warpgroups(True)\n"
        "for i in (3, 6, 11, 12): run(OnGpu(), SHAPES[i], torch.bfloat16, 'relu', True)\n"
    )
    assert_sanitizer_finds_nothing(tool, script)


@pytest.fixture
def block():
    block = PreActBottleneck(64, 16).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 64, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    return block, x.requires_grad_()


def step(block, x):
    with torch.autocast("cuda", torch.bfloat16):
        output = block(x)
    output.float().square().mean().backward()
    return output


def test_graph_replays_a_training_step(block):
    """Captured once, replayed on other data: the same bits as without a graph."""
    block, x = block
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(block, x)
    torch.cuda.current_stream().wait_stream(stream)
    block.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(block, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    grad, output = x.grad.clone(), captured.clone()
    x.grad = None
    block.zero_grad(set_to_none=True)
    expected = step(block, x)
    assert torch.equal(output, expected) and torch.equal(grad, x.grad)


def test_nothing_synchronises(block):
    block, x = block
    step(block, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(block, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_another_device_are_refused():
    """By name, before a kernel could read through a pointer that means nothing on its device."""
    u, weight = torch.randn(2, 8, 4, 4, device="cuda"), torch.randn(8, 8, 1, 1, device="cuda")
    geometry = ((1, 1), (0,) * 4, (1, 1), 1, "relu", True)
    error = (ValueError, RuntimeError)
    expected = "expected a tensor on cuda:0, as the input is, got one on cpu"
    with pytest.raises(error, match=f"weight: {expected}"):
        OPERATORS.preact_conv_forward(u, None, weight.cpu(), None, *geometry)
    with pytest.raises(error, match=f"next_bias: {expected}"):
        bn = {"next_bias": torch.zeros(8), "next_eps": 1e-5}
        OPERATORS.preact_conv_forward(u, None, weight, None, *geometry, **bn)


def test_many_small_images():
    """More images than a grid's y or z axis could hold."""
    u = torch.randn(131_073, 8, 2, 2, device="cuda").to(torch.bfloat16)
    u = u.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3, device="cuda").to(torch.bfloat16)
    arguments = (u, None, weight, None, (1, 1), (1,) * 4, (1, 1), 1, "relu", True)
    ours, stats, _ = OPERATORS.preact_conv_forward(*arguments)
    truth, *_ = reference.preact_conv_forward(*arguments)
    assert torch.allclose(ours.float(), truth.float(), atol=0.2, rtol=0.02)
    assert torch.allclose(stats, reference.bn_stats(ours), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30, reason="24 GiB of memory"
)
def test_more_than_two_to_the_31_elements():
    """The last image is computed like the first: offsets have 64 bits."""
    image = torch.randn(1, 128, 64, 64, device="cuda").to(torch.bfloat16)
    u = image.expand(4100, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert u.numel() > 2**31
    affine = reference.bn_affine(reference.bn_stats(image), None, None, 1e-5)
    h = OPERATORS.bn_relu_forward(u, affine, "relu")
    assert torch.equal(h[0], h[-1])
    del h
    weight = torch.randn(128, 128, 1, 1, device="cuda").to(torch.bfloat16)
    y, *_ = OPERATORS.preact_conv_forward(
        u, affine, weight, None, (1, 1), (0,) * 4, (1, 1), 1, "relu", False
    )
    assert torch.equal(y[0], y[-1])


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="two GPUs")
def test_second_device():
    """A tensor's own device is used, whichever is current."""
    u = torch.randn(2, 16, 8, 8, device="cuda:1")
    assert torch.allclose(OPERATORS.bn_stats(u), reference.bn_stats(u), rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Every operator on a small odd shape, and on one with whole vectors."""
    script = (
        "import torch\nfrom gpu.test_cuda import OnGpu\n"
        "from cuda_emulator.cases import SHAPES, run\n"
        "for i in (4, 7): run(OnGpu(), SHAPES[i], torch.bfloat16, 'relu', True)\n"
    )
    assert_sanitizer_finds_nothing(tool, script)


def test_predictions_stand_beside_measurements():
    """Some calls of a ResNet-1001's step, each predicted by the report and timed here."""
    gpu = torch.cuda.get_device_name()
    try:
        predicted = predictions("R-1001", gpu)
    except LookupError as error:
        pytest.skip(str(error))
    step = STEPS["R-1001"]
    of_step = list(dict.fromkeys(step_calls(step.build, step.shape)))
    ours = [call for call in of_step if call.operator.startswith("fused_preact")]
    rows = measure(ours, predicted)
    assert {row.operator for row in rows} >= {"preact_conv_forward", "preact_conv_wgrad"}
    assert all(row.predicted > 0 and row.measured > 0 for row in rows)
    print(table("R-1001", gpu, rows))
