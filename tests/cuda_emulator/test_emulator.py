"""Every CUDA kernel on small odd shapes, without a GPU."""

import itertools
import re
from collections import defaultdict

import pytest
import torch
from cuda_emulator.cases import POINTWISE, SANITIZED, SHAPES, TOLERANCES, Shape, run
from numerics import assert_operator_rule, assert_rule, make_case, tf32
from operands import calls_with, operands, units_operands
from torch import Tensor

from fused_preact import ops, reference
from fused_preact.units import Chain

# float16's code is bfloat16's but for two conversions: sanitizers, which are slow, see one of them.
SIXTEEN_BITS = [torch.bfloat16] if SANITIZED else [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *SIXTEEN_BITS]
CONVOLUTIONS = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_match_reference(emulator, shape, dtype, whole):
    """Each within a few roundings of its dtype, relative to the largest value."""
    activation = "silu" if shape.channels % 5 == 0 else "relu"
    ours = run(emulator.operators, shape, dtype, activation, whole)
    assert_close(ours, run(reference, shape, dtype, activation, whole), dtype)


def assert_close(ours: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, true in truth.items():
        assert ours[name].shape == true.shape and ours[name].dtype == true.dtype, name
        if true.numel() == 0:
            continue
        scale = true.abs().max().float().clamp_min(1e-3)
        error = (ours[name].float() - true.float()).abs().max() / scale
        assert error <= TOLERANCES[dtype], f"{name}: {error:.3g}"


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_gradients_of_a_1x1_in_one_kernel(emulator, shape, dtype):
    """As the reference has them; g has the bits of dgrad, and all are the same in any order.

    Deferred or not, with an addend or without, with sums or without.
    """
    images = (shape.images, shape.channels, shape.height, shape.width)
    conv = (shape.filters, shape.kernel, shape.stride, shape.padding)
    for i, deferred in enumerate((True, False)):
        o = operands(dtype, images, conv, deferred=deferred)
        rest = (o.weight, o.input, o.affine, None if i else o.addend, *o.geometry)
        arguments = (o.grad, *o.deferred, *rest, "silu" if shape.filters > 64 else "relu", i == 0)
        most = (163 if shape.filters > 128 else 99) * 1024
        with emulator.recording(132, most) as launches:
            emulator.operators.preact_conv_backward(*arguments)
        assert max(launch.shared_bytes for launch in launches) <= most
        assert kernels_of(launches) == ["preact_conv_backward", "add_splits"]
        results = []
        for seed in range(2):
            emulator.seed(seed)
            results.append(emulator.operators.preact_conv_backward(*arguments))
        names = ("g", "sums", "dweight")
        truth = reference.preact_conv_backward(*arguments)
        assert_close(*(dict(zip(names, r, strict=True)) for r in (results[0], truth)), dtype)
        assert torch.equal(results[0][0], emulator.operators.preact_conv_dgrad(*arguments)[0])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_gradients_of_a_1x1_in_a_residual_sum(emulator, shape, dtype):
    """Likewise, the sum's gradient made on the way: with the bits of residual_grad, written once.

    With a shortcut's gradient and without.
    """
    images = (shape.images, shape.channels, shape.height, shape.width)
    conv = (shape.filters, shape.kernel, shape.stride, shape.padding)
    o = operands(dtype, images, conv, deferred=True)
    rest = (o.weight, o.input, o.affine, *o.geometry, "silu" if shape.filters > 64 else "relu")
    op = emulator.operators
    for residual in (o.residual, None):
        arguments = (residual, o.grad, *o.deferred, *rest)
        with emulator.recording(132, 227 * 1024) as launches:
            op.residual_conv_backward(*arguments)
        assert kernels_of(launches) == ["preact_conv_backward", "add_splits"]
        results = []
        for seed in range(2):
            emulator.seed(seed)
            results.append(op.residual_conv_backward(*arguments))
        names = ("dy", "g", "sums", "dweight")
        truth = reference.residual_conv_backward(*arguments)
        assert_close(*(dict(zip(names, r, strict=True)) for r in (results[0], truth)), dtype)
        dy, g = results[0][:2]
        assert torch.equal(dy, op.residual_grad(residual, o.grad, *o.deferred))
        plain = (dy, None, None, None, *rest[:3], None, *rest[3:], True)
        assert torch.equal(g, op.preact_conv_dgrad(*plain)[0])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_residual_sum_that_does_not_fit(emulator):
    """Where shared memory has no room for another operand, the sum's gradient is made before.

    Where it has none for the others either, each gradient has its own kernel.
    """
    o = operands(torch.bfloat16, (2, 64, 5, 7), (256, (1, 1), (1, 1), (0,) * 4), deferred=True)
    arguments = (o.residual, o.grad, *o.deferred, o.weight, o.input, o.affine, *o.geometry, "relu")
    ours = emulator.operators.residual_conv_backward(*arguments)
    for kilobytes, kernels in (
        (130, ["preact_conv_backward", "add_splits"]),
        (99, ["preact_conv_wgrad", "add_splits", "preact_conv_dgrad"]),
    ):
        with emulator.recording(1, kilobytes * 1024) as launches:
            emulator.operators.residual_conv_backward(*arguments)
        assert kernels_of(launches) == ["residual_grad", *kernels]
        with emulator.device(1, kilobytes * 1024):
            dy, g, _, _ = emulator.operators.residual_conv_backward(*arguments)
        assert torch.equal(dy, ours[0]) and torch.equal(g, ours[1])


def test_grids_have_as_many_blocks_as_there_is_room_for(emulator):
    """On a device whose registers are known; blocks walk over the rest of the tiles."""
    o = operands(torch.bfloat16, (64, 16, 16, 16), (16, (3, 3), (1, 1), (1, 1, 1, 1)))
    asked = set()

    def room(name: str, threads: int, shared_bytes: int) -> int:
        asked.add((name, threads))
        return 3

    with emulator.recording(10, 227 * 1024, resident_blocks=room) as launches:
        emulator.operators.preact_conv_forward(
            o.input, o.affine, o.weight, None, *o.geometry, "relu", True
        )
    assert launches[0].grid == (30, 1, 1)
    assert (launches[0].kernel, launches[0].threads) in asked


def kernels_of(launches) -> list[str]:
    return [launch.kernel.split("_kernel")[0] for launch in launches]


@pytest.mark.parametrize("of_a_sum", [False, True])
@pytest.mark.parametrize(
    ("channels", "filters", "kilobytes"),
    [
        *(
            (c, k, kilobytes)
            for c, k in ((16, 64), (32, 128), (256, 64))
            for kilobytes in (99, 227)
        ),
        *((64, 256, kilobytes) for kilobytes in (145, 163, 227)),
        (256, 64, 120),
    ],
)
def test_gradients_of_a_1x1_of_many_tiles(emulator, channels, filters, kilobytes, of_a_sum):
    """So many a block that every slot is used again, whatever shared memory has room for."""
    shape = (2, channels, 21, 24)  # 32 tiles, the last of them half empty
    conv = (filters, (1, 1), (1, 1), (0,) * 4)
    o = operands(torch.bfloat16, shape, conv, deferred=True)
    name, names = "preact_conv_backward", ("g", "sums", "dweight")
    arguments = (o.grad, *o.deferred, o.weight, o.input, o.affine, None, *o.geometry, "relu", True)
    if of_a_sum:
        name, names = "residual_conv_backward", ("dy", *names)
        arguments = (o.residual, *arguments[:7], *o.geometry, "relu")
    operator = getattr(emulator.operators, name)
    with emulator.recording(1, kilobytes * 1024) as launches:
        operator(*arguments)
    both = next(launch for launch in launches if launch.kernel.startswith("preact_conv_backward"))
    stages = {2 + newest for newest, n in enumerate(both.warps[0].waits) if n}
    assert 32 // both.grid[0] > 2 * max(stages)
    with emulator.device(1, kilobytes * 1024):
        ours = operator(*arguments)
    truth = getattr(reference, name)(*arguments)
    ours, truth = (dict(zip(names, r, strict=True)) for r in (ours, truth))
    assert_close(ours, truth, torch.bfloat16)
    dy = (ours["dy"], None, None, None) if of_a_sum else (o.grad, *o.deferred)
    rest = (o.weight, o.input, o.affine, None, *o.geometry, "relu", True)
    assert torch.equal(ours["g"], emulator.operators.preact_conv_dgrad(*dy, *rest)[0])


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float32, 1e4), (torch.bfloat16, 100.0), (torch.float16, 1000.0)]
)
def test_mean_far_from_zero(emulator, dtype, mean):
    """dy keeps the tolerance rule, in 16 bits too, where its mean is in the offset."""
    o = operands(dtype, (4, 16, 9, 7), (16, (3, 3), (1, 1), (1, 1, 1, 1)), deferred=True, mean=mean)
    dy, rest = (o.grad, *o.deferred), (*o.geometry, "relu")
    of_input = o.weight, o.input, o.affine, None
    for name, arguments in {
        "residual_grad": (None, o.addend, o.input, o.affine, torch.randn(2, 16) * 16),
        "preact_conv_dgrad": (*dy, *of_input, *rest, True),
        "preact_conv_wgrad": (*dy, o.input, o.affine, o.weight.shape[2:], *rest),
    }.items():
        assert_operator_rule(emulator.operators, name, dtype, *arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tf32_rounds_both_factors_to_nearest(emulator, shape):
    """Against the reference on factors rounded before, within float32's own tolerance.

    And, with BatchNorm on both sides, against exact factors: they are kept to TF32's 11 significant
    bits, which are float16's as well.
    """
    bare, whole = (
        run(emulator.operators, shape, torch.float32, "relu", whole, allow_tf32=True)
        for whole in (False, True)
    )
    rounded = run(reference, shape, torch.float32, "relu", False, factor=tf32)
    exact = run(reference, shape, torch.float32, "relu", True)
    for name in CONVOLUTIONS:
        for ours, true, tolerance in (
            (bare[name], rounded[name], TOLERANCES[torch.float32]),
            (whole[name], exact[name], TOLERANCES[torch.float16]),
        ):
            error = (ours - true).abs().max() / true.abs().max().clamp_min(1e-3)
            assert error <= tolerance, f"{name}: {error:.3g}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_running_statistics_match_reference(emulator, dtype):
    """More than one launch has room for, one of them three times, every second number of a vector.

    Within two roundings of their dtype, one for the reference's own.
    """
    tensors = [torch.randn(2, 5 + 70 * (i % 7), 2).to(dtype) for i in range(35)]
    order = [*range(20), 2, *range(20, 35), 2]
    stats = [torch.rand(2, tensors[i].shape[1]) for i in order]
    rest = [0.1 if i % 2 else 0.75 for i in order], [2 + i for i in range(len(order))]

    def updated(operators):
        running = [tensor.clone() for tensor in tensors]
        mean, var = ([running[i][j, :, 0] for i in order] for j in (0, 1))
        operators.bn_update_running(mean, var, stats, *rest)
        return running

    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    for ours, true in zip(updated(emulator.operators), updated(reference), strict=True):
        torch.testing.assert_close(ours, true, rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_no_value_is_an_error(emulator, shape):
    """In the words of every other backend, see tests/ops/test_errors.py."""
    message = re.escape(f"input: expected at least one value, got shape {shape}")
    for name, args in calls_with(torch.ones(shape)).items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            getattr(emulator.operators, name)(*args)


CONV3 = (16, (3, 3), (1, 1), (1, 1, 1, 1))
UNITS = {
    "bn_relu": {"shape": (2, 24, 5, 7)},
    "bn_relu, mean 1e4": {"shape": (2, 8, 9, 7), "mean": 1e4},
    "1x1": {"convs": [(72, (1, 1), (1, 1), (0, 0, 0, 0))], "residual": True},
    "constant channel": {"convs": [CONV3], "constant": True},
    "silu": {"convs": [CONV3], "activation": "silu"},
    "raw": {"convs": [CONV3], "raw": True},
    "eval": {"convs": [CONV3], "training": False},
    "bottleneck": {
        "convs": [(8, (1, 1), (1, 1), (0,) * 4), (8, (3, 3), (2, 2), (1,) * 4),
                  (16, (1, 1), (1, 1), (0,) * 4)],
        "shape": (3, 16, 6, 5),
        "shortcut": "preact",
        "projection": (16, (1, 1), (2, 2), (0,) * 4),
    },
}  # fmt: skip


@pytest.mark.skipif(SANITIZED, reason="the operators are enough")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_units_keep_the_tolerance_rule(emulator, monkeypatch, unit, dtype):
    """Forward and backward through autograd, as far from float64 truth as eager may be."""
    if dtype != torch.float32 and "1e4" in unit:
        pytest.skip("a mean that 16 bits cannot hold")
    monkeypatch.setattr(ops, "plan", lambda *_: emulator.operators)
    monkeypatch.setattr(ops, "allow_tf32", lambda: False)
    assert_rule(make_case(dtype, **UNITS[unit]), dtype)


@pytest.mark.skipif(SANITIZED, reason="the operators are enough")
@pytest.mark.parametrize("unit", UNITS)
def test_units_keep_the_tolerance_rule_in_tf32(emulator, monkeypatch, unit):
    """Likewise where PyTorch allows TF32, its default."""
    monkeypatch.setattr(ops, "plan", lambda *_: emulator.operators)
    assert_rule(make_case(torch.float32, **UNITS[unit]), torch.float32, allow_tf32=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_in_one_call(emulator, dtype):
    """Bit for bit what the operators for single layers give, one after the other."""
    units = [
        ([(8, 1, 2), (8, 3, 1), (24, 1, 1)], "preact", 24),
        ([(24, 3, 1), (24, 3, 1)], "input", None),
    ]
    assert_as_layers(emulator.operators, units_operands(dtype, units, lambda k: k != 3, False))
    bottleneck = [(16, 1, 1), (16, 3, 1), (64, 1, 1)]
    units = [(bottleneck, "preact", 64), *[(bottleneck, "input", None)] * 2]
    assert_as_layers(emulator.operators, units_operands(dtype, units, lambda _: True, False))


def test_units_whose_reductions_need_more_zeros(emulator):
    """More than the 16 KB that a call takes at a time, 128 bytes a reduction."""
    unit = [(16, 1, 1)] * 140, "input", None
    assert_as_layers(
        emulator.operators, units_operands(torch.float32, [unit], lambda _: True, False)
    )


@pytest.mark.parametrize(("filters", "sums"), [(64, 1), (512, 3)])
def test_partial_weight_gradients_of_units_are_added_up_together(emulator, filters, sums):
    """In one launch; where they are 19 MB each, as soon as the next would be more than 64."""
    unit = [(filters, 3, 1)] * 9, "none", None
    o = units_operands(torch.bfloat16, [unit], lambda _: True, False)
    _, inputs, affines, _ = Chain(reference).preact_units_forward(
        *o.forward(with_stats=False, for_backward=True)
    )
    with emulator.recording(132, 227 * 1024) as launches:
        emulator.operators.preact_units_backward(
            *o.backward(inputs, affines, True, True, True, True)
        )
    kernels = kernels_of(launches)
    assert kernels.count("preact_conv_wgrad") == 9 and kernels.count("add_splits") == sums
    last = len(kernels) - 1 - kernels[::-1].index("preact_conv_wgrad")
    assert "add_splits" in kernels[last:]


def assert_as_layers(operators, o) -> None:
    forward = o.forward(with_stats=True, for_backward=True)
    kept = []
    for op in (operators, Chain(operators)):
        output, inputs, affines, stats = op.preact_units_forward(*forward)
        backward = o.backward(inputs, affines, True, True, True, True)
        dinput, *gradients = op.preact_units_backward(*backward)
        kept.append([output, dinput, *stats, *itertools.chain(*gradients)])
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES[4:9], ids=str)
def test_order_of_threads_and_blocks_does_not_matter(emulator, shape):
    """Bit for bit: no race, and every reduction in a fixed order."""
    results = []
    for seed in range(3):
        emulator.seed(seed)
        results.append(run(emulator.operators, shape, torch.bfloat16, "relu", True))
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


# Tiles of 128, 64 and 32 channels, one step of a chunk and several, resident weights and streamed
# ones.
STAGED = [
    Shape(2, 32, 8, 8, 32, (3, 3), padding=(1, 1, 1, 1)),
    Shape(3, 96, 8, 8, 128, (1, 1)),
    Shape(5, 96, 8, 8, 64, (3, 3), padding=(1, 1, 1, 1)),
    Shape(2, 96, 8, 8, 160, (3, 3), (2, 2), (1, 1, 1, 1)),
]


def test_number_of_stages_does_not_matter(emulator):
    """Bit for bit, on devices whose shared memory has room for two, three and four."""
    stages = defaultdict(set)
    for shape in STAGED:
        results = []
        for kilobytes in (227, 120, 80):
            device = (4, kilobytes * 1024)
            with emulator.recording(*device) as launches:
                run(emulator.operators, shape, torch.bfloat16, "relu", True)
            for launch in launches:
                name = launch.kernel.split("_kernel")[0]
                stages[name] |= {2 + newest for newest, n in enumerate(launch.warps[0].waits) if n}
            with emulator.device(*device):
                results.append(run(emulator.operators, shape, torch.bfloat16, "relu", True))
        for other in results[1:]:
            for name in CONVOLUTIONS:
                assert torch.equal(results[0][name], other[name]), f"{shape} {name}"
    assert all(stages[name] == {2, 3, 4} for name in CONVOLUTIONS), stages


@pytest.mark.parametrize("blocks", [16, 17, 40])
def test_sums_of_many_blocks(emulator, blocks):
    """Merged at once up to 16, else 16 at a time: as the reference has them, whoever comes last.

    wgrad's partial results are so many that four or eight threads share those of a value.
    """
    shape = Shape(blocks, 8, 8, 16, 8, (1, 1))  # an image a tile
    truth = run(reference, shape, torch.float32, "relu", True)
    results = []
    with emulator.device(64, 163 * 1024):
        for seed in range(3):
            emulator.seed(seed)
            results.append(run(emulator.operators, shape, torch.float32, "relu", True))
    with emulator.recording(64, 163 * 1024) as launches:
        run(emulator.operators, shape, torch.float32, "relu", True)
    forward = [launch for launch in launches if "conv_forward" in launch.kernel]
    assert {launch.grid for launch in forward} == {(blocks, 1, 1)}
    wgrad = [launch for launch in launches if "conv_wgrad" in launch.kernel]
    assert {launch.grid for launch in wgrad} == {(2 * blocks, 1, 1)}
    assert_close(results[0], truth, torch.float32)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(7, 7), (1, 49), (49, 1)], ids=str)
def test_kernels_that_the_planner_allows_fit(emulator, kernel, dtype):
    """Into 99 KB of shared memory, with all that takes room; a larger one is an error in words."""
    shape = Shape(1, 64, kernel[0] + 3, kernel[1] + 3, 64, kernel)
    with emulator.recording(132, 99 * 1024) as launches:
        run(emulator.operators, shape, dtype, "relu", True)
    assert max(launch.shared_bytes for launch in launches) <= 99 * 1024
    assert kernel[0] * kernel[1] == ops._MOST_CUDA_TAPS
    u, weight = torch.zeros(1, 8, 40, 40), torch.zeros(8, 8, 40, 40)
    with pytest.raises((ValueError, RuntimeError), match="does not fit into shared memory"):
        emulator.operators.preact_conv_forward(
            u, None, weight, None, (1, 1), (0,) * 4, (1, 1), 1, "relu", False
        )


def test_checks_name_the_argument(emulator):
    op = emulator.operators
    u = torch.zeros(2, 3, 4, 4)
    error = (ValueError, RuntimeError)  # as the version of torch has it
    with pytest.raises(error, match=r"affine: expected shape \(4, 3\), got \(4, 5\)"):
        op.bn_relu_forward(u, torch.zeros(4, 5), "relu")
    with pytest.raises(error, match="input: expected float32, bfloat16 or float16"):
        op.bn_stats(u.double())


def conv_tile(launch):
    """Pixels and channels of a block of forward or dgrad."""
    tile = re.search(r"ConvTile<([\d, ]+)>", launch.kernel)[1]
    pixels, across, _, channels, _ = map(int, tile.split(","))
    return pixels, channels * across


def test_few_channels_have_a_tile_of_their_own(emulator):
    """Of 32 channels, where neither operand has more; in 16 bits and with ReLU.

    And where there are so few pixels that all its blocks run at once.
    """

    def tile(channels, filters, dtype=torch.bfloat16, activation="relu", multiprocessors=1):
        shape = Shape(4, channels, 8, 8, filters, (3, 3), padding=(1, 1, 1, 1))
        with emulator.recording(multiprocessors, 99 * 1024) as launches:
            run(emulator.operators, shape, dtype, activation, True)
        return {conv_tile(one)[1] for one in launches if "ConvTile" in one.kernel}

    assert tile(16, 16) == tile(32, 32) == tile(8, 24, torch.float16) == {32}
    assert tile(16, 64) == tile(40, 32) == {64}
    assert tile(16, 16, torch.float32) == tile(16, 16, activation="silu") == {64}
    assert tile(64, 64) == {64} and tile(64, 64, multiprocessors=4) == {32}


def test_large_tiles_need_room_and_blocks_enough(emulator):
    """16 bits, a large shared memory, a tile a multiprocessor, none with more than 128 by 128.

    With ReLU and few source channels most of the work is to store: tiles that have more warps.
    """

    def tile(
        channels,
        multiprocessors,
        shared_bytes,
        dtype=torch.bfloat16,
        activation="relu",
        sources=40,
    ):
        u, weight = torch.zeros(2, sources, 16, 16), torch.zeros(channels, sources, 3, 3)
        u = u.to(dtype, memory_format=torch.channels_last)
        with emulator.recording(multiprocessors, shared_bytes) as launches:
            emulator.operators.preact_conv_forward(
                *(u, None, weight.to(dtype), None, (1, 1), (1,) * 4, (1, 1), 1, activation, False)
            )
        return conv_tile(launches[0])

    assert tile(128, 4, 163 * 1024) == (128, 128)
    assert tile(128, 4, 163 * 1024, sources=32) == (128, 64)
    assert tile(128, 4, 163 * 1024, activation="silu", sources=32) == (128, 128)
    assert tile(128, 5, 163 * 1024) == (128, 64)
    assert tile(128, 4, 99 * 1024) == (128, 64)
    assert tile(192, 4, 163 * 1024) == (128, 64)
    assert tile(128, 4, 163 * 1024, dtype=torch.float32) == (128, 64)
    assert tile(256, 4, 227 * 1024) == (128, 256)
    assert tile(256, 4, 163 * 1024) == (128, 128)
    assert tile(256, 4, 227 * 1024, activation="silu") == (128, 128)
    assert tile(128, 2, 227 * 1024) == (256, 128)
    assert tile(128, 2, 163 * 1024) == (128, 128)
    assert tile(128, 4, 227 * 1024) == (128, 128)
    assert tile(384, 3, 227 * 1024) == (256, 128)
    assert tile(128, 2, 227 * 1024, activation="silu") == (128, 128)
    # four tiles of 256 on three multiprocessors: one has two, three of 128 in place of four
    assert tile(256, 3, 227 * 1024) == (128, 128)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel", "tile"),
    [
        (Shape(2, 16, 8, 16, 256, (3, 3), padding=(1, 1, 1, 1)), "preact_conv_forward", (128, 256)),
        (Shape(4, 40, 9, 15, 256, (1, 1)), "preact_conv_forward", (128, 256)),
        (Shape(2, 256, 8, 16, 16, (3, 3), padding=(1, 1, 1, 1)), "preact_conv_dgrad", (128, 256)),
        (Shape(2, 256, 11, 13, 24, (3, 3), (2, 2), (1, 1, 1, 1)), "preact_conv_dgrad", (128, 256)),
        (Shape(4, 256, 9, 15, 200, (1, 1)), "preact_conv_dgrad", (128, 256)),
        (
            Shape(3, 16, 13, 17, 128, (3, 3), padding=(1, 1, 1, 1)),
            "preact_conv_forward",
            (256, 128),
        ),
        (Shape(5, 40, 9, 15, 128, (1, 1)), "preact_conv_forward", (256, 128)),
        (Shape(2, 128, 16, 16, 40, (3, 3), padding=(1, 1, 1, 1)), "preact_conv_dgrad", (256, 128)),
        (Shape(2, 128, 17, 17, 24, (3, 3), (2, 2), (1, 1, 1, 1)), "preact_conv_dgrad", (256, 128)),
        (Shape(5, 128, 9, 15, 200, (1, 1)), "preact_conv_dgrad", (256, 128)),
    ],
)
def test_large_tiles(emulator, shape, kernel, tile, dtype):
    """On a device with the room: as the reference has it, in whatever order threads and blocks run.

    200 source channels: the weights do not stay.
    """
    truth = run(reference, shape, dtype, "relu", True)
    results = []
    with emulator.recording(2, 227 * 1024) as launches:
        run(emulator.operators, shape, dtype, "relu", True)
    tiles = [conv_tile(launch) for launch in launches if launch.kernel.startswith(kernel)]
    assert tiles and all(one == tile for one in tiles)
    with emulator.device(2, 227 * 1024):
        for seed in range(2):
            emulator.seed(seed)
            results.append(run(emulator.operators, shape, dtype, "relu", True))
    assert_close(results[0], truth, dtype)
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


def test_larger_tiles_of_wgrad_give_no_multiprocessor_more(emulator):
    """In 16 bits, with room, no inputs left over, and as many blocks as keep all busy."""

    def tile(outputs, inputs, multiprocessors, kernel=1, room=163 * 1024, dtype=torch.bfloat16):
        """Outputs, inputs and rows of the kernel of a block."""
        u, g = torch.zeros(2, inputs, 16, 16, dtype=dtype), torch.zeros(2, outputs, 16, 16)
        with emulator.recording(multiprocessors, room) as launches:
            emulator.operators.preact_conv_wgrad(
                *(g.to(dtype), None, None, None, u, None, (kernel, kernel)),
                *((1, 1), (kernel // 2,) * 4, (1, 1), 1, "relu"),
            )
        name = launches[0].kernel
        down, across, m, n, _, rows, _ = map(int, re.search(r"Tile<([\d, ]+)>", name)[1].split(","))
        return down * 16 * m, across * 8 * n, rows

    assert tile(128, 128, 2) == (128, 128, 1)
    assert tile(128, 256, 2) == (128, 256, 1)
    assert tile(128, 384, 3) == (128, 128, 1)
    assert tile(64, 128, 2) == (64, 64, 1)  # half of 128 would be empty
    assert tile(128, 192, 2) == (64, 64, 1)
    assert tile(128, 128, 2, room=99 * 1024) == (64, 64, 1)
    assert tile(128, 128, 2, dtype=torch.float32) == (64, 64, 1)
    # five tiles of 128 on four multiprocessors: one has two, five of 64 in place of eight
    assert tile(128, 640, 4) == (64, 64, 1)
    assert tile(64, 64, 2, kernel=3) == (64, 64, 3)
    assert tile(65, 65, 4, kernel=3) == (64, 64, 3)
    # five blocks of three rows on four multiprocessors: fifteen of a row are four in place of six
    assert tile(64, 320, 4, kernel=3) == (64, 64, 1)
    assert tile(64, 64, 2, kernel=3, dtype=torch.float32) == (64, 64, 1)


def test_statistics_of_a_mean_far_from_zero(emulator):
    """Of what is stored, in float64: the mean to a rounding, the variance to a few.

    A channel is constant: its variance is 0, not what cancelled.
    """
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(4, 8, 16, 16, generator=generator)
    weight = torch.randn(16, 8, 1, 1, generator=generator) / 8**0.5
    residual = 1e4 + torch.randn(4, 16, 16, 16, generator=generator)
    weight[0], residual[:, 0] = 0, 1e4 + 1 / 3
    y, stats, _ = emulator.operators.preact_conv_forward(
        *(u, None, weight, residual, (1, 1), (0,) * 4, (1, 1), 1, "relu", True)
    )
    mean, var = y.double().mean((0, 2, 3)), y.double().var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(stats[0].double(), mean, rtol=2**-23, atol=0)
    torch.testing.assert_close(stats[1, 1:].double(), var[1:], rtol=1e-6, atol=0)
    assert stats[1, 0] == 0


def test_shapes_reach_every_path():
    """Vectors and odd channels, one tile and several, whole images and patches, wide tiles."""
    assert any(shape.filters % 128 == 0 for shape in SHAPES)
    assert any(shape.channels % 128 == 0 for shape in SHAPES)
    assert {shape.channels % 8 == 0 for shape in SHAPES} == {True, False}
    assert any(shape.filters > 64 for shape in SHAPES)
    assert any(isinstance(shape, Shape) and shape.kernel[1] > 3 for shape in SHAPES)
