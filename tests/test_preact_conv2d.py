"""preact_conv2d against PyTorch's layers: results, gradients, inputs of any kind."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from numerics import Case, assert_rule, eager, fused, make_case, run

import fused_preact
from fused_preact.functional import preact_conv2d

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ONE, TWO, SAME = (1, 1), (2, 2), (1, 1, 1, 1)
NONE = (0, 0, 0, 0)
X3 = (3, 3)

GRID = {  # name: input shape, convolution
    "1x1": ((2, 16, 5, 7), (24, ONE, ONE, NONE)),
    "1x1 stride 2": ((2, 16, 5, 7), (8, ONE, TWO, NONE)),
    "1x1 stride (1, 2)": ((3, 8, 4, 12), (3, ONE, (1, 2), NONE)),
    "1x1 padded": ((2, 3, 2, 3), (17, ONE, ONE, (1, 0, 2, 1))),
    "1x1 image": ((3, 65, 1, 1), (17, ONE, ONE, NONE)),
    "3x3": ((2, 16, 5, 7), (24, X3, ONE, SAME)),
    "3x3 stride 2": ((2, 17, 5, 7), (16, X3, TWO, SAME)),
    "3x3 stride 3": ((1, 3, 33, 9), (5, X3, (3, 3), SAME)),
    "3x3 stride (2, 1)": ((2, 3, 5, 7), (8, X3, (2, 1), SAME)),
    "3x3 unpadded": ((2, 8, 5, 7), (8, X3, ONE, NONE)),
    "3x3 padded (0, 1, 0, 1)": ((2, 8, 6, 8), (8, X3, TWO, (0, 1, 0, 1))),
    "3x3 padded (2, 0, 1, 3)": ((2, 8, 5, 7), (8, X3, ONE, (2, 0, 1, 3))),
    "3x3 padded by 4": ((1, 3, 2, 3), (4, X3, ONE, (4, 4, 4, 4))),
    "3x3 on a 1x1 image": ((4, 8, 1, 1), (8, X3, ONE, SAME)),
    "3x3 of one channel": ((2, 1, 5, 7), (1, X3, ONE, SAME)),
    "3x3 of 200 channels": ((1, 200, 5, 7), (65, X3, ONE, SAME)),
    "3x3 to 200 channels": ((1, 65, 5, 7), (200, X3, TWO, SAME)),
    "3x3 many images": ((40, 16, 8, 8), (16, X3, ONE, SAME)),
    "3x3 many rows": ((2, 64, 56, 56), (16, X3, ONE, SAME)),
    "1x1 many rows": ((2, 64, 56, 56), (48, ONE, ONE, NONE)),
    "2x2": ((2, 8, 5, 7), (8, (2, 2), TWO, NONE)),
    "1x3": ((2, 8, 5, 7), (8, (1, 3), ONE, (0, 0, 1, 1))),
    "5x5": ((2, 8, 5, 7), (8, (5, 5), ONE, (2, 2, 2, 2))),
    "7x7": ((1, 3, 33, 9), (8, (7, 7), TWO, (3, 3, 3, 3))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID)
def test_grid(name, dtype, backend_name):
    """Each result is at most 1.5x as far from float64 truth as eager's in the same dtype.

    Every second geometry runs with SiLU, every third without a residual.
    """
    shape, conv = GRID[name]
    i = list(GRID).index(name)
    activation = "silu" if i % 2 else "relu"
    assert_rule(
        make_case(dtype, shape, [conv], activation=activation, residual=i % 3 > 0, seed=i), dtype
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_variants(training, affine, running, backend_name):
    """The tolerance rule with and without scales, running statistics and batch statistics."""
    if not training and not running:
        pytest.skip("evaluation needs running statistics")
    case = make_case(
        torch.float32,
        (2, 17, 5, 7),
        [(8, X3, ONE, SAME)],
        affine=affine,
        training=training,
        running=running,
    )
    assert_rule(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("conv", [(8, ONE, ONE, NONE), (8, X3, TWO, SAME)])
def test_mean_far_from_zero(conv, activation, dtype, backend_name):
    """The tolerance rule at a mean of 1e4 with deviation 1: no E[x^2] - E[x]^2, no expanded affine.

    In bfloat16 the input's own spacing is 64 there, so 100 is taken.
    """
    mean = 100 if dtype == torch.bfloat16 else 1e4
    case = make_case(dtype, (4, 5, 9, 7), [conv], activation=activation, mean=mean)
    assert_rule(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channel(dtype, backend_name):
    """The tolerance rule where a channel's variance is 0 and 1 / sqrt(eps) multiplies roundings."""
    assert_rule(make_case(dtype, (2, 6, 5, 7), [(8, X3, ONE, SAME)], constant=True), dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.dtype, Case]:
    size = st.sampled_from((1, 2, 3, 5, 7, 8))
    shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from((1, 3, 8, 17, 32, 65, 200))),
        draw(size),
        draw(size),
    )
    training = draw(st.booleans())
    hypothesis.assume(not training or shape[0] * shape[2] * shape[3] > 1)
    kernel = draw(st.sampled_from((ONE, X3, (2, 2), (1, 3), (5, 5))))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    hypothesis.assume(shape[2] + padding[0] + padding[1] >= kernel[0])
    hypothesis.assume(shape[3] + padding[2] + padding[3] >= kernel[1])
    dtype = draw(st.sampled_from(DTYPES))
    channels = draw(st.sampled_from((1, 3, 8, 16, 33, 200)))
    case = make_case(
        dtype,
        shape,
        [(channels, kernel, stride, padding)],
        activation=draw(st.sampled_from(("relu", "silu"))),
        affine=draw(st.booleans()),
        training=training,
        residual=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    return dtype, case


@hypothesis.given(drawn=cases())
def test_any_shape(drawn, backend_name):
    """The tolerance rule for whatever hypothesis draws."""
    dtype, case = drawn
    assert_rule(case, dtype)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(activation, training, backend_name):
    """Gradients are the finite differences of the output, in float64."""
    case = make_case(
        torch.float64,
        (2, 3, 3, 4),
        [(2, X3, TWO, (0, 1, 2, 1))],
        activation=activation,
        training=training,
        residual=True,
    ).to(torch.float64)
    (bn,), (conv,) = case.bns, case.convs
    running = None if training else bn.running_mean, None if training else bn.running_var

    def function(input, weight, gamma, beta, residual):
        return preact_conv2d(
            input,
            weight,
            bn_weight=gamma,
            bn_bias=beta,
            running_mean=running[0],
            running_var=running[1],
            stride=conv.stride,
            padding=conv.padding,
            activation=activation,
            residual=residual,
            training=training,
        )

    tensors = (case.input, conv.weight, bn.weight, bn.bias, case.residual)
    assert torch.autograd.gradcheck(function, tensors)


# --- inputs and gradients of any kind ------------------------------------------------------------

LAYOUTS = {
    "NCHW": lambda t: t.contiguous(),
    "sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "every second column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


def _small(dtype: torch.dtype = torch.float32, **options) -> Case:
    return make_case(dtype, (2, 8, 5, 7), [(16, X3, ONE, SAME)], residual=True, **options)


@pytest.mark.filterwarnings("ignore:input is not in channels_last")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend_name):
    """Any strides give bit for bit what channels_last gives: only copies come before."""
    case, expected = _small().to(torch.float32), run(_small(), torch.float32, fused)
    change = LAYOUTS[layout]
    grad_output = change(case.grad_output)
    leaves = case.leaves()
    case.input, case.residual = change(case.input), change(case.residual)
    case.convs = [case.convs[0]._replace(weight=change(case.convs[0].weight))]
    output = fused(case)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=0)
    output.backward(grad_output)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad {name}"], rtol=0, atol=0)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_expanded_grad_output(reduce, backend_name):
    """The gradient of a sum is one number with strides of 0: as good as a written-out one."""
    case, same = _small().to(torch.float32), _small()
    getattr(fused(case), reduce)().backward()
    scale = 1 if reduce == "sum" else 1 / same.grad_output.numel()
    same.grad_output = torch.full_like(same.grad_output, scale)
    expected = run(same, torch.float32, fused)
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(leaf.grad, expected[f"grad {name}"], rtol=0, atol=0)


def test_expanded_input(backend_name):
    """One image for the whole batch, and one value for a whole image, within the rule."""
    case = _small()
    case.input = case.input[:1].expand(2, -1, -1, -1)
    assert_rule(case, torch.float32)
    leaf = torch.randn(3, 8, 1, 1, requires_grad=True)
    case.input = leaf.expand(-1, -1, 4, 4)
    case.residual = None
    output = fused(case.to(torch.float32))
    torch.testing.assert_close(output, eager(case.to(torch.float32)), rtol=1e-4, atol=1e-4)


def test_residual_is_input(backend_name):
    """An input that is its own residual receives both gradients, within the rule."""
    case = make_case(torch.float32, (2, 8, 5, 7), [(8, X3, ONE, SAME)])

    def shared(function, case):
        case.residual = case.input
        return function(case)

    ours = run(case, torch.float32, lambda case: shared(fused, case))
    truth = run(case, torch.float64, lambda case: shared(eager, case))
    for name, expected in truth.items():  # float32 holds seven digits; sums of 70 cost one
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_overwritten(dtype, backend_name):
    """All arguments but the running statistics hold the same bits after both passes."""
    case = _small(dtype).to(dtype)
    held = [*case.leaves().values(), case.grad_output]
    before = [tensor.detach().clone() for tensor in held]
    fused(case).backward(case.grad_output)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@pytest.mark.filterwarnings("ignore:backend")
def test_float16(backend_name):
    """float16 runs (on reference, where a backend lacks it) and keeps to the rule."""
    assert_rule(_small(torch.float16), torch.float16)


@pytest.mark.filterwarnings("ignore:backend")
@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": (2, 1)}])
def test_grouped_and_dilated(options, backend_name):
    """Grouped and dilated convolutions run and keep to the rule."""
    case = _small()
    (conv,) = case.convs
    weight = conv.weight[:, :: options.get("groups", 1)].contiguous()
    case.convs, case.residual = [conv._replace(weight=weight, **options)], None
    shape = eager(case.to(torch.float64)).shape
    case.residual, case.grad_output = torch.randn(shape), torch.randn(shape)
    assert_rule(case, torch.float32)


def test_weight_of_another_dtype(backend_name):
    """float32 weights with bfloat16 input give what bfloat16 weights give, gradients in float32."""
    case = _small(torch.bfloat16)
    expected = run(case, torch.bfloat16, fused)
    case = case.to(torch.bfloat16)
    weight = case.convs[0].weight.detach().float().requires_grad_()
    case.convs = [case.convs[0]._replace(weight=weight)]
    output = fused(case)
    output.backward(case.grad_output)
    assert torch.equal(output, expected["output"])
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.bfloat16(), expected["grad weight0"], rtol=0, atol=0)


def test_weight_of_another_dtype_under_eager():
    """backend("eager") takes the weight in the input's dtype as well, bit for bit."""
    case = _small(torch.bfloat16)
    with fused_preact.backend("eager"):
        expected = fused(case)
        case.convs = [case.convs[0]._replace(weight=case.convs[0].weight.float())]
        assert torch.equal(fused(case), expected)


def test_empty_batch(backend_name):
    """No images: an empty output and zero gradients, as PyTorch's layers give."""
    case = _small()
    case.input, case.residual, case.grad_output = (
        tensor[:0] for tensor in (case.input, case.residual, case.grad_output)
    )
    ours, theirs = run(case, torch.float32, fused), run(case, torch.float32, eager)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, equal_nan=True)


# --- only what is asked for ----------------------------------------------------------------------


def test_input_gradient_alone(called, backend_name):
    """torch.autograd.grad(loss, images) runs no wgrad."""
    case = _small().to(torch.float32)
    output = fused(case)
    called.clear()
    torch.autograd.grad(output, case.input, case.grad_output)
    assert called == ["preact_conv_dgrad", "residual_grad"]


def test_weight_gradient_alone(called, backend_name):
    """With a plain input and frozen BatchNorm, backward is one wgrad and no dgrad."""
    case = _small().to(torch.float32)
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name == "weight0")
    output = fused(case)
    called.clear()
    output.backward(case.grad_output)
    assert called == ["preact_conv_wgrad"]


def test_batch_norm_gradients_alone(called, backend_name):
    """gamma's and beta's gradients come from dgrad's sums; nothing writes the input's."""
    case = _small().to(torch.float32)
    output = fused(case)
    called.clear()
    torch.autograd.grad(output, [case.bns[0].weight, case.bns[0].bias], case.grad_output)
    assert called == ["preact_conv_dgrad"]


def test_statistics_are_not_taken_in_evaluation(called, backend_name):
    """Running statistics replace the pass over the input."""
    fused(_small(training=False).to(torch.float32))
    assert called == ["bn_affine", "preact_conv_forward"]


def test_no_grad_gives_the_same_output(backend_name):
    """Bit for bit, and nothing to differentiate."""
    expected = fused(_small().to(torch.float32))
    with torch.no_grad():
        output = fused(_small().to(torch.float32))
    with torch.inference_mode():
        inferred = fused(_small().to(torch.float32))
    assert not output.requires_grad
    assert torch.equal(output, expected) and torch.equal(inferred, expected)


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum(momentum, backend_name):
    """Running statistics move by momentum, as batch_norm's do; float32's rounding apart."""
    ours, theirs = _small().to(torch.float32), _small().to(torch.float32)
    for case, unit in (ours, fused), (theirs, eager):
        case.bns = [case.bns[0]._replace(momentum=momentum)]
        unit(case)
    for field in "running_mean", "running_var":
        expected = getattr(theirs.bns[0], field)
        torch.testing.assert_close(getattr(ours.bns[0], field), expected, rtol=1e-6, atol=1e-6)


def test_evaluation_leaves_running_statistics_alone(backend_name):
    """Bit for bit."""
    case = _small(training=False)
    results = run(case, torch.float32, fused)
    assert torch.equal(results["running_mean0"], case.bns[0].running_mean)
    assert torch.equal(results["running_var0"], case.bns[0].running_var)


# --- double backward -----------------------------------------------------------------------------


def test_create_graph(backend_name):
    """create_graph=True gives the same first gradients, and the second pass says what to do."""
    case = _small().to(torch.float32)
    expected = run(_small(), torch.float32, fused)["grad input"]
    (grad,) = torch.autograd.grad(fused(case), case.input, case.grad_output, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match=r"fused_preact\.backend\('eager'\)"):
        grad.square().sum().backward()


def test_double_backward_under_eager():
    """backend("eager") is PyTorch's layers: second derivatives are finite differences of first."""
    case = make_case(
        torch.float64, (2, 2, 3, 3), [(2, X3, ONE, SAME)], activation="silu", running=False
    ).to(torch.float64)
    (bn,), (conv,) = case.bns, case.convs

    def function(input, weight):
        return preact_conv2d(
            input,
            weight,
            bn_weight=bn.weight,
            bn_bias=bn.bias,
            running_mean=None,
            running_var=None,
            padding=1,
            activation="silu",
            training=True,
        )

    with fused_preact.backend("eager"):
        assert torch.autograd.gradgradcheck(function, (case.input, conv.weight))


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training, compiled, backend_name):
    """Compiled with fullgraph=True, all results are those of the uncompiled function.

    The operators are the same; what lies between them may be rounded once differently.
    """
    case = _small(training=training)
    ours, expected = run(case, torch.float32, compiled(fused)), run(case, torch.float32, fused)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
