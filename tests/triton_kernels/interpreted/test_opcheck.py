"""torch.library.opcheck on the Triton kernels' operators."""

import pytest
import torch
from operands import DEFERRED, GEOMETRIES, operands

import fused_preact
from fused_preact import ops

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("deferred", DEFERRED)
def test_operators(deferred):
    """Each keeps its schema's promises, and its fake kernel's shapes and strides."""
    o = operands(torch.float32, *GEOMETRIES["3x3 stride 2"], deferred=deferred)
    all_given = deferred
    stats, geometry = o.affine[:2].contiguous(), [list(x) for x in o.geometry[:3]] + [1]
    affine, addend = (o.affine, o.addend) if all_given else (None, None)
    vector, residual = (stats[0], o.residual) if all_given else (None, None)
    calls = {
        "bn_stats": (o.input,),
        "bn_affine": (stats, vector, vector, 1e-5),
        "bn_update_running": ([stats[0]], [stats[1]], [stats.clone()], [0.1], [9]),
        "bn_relu_forward": (o.input, o.affine, "silu"),
        "bn_relu_backward": (o.addend, o.input, o.affine, "silu", all_given),
        "preact_conv_forward": (o.input, affine, o.weight, residual, *geometry, "relu", all_given),
        "preact_conv_dgrad": (
            *(o.grad, *o.deferred, o.weight, o.input, affine, addend),
            *(*geometry, "relu", all_given),
        ),
        "preact_conv_backward": (
            *(o.grad, *o.deferred, o.weight, o.input, affine, addend),
            *(*geometry, "relu", all_given),
        ),
        "preact_conv_wgrad": (o.grad, *o.deferred, o.input, affine, [3, 3], *geometry, "relu"),
        "residual_grad": (addend, o.addend, o.input, o.affine, o.affine[:2].contiguous()),
    }
    if deferred:
        calls["residual_conv_backward"] = (
            *(residual, o.grad, *o.deferred, o.weight, o.input, o.affine, *geometry, "relu"),
        )
    with fused_preact.backend("triton"):
        namespace = ops.plan(o.input)
    for name, args in calls.items():
        torch.library.opcheck(getattr(namespace, name).default, args, test_utils=TESTS)
