"""bn_relu_backward: g = grad * act'(z), S1 = sum g, S2 = sum g * (u - mean) * rstd."""

import pytest
import torch
from numerics import assert_operator_rule
from operands import DTYPES, NONE, ONE, operands

SHAPES = [(1, 1, 1, 2), (2, 17, 5, 7), (1, 200, 2, 3), (40, 16, 8, 8), (2, 64, 56, 56)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape, with_sums, activation, dtype, operators):
    """The tolerance rule against reference in float64; no sums where nobody asks."""
    o = operands(dtype, shape, (1, ONE, ONE, NONE))
    args = o.addend, o.input, o.affine, activation, with_sums
    assert_operator_rule(operators, "bn_relu_backward", dtype, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_frozen(shape, with_sums, with_residual, dtype, operators):
    """The tolerance rule where du = residual + scale * g is finished at once."""
    o = operands(dtype, shape, (shape[1], ONE, ONE, NONE))
    residual = o.residual if with_residual else None
    args = o.addend, o.input, o.affine, "relu", with_sums, True, residual
    assert_operator_rule(operators, "bn_relu_backward", dtype, *args)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_mean_far_from_zero(activation, operators):
    """At a mean of 1e4, S2 is as good as at 0: u is centred before it is multiplied."""
    o = operands(torch.float32, (4, 5, 9, 7), (1, ONE, ONE, NONE), mean=1e4)
    args = o.addend, o.input, o.affine, activation, True
    assert_operator_rule(operators, "bn_relu_backward", torch.float32, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_at_zero_and_far_out(dtype, operators):
    """relu'(0) = 0 as in PyTorch; silu' is 0, 1/2, 1 at -1e4, 0, 1e4, and never NaN."""
    input = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype).view(1, 1, 1, 3)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    affine = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=acc)
    for activation, slopes in ("relu", [0, 0, 1]), ("silu", [0, 0.5, 1]):
        g, _ = operators.bn_relu_backward(torch.ones_like(input), input, affine, activation, True)
        expected = torch.tensor(slopes, dtype=dtype)
        torch.testing.assert_close(g.flatten(), expected, rtol=0, atol=1e-30)
