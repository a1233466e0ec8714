"""preact_conv_backward: dgrad and wgrad of the same operands, in one call."""

import itertools

import pytest
import torch
from operands import DEFERRED, DTYPES, GEOMETRIES, operands

OPTIONS = list(itertools.product(DEFERRED, (True, False), (True, False), (True, False)))


def _assert_same_bits(operators, o, affine, addend, activation, with_sums, *frozen):
    dy, conv = (o.grad, *o.deferred), (*o.geometry, activation)
    g, sums, dw = operators.preact_conv_backward(
        *dy, o.weight, o.input, affine, addend, *conv, with_sums, *frozen
    )
    rest = o.weight, o.input, affine, addend, *conv, with_sums, *frozen
    expected = operators.preact_conv_dgrad(*dy, *rest)
    assert torch.equal(g, expected[0])
    assert torch.equal(sums, expected[1])
    expected = operators.preact_conv_wgrad(*dy, o.input, affine, o.weight.shape[2:], *conv)
    assert torch.equal(dw, expected)
    assert dw.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype, operators):
    """The bits of both operators; activation, addend and deferral change from one to the next."""
    i = list(GEOMETRIES).index(name)
    o = operands(dtype, *GEOMETRIES[name], deferred=i % 3 > 0)
    addend = o.addend if i % 4 > 1 else None
    _assert_same_bits(operators, o, o.affine, addend, "silu" if i % 2 else "relu", True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deferred,with_affine,with_addend,with_sums", OPTIONS)
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_options(name, deferred, with_affine, with_addend, with_sums, dtype, operators):
    """The bits of both operators for each combination of what may be None."""
    o = operands(dtype, *GEOMETRIES[name], deferred=deferred)
    affine = o.affine if with_affine else None
    addend = o.addend if with_addend else None
    _assert_same_bits(operators, o, affine, addend, "relu", with_sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen(dtype, operators):
    """Likewise with frozen statistics."""
    o = operands(dtype, *GEOMETRIES["3x3"])
    _assert_same_bits(operators, o, o.affine, None, "relu", True, False, True, o.addend)
