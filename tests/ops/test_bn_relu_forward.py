"""bn_relu_forward: h = act(scale * (u - mean) + shift)."""

import pytest
import torch
from numerics import assert_operator_rule
from operands import DTYPES, NONE, ONE, operands

SHAPES = [(1, 1, 1, 2), (2, 17, 5, 7), (1, 200, 2, 3), (40, 16, 8, 8), (2, 64, 56, 56)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape, activation, dtype, operators):
    """The tolerance rule against reference in float64."""
    o = operands(dtype, shape, (1, ONE, ONE, NONE))
    assert_operator_rule(operators, "bn_relu_forward", dtype, o.input, o.affine, activation)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_mean_far_from_zero(activation, operators):
    """At a mean of 1e4 the centred affine loses nothing: u - mean is exact in float32."""
    o = operands(torch.float32, (4, 5, 9, 7), (1, ONE, ONE, NONE), mean=1e4)
    assert_operator_rule(operators, "bn_relu_forward", torch.float32, o.input, o.affine, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_far_out(dtype, operators):
    """No overflow at z of +-1e4 (exp would), and the limits are z and 0."""
    input = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], dtype=dtype).view(1, 1, 1, 5)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    affine = torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=acc)
    h = operators.bn_relu_forward(input, affine, "silu")
    torch.testing.assert_close(h, input.clamp(min=0), rtol=0, atol=1e-30)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_nan_passes(activation, operators):
    """NaN stays NaN, as in torch.relu: a diverged run must show."""
    input = torch.full((1, 3, 2, 2), float("nan"))
    affine = torch.ones(4, 3)
    assert operators.bn_relu_forward(input, affine, activation).isnan().all()


@pytest.mark.parametrize("channels", [1, 7, 16, 31, 32, 33, 64, 70, 160])
def test_rounds_to_nearest_even(channels):
    """On the CPU, exactly as PyTorch, for ties, beside them, and numbers that are none.

    u + shift is exact in float32 and lies between two bfloat16 numbers, halfway or 2^-20 off it;
    how many are rounded together depends on the channels, also how a row ends.
    """
    u = torch.cat(
        (torch.arange(128.0, 256) / 128, torch.tensor([torch.inf, -torch.inf, torch.nan]))
    )
    input = u.bfloat16().view(1, 1, 1, -1).expand(1, channels, 1, -1)
    input = input.contiguous(memory_format=torch.channels_last)
    beside = torch.tensor([2**-8, 2**-8 - 2**-20, 2**-8 + 2**-20, 0.0, -3.0])
    shift = beside.repeat(channels)[:channels]
    affine = torch.stack((torch.zeros(channels), *torch.ones(2, channels), shift))
    h = torch.ops.fused_preact.bn_relu_forward(input, affine, "relu")
    expected = (input.float() + shift.view(-1, 1, 1)).relu().bfloat16()
    torch.testing.assert_close(h, expected, rtol=0, atol=0, equal_nan=True)
