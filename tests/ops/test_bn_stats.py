"""bn_stats: mean and biased variance of each channel."""

import pytest
import torch
from operands import DTYPES

SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 2, 3),
    (2, 17, 5, 7),
    (3, 65, 33, 9),
    (1, 200, 1, 1),
    (40, 16, 8, 8),
    (2, 64, 56, 56),
]


def _exact(input):
    # around a value of each channel, so that a mean far from zero cancels nothing
    shift = input[:1, :, :1, :1].double()
    var, mean = torch.var_mean(input.double() - shift, (0, 2, 3), correction=0)
    return torch.stack((mean + shift.flatten(), var))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_against_float64(shape, mean, dtype, operators):
    """Within 4 spacings of the accumulator of float64's mean and variance.

    The mean's error counts against |mean| + deviation, since its sum may cancel; the variance's
    against the variance, plus the square of the mean's own rounding. float64 is summed and merged
    in float64 itself: 8 times the spacings, and tiles' means are rounded as coarsely as the result,
    which the variance feels by the deviation.
    """
    input = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
    input = input.contiguous(memory_format=torch.channels_last)
    stats, exact = operators.bn_stats(input), _exact(input)
    eps = torch.finfo(stats.dtype).eps * (8 if dtype == torch.float64 else 1)
    error = (stats.double() - exact).abs()
    spacing = eps * (exact[0].abs() + exact[1].sqrt())
    merged = spacing / 8 * exact[1].sqrt() if dtype == torch.float64 else 0
    assert stats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (error[0] <= 4 * spacing).all()
    assert (error[1] <= 16 * eps * exact[1] + spacing.square() + merged).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_constant_channel(value, dtype, operators):
    """A variance of 0, up to the square of the mean's rounding, and never negative."""
    input = torch.full((4, 5, 9, 7), value).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, var = operators.bn_stats(input)
    eps = torch.finfo(mean.dtype).eps
    exact = input[0, 0, 0, 0].double()
    assert ((mean.double() - exact).abs() <= eps * exact.abs()).all()
    assert (var >= 0).all() and (var <= (2 * eps * exact).square()).all()


def test_not_finite(operators):
    """An infinity or a NaN spoils its own channel and no other."""
    input = torch.randn(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    input[0, 1, 2, 2], input[1, 3, 0, 0] = float("inf"), float("nan")
    stats = operators.bn_stats(input)
    assert stats.isfinite().all(0).tolist() == [True, False, True, False, True]
