"""A mean far from zero costs nothing: every operator subtracts it before it multiplies.

With values on a grid of 2^-10 a shift by 8192 is exact in float32, and so is u - mean. Whoever
expands scale * (u - mean) to scale * u - scale * mean loses ten bits to it.
"""

import pytest
import torch

from fused_preact import reference

SHIFT = 8192.0
CONVOLUTION = [1, 1], [1, 1, 1, 1], [1, 1], 1


@pytest.fixture(params=["reference", "backend"])
def functions(request, operators):
    return reference if request.param == "reference" else operators


def _grid(*shape):
    return (torch.randn(shape).clamp(-4, 4) * 1024).round() / 1024


def _channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def _calls(functions, activation):
    """Each operator that normalises, as a function of activations u, their affine, and g."""
    u0 = _channels_last(torch.randn(4, 3, 9, 7))
    dy = _channels_last(torch.randn(4, 6, 9, 7))
    weight, weight_before = torch.randn(6, 5, 3, 3), torch.randn(5, 3, 3, 3)
    sums = torch.randn(2, 5) * 16
    rest = *CONVOLUTION, activation
    no = None, None, None
    f = functions
    return {
        "bn_relu_forward": lambda u, affine, g: f.bn_relu_forward(u, affine, activation),
        "bn_relu_backward": lambda u, affine, g: f.bn_relu_backward(g, u, affine, activation, True),
        "preact_conv_forward": lambda u, affine, g: f.preact_conv_forward(
            u, affine, weight, None, *rest, False
        ),
        "preact_conv_dgrad": lambda u, affine, g: f.preact_conv_dgrad(
            dy, *no, weight, u, affine, g, *rest, True
        ),
        "preact_conv_wgrad": lambda u, affine, g: f.preact_conv_wgrad(
            dy, *no, u, affine, [3, 3], *rest
        ),
        "preact_conv_dgrad, deferred": lambda u, affine, g: f.preact_conv_dgrad(
            g, u, affine, sums, weight_before, u0, None, None, *rest, False
        ),
        "preact_conv_wgrad, deferred": lambda u, affine, g: f.preact_conv_wgrad(
            g, u, affine, sums, u0, None, [3, 3], *rest
        ),
        "residual_grad": lambda u, affine, g: f.residual_grad(None, g, u, affine, sums),
    }


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", _calls(reference, "relu"))
def test_shift_changes_no_bit(name, activation, functions):
    """The same bits for u and for u + 8192, mean and mean + 8192."""
    u, g = _channels_last(_grid(4, 5, 9, 7)), _channels_last(torch.randn(4, 5, 9, 7))
    affine = torch.stack((_grid(5), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)))
    shifted = affine.clone()
    shifted[0] += SHIFT
    call = _calls(functions, activation)[name]
    results, expected = call(u + SHIFT, shifted, g), call(u, affine, g)
    if isinstance(results, torch.Tensor):
        results, expected = [results], [expected]
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)
