"""Each error names the argument, what was expected and what came."""

import re

import pytest
import torch

from fused_preact.functional import BatchNorm, Conv, bn_relu, preact_conv2d, preact_unit


def _bn(channels=8, **changes):
    vectors = [torch.ones(channels) for _ in range(4)]
    return BatchNorm(*vectors, True, 0.1, 1e-5)._replace(**changes)


def _arguments(**changes):
    names = {"bn_weight": 8, "bn_bias": 8, "running_mean": 8, "running_var": 8}
    return {name: torch.ones(size) for name, size in names.items()} | {"training": True} | changes


def _convolve(input=(2, 8, 5, 5), weight=(4, 8, 3, 3), **changes):
    input = torch.zeros(input) if isinstance(input, tuple) else input
    return preact_conv2d(input, torch.zeros(weight), **_arguments(**changes))


def _unit(**changes):
    arguments = {
        "input": torch.zeros(2, 8, 5, 5),
        "bns": [_bn(), _bn()],
        "convs": [Conv(torch.zeros(8, 8, 1, 1)), Conv(torch.zeros(8, 8, 1, 1))],
    } | changes
    return preact_unit(**arguments)


def _relu(input=(2, 8, 5, 5), **changes):
    input = torch.zeros(input) if isinstance(input, tuple) else input
    return bn_relu(input, **_arguments(**changes))


EVALUATION = {"training": False, "running_mean": None}
ERRORS = [
    (_convolve, {"input": (8, 5, 5)}, "input: expected (N, C, H, W), got shape (8, 5, 5)"),
    (
        _convolve,
        {"input": torch.zeros(2, 8, 5, 5, dtype=torch.int64)},
        "input: expected a floating-point dtype, got torch.int64",
    ),
    (
        _convolve,
        {"activation": "gelu"},
        "activation: expected 'relu' or 'silu', got 'gelu'",
    ),
    (_convolve, {"bn_weight": torch.ones(7)}, "bn_weight: expected shape (8,), got (7,)"),
    (_convolve, {"bn_bias": torch.ones(8, 1)}, "bn_bias: expected shape (8,), got (8, 1)"),
    (_convolve, {"running_mean": torch.ones(1)}, "running_mean: expected shape (8,), got (1,)"),
    (_convolve, {"running_var": torch.ones(9)}, "running_var: expected shape (8,), got (9,)"),
    (
        _convolve,
        EVALUATION,
        "running_mean, running_var: expected tensors in evaluation, got None",
    ),
    (_convolve, {"weight": (4, 7, 3, 3)}, "weight: expected shape (K, 8, R, S), got (4, 7, 3, 3)"),
    (_convolve, {"weight": (4, 8, 3)}, "weight: expected shape (K, 8, R, S), got (4, 8, 3)"),
    (
        _convolve,
        {"groups": 2},
        "weight: expected shape (K, 4, R, S), got (4, 8, 3, 3)",
    ),
    (
        _convolve,
        {"weight": (4, 8, 7, 3), "padding": (0, 1, 2, 3)},
        "weight: a kernel of (7, 3) does not fit into an input of (5, 5) with padding (0, 1, 2, 3)",
    ),
    (
        _convolve,
        {"stride": (0, 1), "padding": 2},
        "weight: expected stride and dilation >= 1 and padding >= 0, got stride (0, 1), "
        "dilation (1, 1), padding (2, 2, 2, 2)",
    ),
    (
        _convolve,
        {"padding": (0, 0, -1, 0)},
        "weight: expected stride and dilation >= 1 and padding >= 0, got stride (1, 1), "
        "dilation (1, 1), padding (0, 0, -1, 0)",
    ),
    (_convolve, {"stride": (1, 1, 1)}, "stride: expected an int or two, got (1, 1, 1)"),
    (_convolve, {"dilation": (1,)}, "dilation: expected an int or two, got (1,)"),
    (
        _convolve,
        {"padding": (1, 1)},
        "padding: expected an int or (top, bottom, left, right), got (1, 1)",
    ),
    (
        _convolve,
        {"residual": torch.zeros(2, 4, 5, 5)},
        "residual: expected shape (2, 4, 3, 3), got (2, 4, 5, 5)",
    ),
    (_relu, {"input": (8, 5)}, "input: expected (N, C, H, W), got shape (8, 5)"),
    (_relu, {"activation": None}, "activation: expected 'relu' or 'silu', got None"),
    (_relu, {"bn_bias": torch.ones(7)}, "bn_bias: expected shape (8,), got (7,)"),
    (_relu, EVALUATION, "running_mean, running_var: expected tensors in evaluation, got None"),
    (_unit, {"shortcut": "raw"}, "shortcut: expected None, 'input' or 'preact', got 'raw'"),
    (
        _unit,
        {"projection": Conv(torch.zeros(8, 8, 1, 1))},
        "projection: expected None where there is no shortcut",
    ),
    (
        _unit,
        {"shortcut": "input", "residual": torch.zeros(2, 8, 5, 5)},
        "residual: expected None where there is a shortcut",
    ),
    (
        _unit,
        {"bns": [_bn()]},
        "bns: expected one BatchNorm for each convolution; only the first may be None",
    ),
    (
        _unit,
        {"bns": [_bn(), None]},
        "bns: expected one BatchNorm for each convolution; only the first may be None",
    ),
    (
        _unit,
        {"bns": [_bn(), _bn(weight=torch.ones(3))]},
        "bns[1].bn_weight: expected shape (8,), got (3,)",
    ),
    (
        _unit,
        {"convs": [Conv(torch.zeros(8, 8, 1, 1)), Conv(torch.zeros(8, 9, 1, 1))]},
        "convs[1].weight: expected shape (K, 8, R, S), got (8, 9, 1, 1)",
    ),
    (
        _unit,
        {"shortcut": "input", "projection": Conv(torch.zeros(8, 3, 1, 1))},
        "projection.weight: expected shape (K, 8, R, S), got (8, 3, 1, 1)",
    ),
    (
        _unit,
        {"shortcut": "preact", "projection": Conv(torch.zeros(8, 8, 1, 1), stride=(2, 2))},
        "shortcut: expected shape (2, 8, 5, 5), got (2, 8, 3, 3)",
    ),
    (
        _unit,
        {"residual": torch.zeros(1, 8, 5, 5)},
        "residual: expected shape (2, 8, 5, 5), got (1, 8, 5, 5)",
    ),
]


@pytest.mark.parametrize(
    "function,changes,message", ERRORS, ids=[error[2][:60] for error in ERRORS]
)
def test_message(function, changes, message):
    """A ValueError with exactly this text; without the change the same call runs."""
    function()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**changes)


@pytest.mark.parametrize("function", [_convolve, _relu, _unit])
def test_one_value_per_channel(function):
    """In training the ValueError of torch.nn.functional.batch_norm, word for word."""
    shape = (1, 8, 1, 1)
    with pytest.raises(ValueError) as expected:
        torch.nn.functional.batch_norm(torch.zeros(shape), None, None, training=True)
    changes = {"weight": (4, 8, 1, 1)} if function is _convolve else {}
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
        function(input=torch.zeros(shape), **changes)


def test_one_value_per_channel_inside_a_unit():
    """A stride that leaves one value to the second BatchNorm is the same error."""
    convs = [Conv(torch.zeros(8, 8, 1, 1), stride=(5, 5)), Conv(torch.zeros(8, 8, 1, 1))]
    message = "Expected more than 1 value per channel when training, got input size torch.Size"
    with pytest.raises(ValueError, match=re.escape(f"{message}([1, 8, 1, 1])")):
        _unit(input=torch.zeros(1, 8, 5, 5), convs=convs)


def test_one_value_per_channel_in_evaluation():
    """In evaluation one value is as good as many."""
    vectors = _arguments(training=False)
    output = preact_conv2d(torch.zeros(1, 8, 1, 1), torch.ones(4, 8, 1, 1), **vectors)
    assert output.shape == (1, 4, 1, 1)


@pytest.mark.parametrize("function,changes", [(f, c) for f, c, _ in ERRORS[:8]])
def test_running_statistics_survive_an_error(function, changes):
    """A call that is refused has not moved them."""
    running = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
    with pytest.raises(ValueError):
        function(**(running | changes))
    assert running["running_mean"].eq(0).all() and running["running_var"].eq(1).all()
