"""Pre-activation ResNets in plain PyTorch layers, with the names of the CIFAR implementation.

What the modules of fused_preact are held against: same children, same arithmetic, no fused code.
"""

import copy
import math
import os

import numerics
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The dtype in which models are compared with eager ones for their wiring, and how closely. float64,
# where only roundings of 1e-16 separate right results; the Triton kernels have float32 at most.
WIRING, CLOSE = torch.float64, 1e-9
if os.environ.get("TRITON_INTERPRET") == "1":
    WIRING, CLOSE = torch.float32, 1e-4


class EagerUnit(nn.Module):
    def __init__(self, in_planes, convs, stride, preact, activation):
        super().__init__()
        planes = convs[-1].out_channels
        for i, conv in enumerate(convs, 1):
            if i > 1 or preact != "no_preact":
                setattr(self, f"bn{i}", nn.BatchNorm2d(conv.in_channels))
            setattr(self, f"conv{i}", conv)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))
        self.preact = preact or ("both_preact" if hasattr(self, "shortcut") else "normal")
        self.act = {"relu": F.relu, "silu": F.silu}[activation]

    def forward(self, x):
        h = x if self.preact == "no_preact" else self.act(self.bn1(x))
        added = h if self.preact == "both_preact" else x
        if hasattr(self, "shortcut"):
            added = self.shortcut(added)
        out = self.conv2(self.act(self.bn2(self.conv1(h))))
        if hasattr(self, "conv3"):
            out = self.conv3(self.act(self.bn3(out)))
        return out + added


class EagerBlock(EagerUnit):
    expansion = 1

    def __init__(self, in_planes, planes, stride=1, preact=None, activation="relu"):
        convs = [
            nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False),
        ]
        super().__init__(in_planes, convs, stride, preact, activation)


class EagerBottleneck(EagerUnit):
    expansion = 4

    def __init__(
        self, in_planes, planes, stride=1, preact=None, activation="relu", stride_at="conv2"
    ):
        first = stride_at == "conv1"
        convs = [
            nn.Conv2d(in_planes, planes, 1, stride if first else 1, bias=False),
            nn.Conv2d(planes, planes, 3, 1 if first else stride, 1, bias=False),
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
        ]
        super().__init__(in_planes, convs, stride, preact, activation)


class EagerResNet(nn.Module):
    """CIFAR stem; stages is a list of lists of units. Without final_bn, pytorch-cifar's network."""

    def __init__(self, stem, stages, num_classes=10, final_bn=True, activation="relu"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        for i, units in enumerate(stages, 1):
            setattr(self, f"layer{i}", nn.Sequential(*units))
        self.n_stages = len(stages)
        channels = stages[-1][-1].conv2.out_channels
        if hasattr(stages[-1][-1], "conv3"):
            channels *= 4
        if final_bn:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        self.act = {"relu": F.relu, "silu": F.silu}[activation]

    def forward(self, x):
        x = self.conv1(x)
        for i in range(self.n_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        if hasattr(self, "bn"):
            x = self.act(self.bn(x))
        return self.linear(x.mean((2, 3)))


def eager_stages(block, num_blocks, widths, stem, **options):
    """Lists of units as PreActResNet makes them."""
    stages, planes = [], stem
    for stage, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
        strides = [2 if stage > 0 else 1] + [1] * (count - 1)
        units = []
        for stride in strides:
            units.append(block(planes, width, stride, **options))
            planes = width * block.expansion
        stages.append(units)
    return stages


def randomise(model: nn.Module) -> nn.Module:
    """Give BN scales, shifts and running statistics that differ from 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


def results(model: nn.Module, images: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output, every gradient and every buffer after one forward and backward pass."""
    images = images.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(images)
    output.backward(torch.ones_like(output) if grad is None else grad.to(output.dtype))
    found = {"output": output.detach(), "grad images": images.grad}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(
    model: nn.Module, eager: nn.Module, images: Tensor, tolerance: float = CLOSE
) -> None:
    """model's results are eager's, to the roundings of WIRING, which both are in."""
    torch.manual_seed(1)
    theirs = results(eager, images)
    torch.manual_seed(1)
    ours = results(model, images)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor,
            theirs[name],
            rtol=tolerance,
            atol=tolerance * max(1.0, theirs[name].abs().max().item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def clear_images(eager: nn.Module, *shape: int) -> Tensor:
    """Random images for which no BN's output is so close to 0 that a rounding decides ReLU's side.

    One activation that falls on the other side outweighs all other errors together.
    """
    model, smallest = copy.deepcopy(eager).double(), []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, z: smallest.append(z.abs().min().item()))
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(shape, generator=generator)
        smallest.clear()
        model(images.double())
        if min(smallest) > 1e-5:
            return images.contiguous(memory_format=torch.channels_last)
    raise AssertionError("no images without an activation near 0; take fewer values")


def assert_rule(
    model: nn.Module,
    eager: nn.Module,
    images: Tensor,
    *,
    autocast: torch.dtype | None = None,
) -> None:
    """Hold model, in float32 or under autocast, to the tolerance rule of numerics.

    Each of its results is at most 1.5 times as far from float64 truth as eager's, plus a floor.
    Channels are not looked at one by one: the operators' own tests do that. model and eager have
    the same parameters and modes; both are left as they are.
    """
    grad = torch.randn_like(copy.deepcopy(eager)(images)) / math.sqrt(len(images))
    dtype = autocast or torch.float32
    eps = torch.finfo(dtype).eps
    truth = copy.deepcopy(eager).double()
    draws = [_rounded_results(truth, images.double(), grad, eps) for _ in range(numerics.DRAWS)]
    with torch.autocast("cpu", dtype, enabled=autocast is not None):
        ours, theirs = (results(copy.deepcopy(m), images, grad) for m in (model, eager))
    expected = numerics.expect(theirs, results(truth, images.double(), grad), draws, dtype)
    numerics.assert_close(ours, expected, by_channel=False)


def _rounded_results(model: nn.Module, images: Tensor, grad: Tensor, eps: float) -> dict:
    """Results where the input, parameters, layers' outputs and gradients, and what comes out

    each carry a random rounding error of up to eps / 2.
    """

    def perturb(tensor):
        return numerics.perturbed(tensor, eps) if tensor.is_floating_point() else tensor

    def round_output(module, args, output):
        rounded = output + (perturb(output) - output).detach()
        if rounded.requires_grad:
            rounded.register_hook(perturb)
        return rounded

    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(perturb(parameter))
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return {k: perturb(v) for k, v in results(model, perturb(images), perturb(grad)).items()}
