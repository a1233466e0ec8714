"""Autocast on the CPU with float32 parameters, against eager's autocast."""

import pytest
import torch
from numerics import DRAWS, Case, assert_close, eager, expect, fused, make_case, run

DTYPES = (torch.bfloat16, torch.float16)
ONE, TWO, X3, NONE, SAME = (1, 1), (2, 2), (3, 3), (0, 0, 0, 0), (1, 1, 1, 1)

UNITS = {
    "preact_conv2d": ([(16, X3, ONE, SAME)], {"residual": True}),
    "basic": (
        [(16, X3, TWO, SAME), (16, X3, ONE, SAME)],
        {"shortcut": "preact", "projection": (16, ONE, TWO, NONE)},
    ),
    "bottleneck": (
        [(8, ONE, ONE, NONE), (8, X3, ONE, SAME), (16, ONE, ONE, NONE)],
        {"shortcut": "input"},
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:backend")


def _case(name: str) -> Case:
    convs, options = UNITS[name]
    return make_case(torch.float32, (4, 16, 9, 7), convs, activation="silu", **options)


def _under_autocast(unit, dtype):
    def call(case):
        with torch.autocast("cpu", dtype):
            return unit(case)

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNITS)
def test_rule(name, dtype, backend_name):
    """The tolerance rule, eager being PyTorch's layers under the same autocast.

    Those leave the first input and its BatchNorm in float32, where the fused unit rounds the
    input first, once; that rounding is one more of those that make up the floor. Backward runs
    outside autocast, as it should. Whole tensors only: the extra rounding is a channel's luck.
    """
    case = _case(name)
    rounding = torch.finfo(dtype).eps, torch.finfo(dtype).eps
    ours = run(case, torch.float32, _under_autocast(fused, dtype))
    theirs = run(case, torch.float32, _under_autocast(eager, dtype))
    assert ours["output"].dtype == dtype
    for name, value in ours.items():
        if name.startswith("grad"):
            assert value.dtype == torch.float32, name
    theirs["output"] = theirs["output"].to(dtype)
    truth = run(case, torch.float64, eager)
    draws = [run(case, torch.float64, eager, rounding) for _ in range(DRAWS)]
    assert_close(ours, expect(theirs, truth, draws, dtype), by_channel=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bn_relu_keeps_its_input_dtype(dtype, backend_name):
    """BatchNorm is no operation that autocast lowers: float32 stays float32, bit for bit."""
    case = make_case(torch.float32)
    expected = run(case, torch.float32, fused)
    for name, value in run(case, torch.float32, _under_autocast(fused, dtype)).items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name


def test_float64_is_left_alone(backend_name):
    """Autocast does not lower float64, as in PyTorch."""
    case = _case("basic")
    ours = run(case, torch.float64, _under_autocast(fused, torch.bfloat16))
    assert all(value.dtype == torch.float64 for value in ours.values())


def test_backward_inside_autocast(backend_name):
    """backward() within the autocast region gives the same bits as outside."""
    case, expected = _case("bottleneck"), None
    for inside in (False, True):
        leaves = case.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            output = fused(leaves)
            if inside:
                output.backward(leaves.grad_output.to(output.dtype))
        if not inside:
            output.backward(leaves.grad_output.to(output.dtype))
            expected = {name: leaf.grad for name, leaf in leaves.leaves().items()}
    for name, leaf in leaves.leaves().items():
        assert torch.equal(leaf.grad, expected[name]), name
