"""preact_conv_dgrad: g = (dgrad(dy, weight) + addend) * act'(z), S1, S2; dy may be deferred."""

import itertools

import pytest
import torch
from numerics import assert_operator_rule
from operands import DEFERRED, DTYPES, FAR_MEANS, GEOMETRIES, SAME, X3, operands


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, operators):
    """The tolerance rule; activation, addend and deferral change from one to the next."""
    i = list(GEOMETRIES).index(name)
    o = operands(dtype, *GEOMETRIES[name], deferred=i % 3 > 0)
    addend = o.addend if i % 4 > 1 else None
    activation = "silu" if i % 2 else "relu"
    args = o.grad, *o.deferred, o.weight, o.input, o.affine, addend, *o.geometry, activation, True
    assert_operator_rule(operators, "preact_conv_dgrad", dtype, *args)


OPTIONS = list(itertools.product(DEFERRED, (True, False), (True, False), (True, False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deferred,with_affine,with_addend,with_sums", OPTIONS)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2"])
def test_options(name, deferred, with_affine, with_addend, with_sums, dtype, operators):
    """The tolerance rule for each combination of what may be None."""
    o = operands(dtype, *GEOMETRIES[name], deferred=deferred)
    affine = o.affine if with_affine else None
    addend = o.addend if with_addend else None
    args = o.grad, *o.deferred, o.weight, o.input, affine, addend, *o.geometry, "silu", with_sums
    assert_operator_rule(operators, "preact_conv_dgrad", dtype, *args)


FROZEN = list(itertools.product((True, False), (True, False), (True, False)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual,with_addend,with_sums", FROZEN)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2"])
def test_frozen(name, with_residual, with_addend, with_sums, dtype, operators):
    """The tolerance rule where du = residual + scale * g is finished at once."""
    o = operands(dtype, *GEOMETRIES[name], deferred=with_addend)
    addend = o.addend if with_addend else None
    residual = o.input * 2 if with_residual else None
    rest = addend, *o.geometry, "relu", with_sums, False, True, residual
    args = o.grad, *o.deferred, o.weight, o.input, o.affine, *rest
    assert_operator_rule(operators, "preact_conv_dgrad", dtype, *args)


@pytest.mark.parametrize(("dtype", "mean"), FAR_MEANS)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("deferred", DEFERRED)
def test_mean_far_from_zero(deferred, activation, dtype, mean, operators):
    """Input and output at a mean of 1e4: no digit is lost to it."""
    o = operands(dtype, (4, 5, 9, 7), (6, X3, (1, 1), SAME), deferred=deferred, mean=mean)
    args = o.grad, *o.deferred, o.weight, o.input, o.affine, None, *o.geometry, activation, True
    assert_operator_rule(operators, "preact_conv_dgrad", dtype, *args)


def test_pixels_that_no_output_reads(operators):
    """Where the stride skips a pixel its gradient is the addend's alone, or exactly 0."""
    o = operands(torch.float32, (2, 8, 6, 6), (4, (1, 1), (3, 3), (0, 0, 0, 0)))
    rest = o.input, None, None, *o.geometry, "relu", False
    g, _ = operators.preact_conv_dgrad(o.grad, None, None, None, o.weight, *rest)
    read = torch.zeros(6, 6, dtype=torch.bool)
    read[::3, ::3] = True
    assert (g[:, :, ~read] == 0).all() and (g[:, :, read] != 0).all()
