"""Tiles of all sizes give the same results, and the same twice."""

from contextlib import ExitStack

import pytest
import torch
from numerics import assert_rule, fused, make_case, run

import fused_preact
from fused_preact.triton import config, reduce

POINTWISE = {"TILE": 64, "BLOCK_C": 8}
SMALL = {
    "bn_stats": POINTWISE,
    "bn_relu_forward": POINTWISE,
    "bn_relu_backward": POINTWISE,
    "residual_grad": POINTWISE,
    "preact_conv_forward": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "preact_conv_dgrad": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "preact_conv_wgrad": {"BLOCK_P": 16, "BLOCK_K": 16, "BLOCK_C": 16, "PROGRAMS": 16},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles of a small tensor, merged by fours."""
    monkeypatch.setattr(reduce, "FAN_IN", 4)
    with ExitStack() as stack:
        stack.enter_context(fused_preact.backend("triton"))
        for operator, options in SMALL.items():
            stack.enter_context(config.trial(operator, options))
        yield


def _unit(dtype, **options):
    convs = [(17, (3, 3), (2, 2), (1, 1, 1, 1)), (20, (1, 1), (1, 1), (0, 0, 0, 0))]
    projection = 20, (1, 1), (2, 2), (0, 0, 0, 0)
    return make_case(
        dtype, (2, 20, 7, 5), convs, shortcut="preact", projection=projection, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_tiles(dtype):
    """A unit within the tolerance rule where every loop and every merge runs more than once."""
    assert_rule(_unit(dtype, activation="silu"), dtype)


def test_mean_far_from_zero():
    """Likewise at a mean of 1e4 with deviation 1: tiles' means are merged without cancellation."""
    assert_rule(_unit(torch.float32, mean=1e4), torch.float32)


def test_twice():
    """Two runs are bit-identical."""
    first, second = (run(_unit(torch.float32), torch.float32, fused) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
