"""PyTorch's convolution between pointwise kernels, and when the planner takes it."""

import warnings

import pytest
import torch
from numerics import assert_operator_rule, assert_rule, eager, fused, make_case, run
from operands import DTYPES, GEOMETRIES, NONE, ONE, SAME, X3, operands

import fused_preact
from fused_preact import ops, reference
from fused_preact.composed import Composed
from fused_preact.functional import Conv

BOTTLENECK = [(8, ONE, ONE, NONE), (8, X3, ONE, SAME), (16, ONE, ONE, NONE)]
PROJECTION = {"shortcut": "preact", "projection": (16, ONE, ONE, NONE)}


class Widened:
    """Composed operators with dW in the accumulator's dtype, as the other backends have it."""

    def __init__(self, operators):
        self.preact_conv_forward = operators.preact_conv_forward
        self.preact_conv_dgrad = operators.preact_conv_dgrad
        self.operators = operators

    def preact_conv_wgrad(self, grad, *arguments):
        dweight = self.operators.preact_conv_wgrad(grad, *arguments)
        assert dweight.dtype == grad.dtype
        return dweight.to(reference.accumulator(grad.dtype))

    def preact_conv_backward(self, grad, *arguments):
        g, sums, dweight = self.operators.preact_conv_backward(grad, *arguments)
        assert dweight.dtype == grad.dtype
        return g, sums, dweight.to(reference.accumulator(grad.dtype))

    def residual_conv_backward(self, residual, grad, *arguments):
        *others, dweight = self.operators.residual_conv_backward(residual, grad, *arguments)
        assert dweight.dtype == grad.dtype
        return *others, dweight.to(reference.accumulator(grad.dtype))


@pytest.fixture
def composed():
    return Widened(Composed(torch.ops.fused_preact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, composed):
    """The tolerance rule for each operator; options change from one to the next."""
    i = list(GEOMETRIES).index(name)
    o = operands(dtype, *GEOMETRIES[name], deferred=i % 3 > 0)
    activation = "silu" if i % 2 else "relu"
    residual, addend = (o.residual if i % 3 else None), (o.addend if i % 4 > 1 else None)
    affine = o.affine if i % 5 else None
    rest = *o.geometry, activation
    forward = o.input, affine, o.weight, residual, *rest, False
    dgrad = o.grad, *o.deferred, o.weight, o.input, affine, addend, *rest, True
    wgrad = o.grad, *o.deferred, o.input, affine, list(o.weight.shape[2:]), *rest
    assert_operator_rule(composed, "preact_conv_forward", dtype, *forward)
    assert_operator_rule(composed, "preact_conv_dgrad", dtype, *dgrad)
    if affine is not None:
        frozen = True, False, True, o.addend
        assert_operator_rule(composed, "preact_conv_dgrad", dtype, *dgrad[:-1], *frozen)
    assert_operator_rule(composed, "preact_conv_wgrad", dtype, *wgrad)
    assert_operator_rule(composed, "preact_conv_backward", dtype, *dgrad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_residual_sum(name, dtype, composed):
    """The tolerance rule for the convolution at a unit's end."""
    o = operands(dtype, *GEOMETRIES[name], deferred=True)
    args = o.residual, o.grad, *o.deferred, o.weight, o.input, o.affine, *o.geometry, "relu"
    assert_operator_rule(composed, "residual_conv_backward", dtype, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_unit(training, dtype):
    """A unit of composed convolutions keeps the rule, statistics handed from one to the next.

    Not channel by channel, for the reason in test_preact_unit.
    """
    case = make_case(dtype, (4, 16, 8, 7), BOTTLENECK, training=training, **PROJECTION)
    with fused_preact.backend("composed"):
        assert_rule(case, dtype, by_channel=False)


@pytest.mark.parametrize("options", [{"dilation": (2, 2)}, {"groups": 2}], ids=str)
def test_general_convolutions(options):
    """What no kernel does is composed under "auto": the rule, and nothing to warn of."""
    case = make_case(torch.float32, convs=[(8, X3, ONE, SAME)])
    (conv,) = case.convs
    weight = conv.weight[:, :: options.get("groups", 1)].contiguous()
    case.convs = [conv._replace(weight=weight, **options)]
    case.grad_output = torch.randn(eager(case.to(torch.float64)).shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_rule(case, torch.float32)


@pytest.fixture
def wide_from_nine_taps(monkeypatch):
    """The 3x3 convolutions of BOTTLENECK count as wide, its 1x1 do not."""
    wide = dict.fromkeys((torch.float32, torch.bfloat16), 8 * 8 * 9)
    monkeypatch.setattr(ops, "_COMPOSED_FROM", wide)
    monkeypatch.setattr(ops, "_multiplies_by_onednn", lambda: True)


def test_plan_by_width(wide_from_nine_taps, called):
    """A unit takes each convolution from where it is faster, backward like forward."""
    case = make_case(torch.float32, (4, 16, 8, 7), BOTTLENECK, **PROJECTION)
    assert_rule(case, torch.float32)
    case = case.to(torch.float32)
    called.clear()
    output = fused(case)
    assert called.count("preact_conv_forward") == 3  # two 1x1 and the projection
    called.clear()
    output.backward(case.grad_output)
    assert called.count("preact_conv_backward") == 2
    assert called.count("preact_conv_dgrad") == called.count("preact_conv_wgrad") == 1


def test_bfloat16_is_composed_where_it_is_multiplied(wide_from_nine_taps, monkeypatch):
    """By instructions for it: without, PyTorch's convolution takes several times as long."""
    conv = Conv(torch.empty(8, 8, 3, 3))
    input = torch.empty(1, 8, 4, 4, dtype=torch.bfloat16)
    for multiplies in (True, False):
        monkeypatch.setattr(ops, "_multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        assert ops.plan_convs(torch.ops.fused_preact, [conv], input) == [multiplies]


def test_wide_is_fused_by_our_own_tile(wide_from_nine_taps, monkeypatch):
    """Only where the kernels multiply by oneDNN's tile does width decide."""
    monkeypatch.setattr(ops, "_multiplies_bfloat16", lambda: True)
    conv = Conv(torch.empty(8, 8, 3, 3))
    input = torch.empty(1, 8, 4, 4, dtype=torch.bfloat16)
    for onednn in (True, False):
        monkeypatch.setattr(ops, "_multiplies_by_onednn", lambda onednn=onednn: onednn)
        assert ops.plan_convs(torch.ops.fused_preact, [conv], input) == [onednn]


@pytest.mark.parametrize(
    ("dtype", "side", "composed"),
    [
        (torch.float32, 5, False),
        (torch.float32, 7, True),
        (torch.bfloat16, 7, True),
        (torch.float64, 7, False),
    ],
    ids=str,
)
def test_large_kernels_are_composed(dtype, side, composed, monkeypatch):
    """Where PyTorch has fast convolutions."""
    monkeypatch.setattr(ops, "_multiplies_bfloat16", lambda: True)
    input = torch.empty(1, 8, 9, 9, dtype=dtype)
    conv = Conv(torch.empty(8, 8, side, side))
    assert ops.plan_convs(torch.ops.fused_preact, [conv], input) == [composed]


def test_forced_kernels_stay(wide_from_nine_taps, called):
    """Who asks for a backend gets its kernels, whatever the width."""
    case = make_case(torch.float32, (4, 16, 8, 7), BOTTLENECK, **PROJECTION).to(torch.float32)
    with fused_preact.backend("cpu"):
        fused(case)
    assert called.count("preact_conv_forward") == 4


def test_compiled(wide_from_nine_taps, compiled):
    """No graph break, the same bits."""
    case = make_case(torch.float32, (4, 16, 8, 7), BOTTLENECK, **PROJECTION)
    expected = run(case, torch.float32, fused)
    results = run(case, torch.float32, compiled(fused))
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_reference_is_never_composed():
    """Whose every device and dtype is the point."""
    conv = Conv(torch.empty(1024, 1024, 3, 3), dilation=(2, 2), groups=2)
    assert ops.plan_convs(reference, [conv], torch.empty(1, 2048, 1, 1)) == [False]


def test_errors_of_the_convolution_are_passed_on():
    """What PyTorch says, memory that is not there for instance, reaches the user."""
    input = torch.ones(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    o = [input, None, [torch.ones(8, 6, 3, 3)], [None], [None], [None], [0.0], [None], [1]]
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 4]  # groups do not divide the channels
    rest = geometry, ["none"], "relu", False, False, False, [True]
    with pytest.raises(RuntimeError, match="channels"):
        torch.ops.fused_preact.preact_units_forward(*o, *rest)
