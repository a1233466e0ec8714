"""Pre-activation ResNets in plain PyTorch layers, with the names of the CIFAR implementation.

What the modules of fused_preact are held against: same children, same arithmetic, no fused code.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import numerics


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


def assert_same(model: nn.Module, eager: nn.Module, images: Tensor, *, exact=False) -> None:
    """model's results are eager's, to float64's roundings; both are in float64."""
    torch.manual_seed(1)
    theirs = results(eager, images)
    torch.manual_seed(1)
    ours = results(model, images)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        tolerance = 0 if exact else 1e-9
        torch.testing.assert_close(
            tensor,
            theirs[name],
            rtol=tolerance,
            atol=tolerance * max(1.0, theirs[name].abs().max().item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_rule(
    model: nn.Module,
    eager: nn.Module,
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    by_channel: bool = True,
) -> None:
    """Hold model to the tolerance rule of numerics: its error is at most 1.5 times eager's.

    model and eager have the same parameters; both are left as they are.
    """
    grad = torch.randn_like(eager.train(model.training)(images)) / math.sqrt(len(images))
    truth = copy.deepcopy(eager).double()
    draws = [
        results(_rounding(truth, torch.finfo(dtype).eps), images.double(), grad) for _ in range(4)
    ]
    numerics.assert_close(
        results(copy.deepcopy(model).to(dtype), images.to(dtype), grad),
        results(copy.deepcopy(eager).to(dtype), images.to(dtype), grad),
        results(copy.deepcopy(truth), images.double(), grad),
        draws,
        dtype,
        by_channel=by_channel,
    )


def _rounding(model: nn.Module, eps: float) -> nn.Module:
    """A copy whose layers' outputs and gradients each carry a rounding error of eps / 2."""

    def round_output(module, args, output):
        rounded = output + (numerics.perturbed(output, eps) - output).detach()
        rounded.register_hook(lambda grad: numerics.perturbed(grad, eps))
        return rounded

    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(numerics.perturbed(parameter, eps))
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(round_output)
    return model
