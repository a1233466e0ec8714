"""PyTorch's setting for TF32 reaches the operators, once for forward and backward."""

import inspect

import pytest
import torch
from numerics import fused, make_case

from fused_preact import ops, reference

X3 = [(8, (3, 3), (1, 1), (1, 1, 1, 1))]
BOTTLENECK = {"convs": X3 * 2, "shortcut": "preact", "projection": (8, (1, 1), (1, 1), (0,) * 4)}


@pytest.fixture(autouse=True)
def setting():
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    yield
    conv.fp32_precision, rnn.fp32_precision = before


@pytest.fixture
def received(monkeypatch):
    """What convolutions were last told, by name of the operator."""
    plan, flags = ops.plan, {}

    class Recording:
        def __init__(self, operators):
            self.operators = operators

        def __getattr__(self, name):
            def call(*args):
                if name.startswith("preact_conv"):
                    given = inspect.signature(getattr(reference, name)).bind(*args).arguments
                    flags.setdefault(name, []).append(given["allow_tf32"])
                return getattr(self.operators, name)(*args)

            return call

    monkeypatch.setattr(ops, "plan", lambda *args: Recording(plan(*args)))
    return flags


@pytest.mark.parametrize("allowed", [True, False])
def test_backward_keeps_forwards_choice(allowed, received):
    """Every convolution of a unit is told what held in its forward pass."""
    case = make_case(torch.float32, **BOTTLENECK).to(torch.float32)
    torch.backends.cudnn.allow_tf32 = allowed
    output = fused(case)
    torch.backends.cudnn.allow_tf32 = not allowed
    output.backward(case.grad_output)
    assert received == {
        "preact_conv_forward": [allowed] * 3,
        "preact_conv_backward": [allowed] * 2,
        "preact_conv_dgrad": [allowed],  # of the shortcut
        "preact_conv_wgrad": [allowed],
    }


def test_either_setting_counts():
    """The flag, and the precision of convolutions by itself."""
    torch.backends.cudnn.allow_tf32 = False
    assert not ops.allow_tf32()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert ops.allow_tf32()


def test_compiled_graphs_follow_the_flag(compiled):
    """Each change of it is another graph; precisions set one by one are no error."""
    function = compiled(lambda x: x + ops.allow_tf32())
    for allowed in (True, False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        assert function(torch.zeros(1)) == allowed
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert function(torch.zeros(1)) == 0
