"""bn_relu, a network's last BatchNorm and activation, against PyTorch's layers."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from numerics import assert_rule, eager, fused, make_case, run

import fused_preact
from fused_preact.functional import bn_relu

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = [
    (1, 3, 2, 3),
    (2, 17, 5, 7),
    (5, 65, 1, 1),
    (1, 200, 33, 9),
    (40, 16, 8, 8),
    (2, 64, 56, 56),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(shape, training, activation, dtype, backend_name):
    """Each result is at most 1.5x as far from float64 truth as eager's in the same dtype."""
    assert_rule(make_case(dtype, shape, activation=activation, training=training), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("options", [{"mean": 1e4}, {"constant": True}, {"affine": False}], ids=str)
def test_hard_cases(options, activation, dtype, backend_name):
    """The rule at a mean of 1e4 (100 in bfloat16), for a constant channel, and without scales."""
    if "mean" in options and dtype == torch.bfloat16:
        options = {"mean": 100.0}
    assert_rule(make_case(dtype, (4, 6, 9, 7), activation=activation, **options), dtype)


@hypothesis.given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from((1, 3, 8, 65)), st.integers(1, 9), st.integers(2, 9)
    ),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(("relu", "silu")),
    options=st.fixed_dictionaries(
        {name: st.booleans() for name in ("affine", "training")} | {"seed": st.integers(0, 2**16)}
    ),
)
def test_any_shape(shape, dtype, activation, options, backend_name):
    """The tolerance rule for whatever hypothesis draws."""
    assert_rule(make_case(dtype, shape, activation=activation, **options), dtype)


def _call(input, gamma, beta, activation, bn):
    return bn_relu(
        input,
        bn_weight=gamma,
        bn_bias=beta,
        running_mean=None if bn.training else bn.running_mean,
        running_var=None if bn.training else bn.running_var,
        activation=activation,
        training=bn.training,
    )


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training, activation, backend_name):
    """Gradients are the finite differences of the output, in float64."""
    case = make_case(torch.float64, (2, 3, 2, 3), activation=activation, training=training)
    case = case.to(torch.float64)
    (bn,) = case.bns
    tensors = case.input, bn.weight, bn.bias
    assert torch.autograd.gradcheck(lambda *args: _call(*args, activation, bn), tensors)


@pytest.mark.filterwarnings("ignore:input is not in channels_last")
def test_layouts_and_expanded_gradients(backend_name):
    """Any strides give bit for bit what channels_last gives: only copies come before."""
    case, same = make_case(torch.float32), make_case(torch.float32)
    same.grad_output = torch.ones_like(same.grad_output)
    expected = run(same, torch.float32, fused)
    for change in torch.Tensor.contiguous, lambda t: torch.cat((t, t), 1)[:, : t.shape[1]]:
        changed = case.to(torch.float32)
        leaf, changed.input = changed.input, change(changed.input)
        output = fused(changed)
        output.sum().backward()
        assert torch.equal(output, expected["output"])
        assert torch.equal(leaf.grad, expected["grad input"])


@pytest.mark.filterwarnings("ignore:backend")
def test_float16(backend_name):
    """float16 runs (on reference, where a backend lacks it) and keeps to the rule."""
    assert_rule(make_case(torch.float16), torch.float16)


def test_empty_batch(backend_name):
    """No images: as PyTorch's layers, NaN statistics and all."""
    case = make_case(torch.float32)
    case.input, case.grad_output = case.input[:0], case.grad_output[:0]
    ours, theirs = run(case, torch.float32, fused), run(case, torch.float32, eager)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, equal_nan=True)


def test_create_graph(backend_name):
    """create_graph=True gives the same first gradients, and the second pass says what to do."""
    case = make_case(torch.float32).to(torch.float32)
    expected = run(make_case(torch.float32), torch.float32, fused)["grad input"]
    (grad,) = torch.autograd.grad(fused(case), case.input, case.grad_output, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match=r"fused_preact\.backend\('eager'\)"):
        grad.square().sum().backward()


def test_double_backward_under_eager():
    """backend("eager") is PyTorch's layers: second derivatives are finite differences of first."""
    case = make_case(torch.float64, (2, 2, 2, 3), activation="silu").to(torch.float64)
    (bn,) = case.bns
    with fused_preact.backend("eager"):
        assert torch.autograd.gradgradcheck(
            lambda *args: _call(*args, "silu", bn), (case.input, bn.weight, bn.bias)
        )


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training, compiled, backend_name):
    """Compiled with fullgraph=True, all results are those of the uncompiled function.

    The operators are the same; what lies between them may be rounded once differently.
    """
    case = make_case(torch.float32, training=training)
    ours, expected = run(case, torch.float32, compiled(fused)), run(case, torch.float32, fused)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
