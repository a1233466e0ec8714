"""residual_conv_backward: the gradient of a residual sum and those of the convolution in it."""

import re

import pytest
import torch
from numerics import assert_operator_rule
from operands import DTYPES, GEOMETRIES, operands

SUMS = ["1x1", "1x1 stride 2", "1x1 image", "1x1 many rows", "3x3", "3x3 stride 2"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_bits(name, with_residual, dtype, operators):
    """Those of residual_grad and preact_conv_backward one after the other; operands stay."""
    activation = "silu" if with_residual else "relu"
    o = operands(dtype, *GEOMETRIES[name], deferred=True)
    sum_grad = o.residual if with_residual else None, o.grad, *o.deferred
    conv = *o.geometry, activation
    before = [tensor.clone() for tensor in (o.grad, o.residual, o.deferred[0], o.input)]
    dy, g, sums, dw = operators.residual_conv_backward(
        *sum_grad, o.weight, o.input, o.affine, *conv
    )
    expected = operators.residual_grad(*sum_grad)
    assert torch.equal(dy, expected)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    gradients = operators.preact_conv_backward(
        expected, None, None, None, o.weight, o.input, o.affine, None, *conv, True
    )
    for ours, theirs in zip((g, sums, dw), gradients, strict=True):
        assert torch.equal(ours, theirs)
    for tensor, kept in zip((o.grad, o.residual, o.deferred[0], o.input), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_rule(name, dtype, operators):
    """The tolerance rule for all four results."""
    o = operands(dtype, *GEOMETRIES[name], deferred=True)
    args = o.residual, o.grad, *o.deferred, o.weight, o.input, o.affine, *o.geometry, "relu"
    assert_operator_rule(operators, "residual_conv_backward", dtype, *args)


def test_residual_of_another_shape():
    """An error that names it."""
    o = operands(torch.float32, *GEOMETRIES["1x1"], deferred=True)
    args = o.grad, *o.deferred, o.weight, o.input, o.affine, *o.geometry, "relu"
    message = re.escape("residual: expected shape (2, 24, 5, 7), got (2, 23, 5, 7)")
    with pytest.raises(ValueError, match=f"^{message}$"):
        torch.ops.fused_preact.residual_conv_backward(o.residual[:, :-1], *args)
