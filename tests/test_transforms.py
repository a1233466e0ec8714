"""What only PyTorch's own layers can run, runs on them: torch.func, tracing, the meta device."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fused_preact
from fused_preact import PreActBlock, PreActResNet, PreActStage


@pytest.fixture
def model():
    """A small network in evaluation, with running statistics of its own."""
    torch.manual_seed(0)
    model = PreActResNet(PreActBlock, [1, 2], widths=(8, 16))
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.running_mean)
    return model.eval()


def images(count):
    return torch.randn(count, 3, 6, 7)


def loss_of(model):
    """As a function of parameters and one image."""
    buffers = dict(model.named_buffers())

    def loss(parameters, image):
        return torch.func.functional_call(model, (parameters, buffers), (image[None],)).sum()

    return loss


def test_gradients_of_each_sample(model):
    """vmap over grad, of a whole network: those of each image alone."""
    x, parameters = images(3), dict(model.named_parameters())
    ours = torch.func.vmap(torch.func.grad(loss_of(model)), (None, 0))(parameters, x)
    for i in range(3):
        gradients = torch.autograd.grad(model(x[i : i + 1]).sum(), parameters.values())
        for name, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(ours[name][i], gradient, rtol=1e-4, atol=1e-5)


def test_directional_derivatives(model):
    """torch.func.jvp and forward_ad: the product of the gradient and the direction."""
    x, direction = images(2), images(2)
    wanted = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(wanted).sum(), wanted)
    expected = (gradient * direction).sum()
    _, of_func = torch.func.jvp(model, (x,), (direction,))
    with forward_ad.dual_level():
        of_duals = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(of_func.sum(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_duals.sum(), expected, rtol=1e-4, atol=1e-4)


def test_batched_gradients_say_what_runs_them(model):
    """The fused backward pass takes one gradient; the eager backend takes several."""
    x = images(2).requires_grad_()
    several = torch.eye(2)[:, :, None].expand(2, 2, 10)
    with pytest.raises(RuntimeError, match="backend\\('eager'\\)"):
        torch.autograd.grad(model(x), x, several, is_grads_batched=True)
    with fused_preact.backend("eager"):
        (ours,) = torch.autograd.grad(model(x), x, several, is_grads_batched=True)
    expected = [torch.autograd.grad(model(x), x, one)[0] for one in several]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:")
def test_traced(model):
    """torch.jit.trace gives a program of PyTorch's layers."""
    x, other = images(2), images(2)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-5)


def test_symbolically_traced(model):
    """torch.fx sees the layers as modules, which feature extractors ask for by name."""
    x = images(2)
    graph = torch.fx.symbolic_trace(model)
    assert "layer2.0.conv2" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_on_meta():
    """Shapes without memory, forward and backward."""
    with torch.device("meta"):
        model = PreActResNet(PreActBlock, [1, 1], widths=(8, 16))
        output = model(images(2))
        output.sum().backward()
    assert output.shape == (2, 10) and output.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["conv2", "bn1", "bn2", None])
def test_weights_that_were_never_loaded_are_refused(where, training):
    """On meta, while the input is not: no memory that nobody wrote comes out."""
    block = PreActBlock(8, 8).train(training)
    (block if where is None else getattr(block, where)).to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected a tensor on cpu.*meta"):
        block(torch.randn(2, 8, 4, 4))


def test_compiled_unit_of_a_stage_is_called():
    """By itself, as it is in an nn.Sequential."""
    stage, graphs = PreActStage(PreActBlock(8, 8), PreActBlock(8, 8)), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    stage[1].compile(backend=backend)
    stage(torch.randn(2, 8, 4, 4))
    assert graphs
