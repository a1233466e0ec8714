"""residual_grad: du = grad + scale * g - scale * rstd * S2 / M * (u - mean) - scale * S1 / M."""

import pytest
from numerics import assert_operator_rule
from operands import DTYPES, FAR_MEANS, NONE, ONE, operands

SHAPES = [(1, 1, 1, 2), (2, 17, 5, 7), (1, 200, 2, 3), (40, 16, 8, 8), (2, 64, 56, 56)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape, with_grad, dtype, operators):
    """The tolerance rule, with and without grad."""
    o = operands(dtype, shape, (shape[1], ONE, ONE, NONE), deferred=True)
    grad = o.residual if with_grad else None
    args = grad, o.addend, o.input, o.affine, o.deferred[2]
    assert_operator_rule(operators, "residual_grad", dtype, *args)


@pytest.mark.parametrize(("dtype", "mean"), FAR_MEANS)
def test_mean_far_from_zero(dtype, mean, operators):
    """At a mean of 1e4 the expanded form B * u + C would lose four digits; this one none."""
    o = operands(dtype, (4, 5, 9, 7), (5, ONE, ONE, NONE), deferred=True, mean=mean)
    args = None, o.addend, o.input, o.affine, o.deferred[2]
    assert_operator_rule(operators, "residual_grad", dtype, *args)
