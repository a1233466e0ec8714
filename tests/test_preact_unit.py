"""preact_unit, a whole residual unit in one Function, against PyTorch's layers."""

import pytest
import torch
from numerics import assert_rule, eager, fused, make_case, run

import fused_preact
from fused_preact.functional import preact_conv2d, preact_unit

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ONE, TWO, X3, NONE, SAME = (1, 1), (2, 2), (3, 3), (0, 0, 0, 0), (1, 1, 1, 1)

BASIC = [(16, X3, ONE, SAME), (16, X3, ONE, SAME)]
BASIC_DOWN = [(24, X3, TWO, SAME), (24, X3, ONE, SAME)]
BOTTLENECK = [(8, ONE, ONE, NONE), (8, X3, ONE, SAME), (16, ONE, ONE, NONE)]
BOTTLENECK_DOWN = [(8, ONE, ONE, NONE), (8, X3, TWO, SAME), (32, ONE, ONE, NONE)]

UNITS = {  # name: convolutions, the rest of make_case's arguments
    "basic": (BASIC, {"shortcut": "input"}),
    "basic, preact shortcut": (BASIC, {"shortcut": "preact"}),
    "basic, preact projection": (
        BASIC_DOWN,
        {"shortcut": "preact", "projection": (24, ONE, TWO, NONE)},
    ),
    "basic, raw projection": (
        BASIC_DOWN,
        {"shortcut": "input", "projection": (24, ONE, TWO, NONE)},
    ),
    "basic, no preact": (BASIC, {"shortcut": "input", "raw": True}),
    "basic, no preact, projection": (
        BASIC_DOWN,
        {"shortcut": "input", "raw": True, "projection": (24, ONE, TWO, NONE)},
    ),
    "bottleneck": (BOTTLENECK, {"shortcut": "input"}),
    "bottleneck, projection": (
        BOTTLENECK_DOWN,
        {"shortcut": "preact", "projection": (32, ONE, TWO, NONE)},
    ),
    "no shortcut": (BOTTLENECK, {}),
    "residual": (BASIC, {"residual": True}),
    "one convolution": ([(16, X3, ONE, SAME)], {"shortcut": "preact"}),
}


def _unit(name, dtype=torch.float32, shape=(4, 16, 8, 7), **options):
    convs, given = UNITS[name]
    return make_case(dtype, shape, convs, **given, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation,training", [("relu", True), ("silu", True), ("silu", False)])
@pytest.mark.parametrize("name", UNITS)
def test_rule(name, activation, training, dtype, backend_name):
    """Each result is at most 1.5x as far from float64 truth as eager's in the same dtype.

    Not channel by channel for ReLU in bfloat16: there the second BatchNorm reads a rounded
    activation, and which of its values change sign by that is one channel's luck.
    """
    case = _unit(name, dtype, activation=activation, training=training)
    by_channel = activation == "silu" or dtype != torch.bfloat16
    assert_rule(case, dtype, by_channel=by_channel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 16, 8, 8), (2, 16, 56, 56), (1, 16, 5, 3)], ids=str)
@pytest.mark.parametrize("name", ["basic, preact projection", "bottleneck"])
def test_sizes(name, shape, dtype, backend_name):
    """The rule where the work is split into many parts, and where it is hardly any."""
    assert_rule(_unit(name, dtype, shape, activation="silu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"mean": 1e4}, {"constant": True}, {"affine": False}], ids=str)
@pytest.mark.parametrize("name", ["basic, preact projection", "bottleneck"])
def test_hard_cases(name, options, dtype, backend_name):
    """The rule at a mean of 1e4, for a constant channel, and without scales.

    Statistics of an output with a mean of 1e4 come from the shortcut's addition.
    """
    assert_rule(_unit(name, dtype, activation="silu", **options), dtype)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", UNITS)
def test_gradcheck(name, activation, backend_name):
    """Gradients are the finite differences of the output, in float64, for every shortcut.

    For ReLU along one random direction (fast mode), which crosses fewer kinks.
    """
    convs, options = UNITS[name]
    convs = [(2, *conv[1:]) for conv in convs]
    if "projection" in options:
        options = options | {"projection": (2, *options["projection"][1:])}
    case = make_case(
        torch.float64, (2, 2, 3, 3), convs, activation=activation, running=False, **options
    ).to(torch.float64)
    names, leaves = zip(*case.leaves().items(), strict=True)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        bns = [
            bn and bn._replace(weight=given[f"gamma{i}"], bias=given[f"beta{i}"])
            for i, bn in enumerate(case.bns)
        ]
        layers = [conv._replace(weight=given[f"weight{i}"]) for i, conv in enumerate(case.convs)]
        return preact_unit(
            given["input"],
            bns,
            layers,
            shortcut=case.shortcut,
            projection=case.projection and case.projection._replace(weight=given["projection"]),
            activation=activation,
            residual=given.get("residual"),
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", UNITS)
def test_eager_is_pytorch(name):
    """backend("eager") is F.batch_norm, F.relu and F.conv2d, up to float64's order of sums."""
    with fused_preact.backend("eager"):
        ours = run(_unit(name), torch.float64, fused)
    for key, expected in run(_unit(name), torch.float64, eager).items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-10, atol=1e-10)


def test_unit_is_its_convolutions(backend_name):
    """A bottleneck's output has the bits that its three preact_conv2d give one by one.

    Its gradients differ by the roundings that deferring BatchNorm's backward pass saves.
    """
    case, chain = _unit("bottleneck").to(torch.float32), _unit("bottleneck").to(torch.float32)
    output = fused(case)
    u = chain.input
    for i, (bn, conv) in enumerate(zip(chain.bns, chain.convs, strict=True)):
        u = preact_conv2d(
            u,
            **{f"bn_{name}": getattr(bn, name) for name in ("weight", "bias")},
            running_mean=bn.running_mean,
            running_var=bn.running_var,
            training=True,
            residual=chain.input if i == 2 else None,
            **conv._asdict(),
        )
    assert torch.equal(output, u)
    output.backward(case.grad_output)
    u.backward(case.grad_output)
    leaves = chain.leaves()
    for name, leaf in case.leaves().items():
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(leaf.grad, leaves[name].grad, rtol=1e-5, atol=1e-5 * scale)


def test_some_statistics_frozen(backend_name):
    """The rule where one BatchNorm of a unit is frozen and the others are not."""
    for frozen in range(3):
        case = _unit("bottleneck", activation="silu")
        case.bns[frozen] = case.bns[frozen]._replace(training=False)
        assert_rule(case, torch.float32)


@pytest.mark.parametrize("name", UNITS)
def test_inputs_are_not_overwritten(name, backend_name):
    """All arguments but the running statistics hold the same bits after both passes."""
    case = _unit(name).to(torch.float32)
    held = [*case.leaves().values(), case.grad_output]
    before = [tensor.detach().clone() for tensor in held]
    fused(case).backward(case.grad_output)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_empty_batch(backend_name):
    """No images: as PyTorch's layers."""
    case = _unit("basic, preact projection")
    case.input, case.grad_output = case.input[:0], case.grad_output[:0]
    ours, theirs = run(case, torch.float32, fused), run(case, torch.float32, eager)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, equal_nan=True)


# --- only what is asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("asked", ["input", "weight0", "beta0", "gamma1", "projection"])
@pytest.mark.parametrize("how", ["grad", "requires_grad"])
def test_single_gradients(how, asked, name, called, backend_name):
    """One gradient alone has the bits that it has among all; wgrad runs for weights only.

    Asked for by torch.autograd.grad, or by freezing everything else.
    """
    case = _unit(name).to(torch.float32)
    leaves = case.leaves()
    if asked not in leaves:
        pytest.skip("this unit has none")
    expected = run(_unit(name), torch.float32, fused)[f"grad {asked}"]
    if how == "requires_grad":
        for leaf in leaves.values():
            leaf.requires_grad_(leaf is leaves[asked])
    output = fused(case)
    called.clear()
    (grad,) = torch.autograd.grad(output, leaves[asked], case.grad_output)
    assert torch.equal(grad, expected)
    wanted = 1 if asked in ("weight0", "projection") else 0
    assert called.count("preact_conv_wgrad") == wanted
    assert "preact_conv_backward" not in called


def test_frozen_unit_has_no_backward(called, backend_name):
    """Nothing requires a gradient: nothing to differentiate."""
    case = _unit("bottleneck").to(torch.float32)
    for leaf in case.leaves().values():
        leaf.requires_grad_(False)
    assert not fused(case).requires_grad


# --- statistics handed from unit to unit ---------------------------------------------------------


def _two_units(between, dtype=torch.float32):
    """Results of two units, with a function of the activation between them."""
    first, second = (_unit("bottleneck", dtype, seed=seed).to(dtype) for seed in (1, 2))
    second.input = between(fused(first))
    output = fused(second)
    output.backward(second.grad_output)
    results = {"output": output.detach(), "running_mean": second.bns[0].running_mean}
    results["running_var"] = second.bns[0].running_var
    for i, case in enumerate((first, second)):
        leaves = {k: leaf for k, leaf in case.leaves().items() if leaf.is_leaf}
        results |= {f"{k} {i}": leaf.grad for k, leaf in leaves.items()}
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_handed_on(dtype, called, backend_name):
    """The next unit takes no statistics of its input, and gets what taking them would give.

    Merged from other parts of the same values, they differ by the order of a sum.
    """
    handed = _two_units(lambda y: y, dtype)
    assert called.count("bn_stats") == 1
    taken = _two_units(lambda y: y.clone(), dtype)
    assert called.count("bn_stats") == 3
    eps = torch.finfo(dtype).eps
    for name, expected in taken.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(handed[name], expected, rtol=0, atol=100 * eps * scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.mul_(3),
        lambda y: y.permute(0, 2, 3, 1).view(-1).add_(1),
        lambda y: y.detach().mul_(3),
        lambda y: y[:1].zero_(),
    ],
    ids=["y.mul_", "a view", "y.detach()", "a slice"],
)
def test_writing_in_place_is_noticed(change, called, backend_name):
    """Statistics are taken again from an output that somebody wrote to."""
    first, second = _unit("bottleneck", seed=1), _unit("bottleneck", seed=2)
    with torch.no_grad():
        y = fused(first)
        change(y)
        second.input = y
        output = fused(second)
        second.bns = _unit("bottleneck", seed=2).bns
        second.input = y.clone()
        assert torch.equal(output, fused(second))
    assert called.count("bn_stats") == 3


def test_evaluation_hands_nothing_on(called, backend_name):
    """In evaluation no statistics are taken at all."""
    case = _unit("bottleneck", training=False)
    output = fused(case)
    fused(_unit("bottleneck", training=False, seed=1))
    assert "bn_stats" not in called and not hasattr(output, "_preact_stats")


# --- autograd and torch.compile ------------------------------------------------------------------


def test_create_graph(backend_name):
    """create_graph=True gives the same first gradients, and the second pass says what to do."""
    case = _unit("basic, preact projection").to(torch.float32)
    expected = run(_unit("basic, preact projection"), torch.float32, fused)["grad input"]
    (grad,) = torch.autograd.grad(fused(case), case.input, case.grad_output, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match=r"fused_preact\.backend\('eager'\)"):
        grad.square().sum().backward()


def test_double_backward_under_eager():
    """backend("eager"): a penalty on the input's gradient reaches the weights, as in PyTorch."""

    def penalty(unit):
        case = _unit("bottleneck", torch.float64, activation="silu").to(torch.float64)
        (grad,) = torch.autograd.grad(unit(case).sum(), case.input, create_graph=True)
        grad.square().sum().backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    expected = penalty(eager)
    with fused_preact.backend("eager"):
        ours = penalty(fused)
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic, preact projection", "basic, no preact", "bottleneck"])
def test_compiles_without_graph_breaks(name, training, compiled, backend_name):
    """Compiled with fullgraph=True, all results are those of the uncompiled function.

    The operators are the same; what lies between them may be rounded once differently.
    """
    case = _unit(name, training=training)
    ours, expected = run(case, torch.float32, compiled(fused)), run(case, torch.float32, fused)
    for key, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5 * scale)


def test_two_compiled_units(compiled, backend_name):
    """One graph over two units: the same results, though no statistics are handed on in it."""

    def both(first, second):
        second.input = fused(first)
        return fused(second)

    def gradients(function):
        cases = [_unit("bottleneck", seed=seed).to(torch.float32) for seed in (1, 2)]
        function(*cases).backward(cases[1].grad_output)
        return [leaf.grad for case in cases for leaf in case.leaves().values() if leaf.is_leaf]

    ours = gradients(compiled(both))
    for grad, expected in zip(ours, gradients(both), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * scale)
