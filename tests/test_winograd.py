"""3x3 convolutions of stride 1 in float32 on the CPU, which multiply less (csrc/cpu/winograd.h)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import FACTOR, assert_rule, eager, fused, make_case, run
from ops.operands import operands

import fused_preact
from fused_preact import _C

ONE, X3, SAME = (1, 1), (3, 3), (1, 1, 1, 1)
GRID = {  # name: input shape, convolution
    "odd": ((2, 17, 5, 7), (33, X3, ONE, SAME)),
    "unpadded": ((3, 20, 9, 6), (32, X3, ONE, (0, 0, 0, 0))),
    "padded (2, 0, 0, 2)": ((2, 16, 6, 7), (20, X3, ONE, (2, 0, 0, 2))),
    "padded (2, 0, 1, 3)": ((2, 16, 5, 8), (16, X3, ONE, (2, 0, 1, 3))),
    "padded by 4": ((2, 16, 2, 3), (16, X3, ONE, (4, 4, 4, 4))),
    "several images at once": ((21, 16, 4, 3), (24, X3, ONE, SAME)),
    "several bands of an image": ((1, 48, 37, 20), (16, X3, ONE, SAME)),
    "large weights": ((5, 272, 4, 5), (256, X3, ONE, SAME)),
    "large weights, many images": ((70, 260, 4, 2), (256, X3, ONE, SAME)),
    "large weights, unpadded": ((3, 257, 7, 6), (256, X3, ONE, (0, 0, 0, 0))),
}


@pytest.fixture(params=_C.tile_providers(), autouse=True)
def tiles(request):
    """Each provider of the matrix tiles."""
    _C.use_tile_provider(request.param)
    with fused_preact.backend("cpu"):
        yield
    _C.use_tile_provider(_C.tile_providers()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRID)
def test_grid(name, dtype):
    """Each result is at most 1.5x as far from float64 truth as eager's in the same dtype."""
    shape, conv = GRID[name]
    i = list(GRID).index(name)
    case = make_case(dtype, shape, [conv], activation="silu" if i % 2 else "relu", residual=True)
    assert_rule(case, dtype)


@pytest.mark.parametrize("name", GRID)
def test_gradients_alone(name):
    """The gradients of input and weights have the same bits together and apart."""
    o = operands(torch.float32, *GRID[name], deferred=True)
    dy, rest = (o.grad, *o.deferred), (*o.geometry, "relu")
    both = torch.ops.fused_preact.preact_conv_backward(
        *dy, o.weight, o.input, o.affine, o.addend, *rest, True
    )
    g, sums = torch.ops.fused_preact.preact_conv_dgrad(
        *dy, o.weight, o.input, o.affine, o.addend, *rest, True
    )
    dw = torch.ops.fused_preact.preact_conv_wgrad(*dy, o.input, o.affine, o.weight.shape[2:], *rest)
    for together, alone in zip(both, (g, sums, dw), strict=True):
        assert torch.equal(together, alone)


@pytest.mark.parametrize("channels,size", [(16, 32), (64, 8), (160, 8), (512, 4)])
def test_about_as_accurate_as_eager(channels, size):
    """The tolerance rule's 1.5 without its floor: the norm of so many errors needs none."""
    case = make_case(torch.float32, (8, channels, size, size), [(channels, X3, ONE, SAME)])
    results, others = run(case, torch.float32, fused), run(case, torch.float32, eager)
    truth = run(case, torch.float64, eager)
    for name in ("output", "grad input", "grad weight0"):
        ours, theirs = ((x[name].double() - truth[name]).norm() for x in (results, others))
        assert ours <= FACTOR * theirs, f"{name}: {ours:.3g} > {FACTOR} * {theirs:.3g}"


def test_direct_convolution_has_other_bits():
    """The same convolution as one of 5x5, whose outer weights are zero: it is computed directly.

    If all bits were the same, these tests would not have reached what they are for.
    """
    case = make_case(torch.float32, (2, 16, 8, 8), [(16, X3, ONE, SAME)])
    (conv,) = case.convs
    wider = conv._replace(weight=F.pad(conv.weight, (1, 1, 1, 1)), padding=(2, 2, 2, 2))
    ours = run(case, torch.float32, fused)
    direct = run(replace(case, convs=[wider]), torch.float32, fused)
    direct["grad weight0"] = direct["grad weight0"][:, :, 1:-1, 1:-1]
    for name in ("output", "grad input", "grad weight0"):
        assert not torch.equal(ours[name], direct[name])
        torch.testing.assert_close(ours[name], direct[name], rtol=1e-4, atol=1e-4)
