"""bn_affine: mean, rstd, scale, shift from statistics and the layer's vectors."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 17, 200])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_against_float64(with_weight, with_bias, channels, dtype, operators):
    """Each row within three spacings: an addition, a root, a division, a product."""
    stats = torch.stack((torch.randn(channels), torch.rand(channels) * 4)).to(dtype)
    stats[1, 0] = 0  # a constant channel
    weight = torch.randn(channels, dtype=dtype) if with_weight else None
    bias = torch.randn(channels, dtype=dtype) if with_bias else None
    affine = operators.bn_affine(stats, weight, bias, 1e-5)
    mean, rstd, scale, shift = affine.double()
    exact = (stats[1].double() + 1e-5).rsqrt()
    eps = torch.finfo(dtype).eps
    assert affine.shape == (4, channels) and affine.dtype == dtype
    assert torch.equal(mean, stats[0].double())
    assert torch.equal(shift, torch.zeros(channels).double() if bias is None else bias.double())
    torch.testing.assert_close(rstd, exact, rtol=3 * eps, atol=0)
    gamma = 1 if weight is None else weight.double()
    torch.testing.assert_close(scale, gamma * exact, rtol=3 * eps, atol=0)
