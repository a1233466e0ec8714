"""preact_units_forward and preact_units_backward: units in one call, and layer by layer."""

import itertools
from dataclasses import replace

import pytest
import torch
from operands import units_operands

from fused_preact.units import Chain

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# each unit's convolutions (filters, kernel, stride), shortcut, filters of its projection or None
BOTTLENECK = [(4, 1, 1), (4, 3, 1), (16, 1, 1)]
UNITS = {
    "identity": [(BOTTLENECK, "input", None)],
    "two": [(BOTTLENECK, "input", None)] * 2,
    "activated shortcut": [([(16, 3, 1), (16, 3, 1)], "preact", None)],
    "stage": [
        ([(8, 1, 2), (8, 3, 1), (32, 1, 1)], "preact", 32),
        ([(8, 1, 1), (8, 3, 1), (32, 1, 1)], "input", None),
        ([(32, 3, 1), (8, 3, 2)], "input", 8),
    ],
    "alone": [([(12, 3, 1)], "none", None)],
}
STATISTICS = {
    "batch": lambda k: True,
    "running": lambda k: False,
    "both": lambda k: k % 2 == 0,
}


def assert_same(ours, expected):
    """Tensors and lists of them, bit for bit; of the same layout too."""
    assert len(ours) == len(expected)
    for one, other in zip(ours, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype and one.stride() == other.stride()
        else:
            assert_same(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["preact", "raw"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("name", UNITS)
def test_bits_of_layer_by_layer(name, statistics, raw, dtype):
    """Everything that the single operators give; raw: the first convolution has no BatchNorm."""
    native = torch.ops.fused_preact
    o = units_operands(dtype, UNITS[name], STATISTICS[statistics], raw)
    forward = o.forward(with_stats=True, for_backward=True)
    ours = native.preact_units_forward(*forward)
    assert_same(ours, Chain(native).preact_units_forward(*forward))
    for wanted in itertools.product([True, False], repeat=4):
        backward = o.backward(*ours[1:3], *wanted)
        gradients = native.preact_units_backward(*backward)
        assert_same(gradients, Chain(native).preact_units_backward(*backward))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("raw", [False, True], ids=["preact", "raw"])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("which", ["all", "odd", "even"])
@pytest.mark.parametrize("name", [*UNITS, "uneven"])
def test_bits_of_composed(name, which, statistics, raw, dtype):
    """Where PyTorch's convolution runs some or all of them."""
    native = torch.ops.fused_preact
    o = units_operands(dtype, UNITS.get(name, UNITS["stage"]), STATISTICS[statistics], raw)
    if name == "uneven":  # one more row above each 3x3 of stride 1, one fewer below
        for at, kernel in enumerate(_kernels(o)):
            if kernel == 3 and o.geometries[9 * at] == 1:
                o.geometries[9 * at + 2 : 9 * at + 4] = [2, 0]
    chosen = {"all": (0, 1), "odd": (1,), "even": (0,)}[which]
    o = replace(o, composed=[k % 2 in chosen for k in range(len(o.geometries) // 9)])
    forward = o.forward(with_stats=True, for_backward=True)
    ours = native.preact_units_forward(*forward)
    assert_same(ours, Chain(native).preact_units_forward(*forward))
    for wanted in itertools.product([True, False], repeat=4):
        backward = o.backward(*ours[1:3], *wanted)
        gradients = native.preact_units_backward(*backward)
        assert_same(gradients, Chain(native).preact_units_backward(*backward))


def _kernels(o):
    """Rows of each kernel, in the order of geometries."""
    weights = iter(o.weights)
    for depth, projection in zip(o.depths, o.projections, strict=True):
        yield from (next(weights).shape[2] for _ in range(depth))
        if projection is not None:
            yield projection.shape[2]


@pytest.mark.parametrize("only", range(8))
def test_bits_where_one_gradient_is_wanted(only):
    """Of one convolution's weight, or one BatchNorm's vectors."""
    native = torch.ops.fused_preact
    o = units_operands(torch.float32, UNITS["stage"], STATISTICS["both"], False)
    ours = native.preact_units_forward(*o.forward(with_stats=False, for_backward=True))
    one, none = [k == only for k in range(8)], [False] * 8
    for weights, sums in (one, none), (none, one):
        backward = o.backward(*ours[1:3], False, weights, sums, False)
        gradients = native.preact_units_backward(*backward)
        assert_same(gradients, Chain(native).preact_units_backward(*backward))
        assert gradients[1 if any(weights) else 2][only].numel() > 0
        assert gradients[0].numel() == 0


@pytest.mark.parametrize("operators", [torch.ops.fused_preact, Chain(torch.ops.fused_preact)])
def test_without_backward_nothing_else_is_kept(operators):
    """The same output and statistics."""
    o = units_operands(torch.float32, UNITS["stage"], STATISTICS["both"], False)
    kept = operators.preact_units_forward(*o.forward(with_stats=True, for_backward=True))
    ours = operators.preact_units_forward(*o.forward(with_stats=True, for_backward=False))
    assert ours[1] == ours[2] == [] and len(kept[1]) == 7 and len(kept[2]) == 8
    assert_same((ours[0], ours[3]), (kept[0], kept[3]))


CHANGES = {
    "weights": (2, [], "weights: expected 3, got 0"),
    "eps": (6, [1e-5], "eps: expected 3, got 1"),
    "geometries": (9, [1] * 9, "geometries: expected 27, got 9"),
    "shortcuts": (10, ["both"], "shortcuts: expected 'input', 'preact' or 'none', got 'both'"),
    "composed": (15, [True], "composed: expected 3, got 1"),
}


@pytest.mark.parametrize("argument", CHANGES)
def test_checks_name_the_argument(argument):
    o = units_operands(torch.float32, UNITS["identity"], STATISTICS["batch"], False)
    args = list(o.forward(with_stats=True, for_backward=True))
    position, value, message = CHANGES[argument]
    args[position] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.fused_preact.preact_units_forward(*args)
