"""torch.library.opcheck on every operator: schema, fake kernel, compilation with dynamic shapes.

The autograd test is left out: gradients come from the Functions of functional.py, the operators
have no formula of their own.
"""

from dataclasses import replace

import pytest
import torch
from operands import DEFERRED, GEOMETRIES, operands, units_operands

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def check(request):
    def check(name, *args):
        operator = getattr(torch.ops.fused_preact, name).default
        args = [list(arg) if isinstance(arg, tuple | torch.Size) else arg for arg in args]
        torch.library.opcheck(operator, args, test_utils=TESTS)

    check.dtype = request.param
    return check


def _operands(check, name="3x3 stride 2", **options):
    return operands(check.dtype, *GEOMETRIES[name], **options)


def test_bn_stats(check):
    """The operator keeps its schema's promises and matches its fake kernel."""
    check("bn_stats", _operands(check).input)


@pytest.mark.parametrize("absent", [True, False])
def test_bn_affine(absent, check):
    """Likewise, with and without the vectors."""
    stats = _operands(check).affine[:2].contiguous()
    check("bn_affine", stats, *(None if absent else stats[i] for i in (0, 1)), 1e-5)


def test_bn_relu_forward(check):
    """Likewise."""
    o = _operands(check)
    check("bn_relu_forward", o.input, o.affine, "relu")


@pytest.mark.parametrize("with_sums", [True, False])
def test_bn_relu_backward(with_sums, check):
    """Likewise, with and without sums, and with frozen statistics."""
    o = _operands(check)
    args = o.addend, o.input, o.affine, "silu", with_sums
    check("bn_relu_backward", *args)
    check("bn_relu_backward", *args, True, o.addend if with_sums else None)


@pytest.mark.parametrize("name", ["1x1", "3x3 padded (2, 0, 1, 3)"])
@pytest.mark.parametrize("absent", [True, False])
def test_preact_conv_forward(absent, name, check):
    """Likewise, with and without affine, residual and statistics."""
    o = _operands(check, name)
    affine, residual = (None, None) if absent else (o.affine, o.residual)
    rest = *o.geometry, "relu", not absent
    if not absent:
        rest = *rest, False, *torch.randn(2, o.weight.shape[0]).to(o.affine.dtype), 1e-5
    check("preact_conv_forward", o.input, affine, o.weight, residual, *rest)


@pytest.mark.parametrize("deferred", DEFERRED)
@pytest.mark.parametrize("absent", [True, False])
def test_preact_conv_dgrad(absent, deferred, check):
    """Likewise, with and without affine, addend, sums and a deferred gradient."""
    o = _operands(check, deferred=deferred)
    affine, addend = (None, None) if absent else (o.affine, o.addend)
    rest = o.weight, o.input, affine, addend, *o.geometry, "relu", not absent
    check("preact_conv_dgrad", o.grad, *o.deferred, *rest)
    if affine is not None:
        check("preact_conv_dgrad", o.grad, *o.deferred, *rest, False, True, o.addend)


@pytest.mark.parametrize("deferred", DEFERRED)
@pytest.mark.parametrize("absent", [True, False])
def test_preact_conv_wgrad(absent, deferred, check):
    """Likewise, with and without affine and a deferred gradient."""
    o = _operands(check, deferred=deferred)
    rest = o.input, None if absent else o.affine, o.weight.shape[2:], *o.geometry, "relu"
    check("preact_conv_wgrad", o.grad, *o.deferred, *rest)


@pytest.mark.parametrize("absent", [True, False])
def test_preact_conv_backward(absent, check):
    """Likewise, with and without affine, addend, sums and a deferred gradient."""
    o = _operands(check, "3x3", deferred=not absent)
    affine, addend = (None, None) if absent else (o.affine, o.addend)
    rest = o.weight, o.input, affine, addend, *o.geometry, "relu", not absent
    check("preact_conv_backward", o.grad, *o.deferred, *rest)
    if affine is not None:
        check("preact_conv_backward", o.grad, *o.deferred, *rest, False, True, o.addend)


@pytest.mark.parametrize("absent", [True, False])
def test_residual_conv_backward(absent, check):
    """Likewise, with and without residual."""
    o = _operands(check, "3x3", deferred=True)
    residual = None if absent else o.residual
    rest = o.weight, o.input, o.affine, *o.geometry, "relu"
    check("residual_conv_backward", residual, o.grad, *o.deferred, *rest)


@pytest.mark.parametrize("absent", [True, False])
def test_residual_grad(absent, check):
    """Likewise, with and without grad."""
    o = _operands(check, "3x3 of one channel", deferred=True)
    grad = None if absent else o.residual
    check("residual_grad", grad, o.addend, o.input, o.affine, o.deferred[2])


@pytest.mark.parametrize("composed", [[], [True, False, True, False]], ids=["", "composed"])
@pytest.mark.parametrize("raw", [True, False])
def test_preact_units(raw, composed, check):
    """Likewise, both passes, with and without a BatchNorm in front; some convolutions composed."""
    units = [([(8, 3, 1), (12, 1, 2)], "preact", 12), ([(12, 3, 1)], "input", None)]
    o = replace(units_operands(check.dtype, units, lambda k: k != 1, raw), composed=composed)
    forward = o.forward(with_stats=True, for_backward=True)
    check("preact_units_forward", *forward)
    inputs, affines = torch.ops.fused_preact.preact_units_forward(*forward)[1:3]
    check("preact_units_backward", *o.backward(inputs, affines, True, True, not raw, True))
