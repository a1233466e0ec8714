"""preact_conv_forward: y = conv(act(z), weight) + residual, and y's statistics."""

import pytest
import torch
from numerics import assert_operator_rule
from operands import DTYPES, GEOMETRIES, ONE, SAME, X3, operands

from fused_preact import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, operators):
    """The tolerance rule, every second one with SiLU, every third without residual."""
    o, i = operands(dtype, *GEOMETRIES[name]), list(GEOMETRIES).index(name)
    residual = o.residual if i % 3 else None
    activation = "silu" if i % 2 else "relu"
    args = o.input, o.affine, o.weight, residual, *o.geometry, activation, False
    assert_operator_rule(operators, "preact_conv_forward", dtype, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_affine", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2"])
def test_options(name, activation, with_residual, with_affine, dtype, operators):
    """The tolerance rule for each combination of what may be None."""
    o = operands(dtype, *GEOMETRIES[name])
    affine = o.affine if with_affine else None
    residual = o.residual if with_residual else None
    args = o.input, affine, o.weight, residual, *o.geometry, activation, False
    assert_operator_rule(operators, "preact_conv_forward", dtype, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [5, 64, 70])
@pytest.mark.parametrize("kernel", [ONE, X3], ids=str)
def test_weights_lie_anywhere(kernel, filters, dtype, operators):
    """In NCHW memory, or as part of a wider weight, they give the same bits as in channels_last."""
    o = operands(dtype, (2, 6, 5, 7), (filters, kernel, ONE, SAME))
    wider = torch.cat((o.weight, o.weight), 1).contiguous(memory_format=torch.channels_last)
    odd = torch.cat((wider, o.weight[:, :1]), 1).contiguous(memory_format=torch.channels_last)
    rest = None, *o.geometry, "relu", False
    expected, _, _ = operators.preact_conv_forward(o.input, o.affine, o.weight, *rest)
    for weight in o.weight.contiguous(), wider[:, :6], odd[:, :6]:
        output, _, _ = operators.preact_conv_forward(o.input, o.affine, weight, *rest)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_statistics_are_those_of_the_output(name, dtype, operators):
    """with_stats changes no bit of the output and gives its statistics as it was written.

    Against float64 over the rounded output: 8 spacings of the accumulator, the merging of tiles;
    in float64, whose own error is as large as what it judges, 64. There tiles' means are rounded as
    coarsely as the result, which the variance feels by the deviation.
    """
    o = operands(dtype, *GEOMETRIES[name])
    args = o.input, o.affine, o.weight, o.residual, *o.geometry, "relu"
    output, stats, no_affine = operators.preact_conv_forward(*args, True)
    plain, none, _ = operators.preact_conv_forward(*args, False)
    mean, var = reference.bn_stats(output.double())
    eps = torch.finfo(stats.dtype).eps * (8 if dtype == torch.float64 else 1)
    spacing = eps * (mean.abs() + var.sqrt())
    assert torch.equal(output, plain) and none.shape == (2, 0) and no_affine.shape == (4, 0)
    assert ((stats[0].double() - mean).abs() <= 8 * spacing).all()
    merged = spacing / 8 * var.sqrt() if dtype == torch.float64 else 0
    assert ((stats[1].double() - var).abs() <= 16 * eps * var + spacing.square() + merged).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_far_from_zero(dtype, operators):
    """The rule at a mean of 1e4 (bfloat16: 100), and for statistics of an output with that mean."""
    mean = 100 if dtype == torch.bfloat16 else 1e4
    o = operands(dtype, (4, 5, 9, 7), (6, X3, (1, 1), SAME), mean=mean)
    args = o.input, o.affine, o.weight, o.residual, *o.geometry, "relu", False
    assert_operator_rule(operators, "preact_conv_forward", dtype, *args)
    residual = (o.residual + mean).contiguous(memory_format=torch.channels_last)
    output, stats, _ = operators.preact_conv_forward(
        o.input, o.affine, o.weight, residual, *o.geometry, "relu", True
    )
    exact = reference.bn_stats(output.double())
    torch.testing.assert_close(stats.double(), exact, rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_vectors", [True, False])
def test_next_affine_is_bn_affine_of_the_statistics(with_vectors, dtype, operators):
    """Bit for bit what bn_affine makes of them, and nothing else changes."""
    o = operands(dtype, *GEOMETRIES["3x3 stride 2"])
    args = o.input, o.affine, o.weight, o.residual, *o.geometry, "relu", True, False
    vectors = torch.randn(2, o.weight.shape[0]).to(o.affine.dtype) if with_vectors else (None, None)
    output, stats, affine = operators.preact_conv_forward(*args, *vectors, 1e-3)
    plain, same, _ = operators.preact_conv_forward(*args)
    assert torch.equal(output, plain) and torch.equal(stats, same)
    assert torch.equal(affine, operators.bn_affine(stats, *vectors, 1e-3))


def test_padding_is_zero_after_the_activation(operators):
    """A padded position adds nothing, not act(shift)."""
    affine = torch.tensor([[0.0], [1.0], [1.0], [5.0]])  # z = u + 5
    weight = torch.ones(1, 1, 3, 3)
    args = (torch.zeros(1, 1, 1, 1), affine, weight, None, [1, 1], [1, 1, 1, 1], [1, 1], 1, "relu")
    output, *_ = operators.preact_conv_forward(*args, False)
    assert output.item() == 5
