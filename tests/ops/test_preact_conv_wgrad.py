"""preact_conv_wgrad: dW = wgrad(act(z), dy); h is computed again, dy may be deferred."""

import itertools

import pytest
import torch
from numerics import assert_operator_rule
from operands import DEFERRED, DTYPES, FAR_MEANS, GEOMETRIES, SAME, X3, operands


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, operators):
    """The tolerance rule; activation and deferral change from one to the next."""
    i = list(GEOMETRIES).index(name)
    o = operands(dtype, *GEOMETRIES[name], deferred=i % 3 > 0)
    activation = "silu" if i % 2 else "relu"
    rest = o.input, o.affine, o.weight.shape[2:], *o.geometry, activation
    assert_operator_rule(operators, "preact_conv_wgrad", dtype, o.grad, *o.deferred, *rest)


OPTIONS = list(itertools.product(DEFERRED, (True, False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deferred,with_affine", OPTIONS)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2"])
def test_options(name, deferred, with_affine, dtype, operators):
    """The tolerance rule for each combination of what may be None."""
    o = operands(dtype, *GEOMETRIES[name], deferred=deferred)
    affine = o.affine if with_affine else None
    rest = o.input, affine, o.weight.shape[2:], *o.geometry, "silu"
    assert_operator_rule(operators, "preact_conv_wgrad", dtype, o.grad, *o.deferred, *rest)


@pytest.mark.parametrize(("dtype", "mean"), FAR_MEANS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("deferred", DEFERRED)
def test_mean_far_from_zero(deferred, activation, dtype, mean, operators):
    """Input and output at a mean of 1e4: no digit is lost to it."""
    o = operands(dtype, (4, 5, 9, 7), (6, X3, (1, 1), SAME), deferred=deferred, mean=mean)
    rest = o.input, o.affine, o.weight.shape[2:], *o.geometry, activation
    assert_operator_rule(operators, "preact_conv_wgrad", dtype, o.grad, *o.deferred, *rest)


def test_bfloat16_gradient_is_float32(operators):
    """Weight gradients come in the accumulator's dtype: a parameter in float32 loses nothing."""
    o = operands(torch.bfloat16, *GEOMETRIES["3x3"])
    rest = o.input, o.affine, o.weight.shape[2:], *o.geometry, "relu"
    assert operators.preact_conv_wgrad(o.grad, *o.deferred, *rest).dtype == torch.float32
