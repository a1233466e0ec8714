"""A whole training step of ResNet-20 against the reference."""

import copy

import torch
import torch.nn.functional as F

import fused_preact
from fused_preact import PreActBlock, PreActResNet


def _step(model, images, labels, backend):
    """Loss, gradients, and what one step of SGD and the batch make of the model."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    with fused_preact.backend(backend):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    optimizer.step()
    grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), **grads, **model.state_dict()}


def test_resnet20():
    """Every result at most 1.5x as far from float64 truth as the reference's in float32.

    The floor is what 20 layers make of float32's spacing.
    """
    model = PreActResNet(PreActBlock, (3, 3, 3), widths=(16, 32, 64))
    images, labels = torch.randn(3, 3, 9, 9), torch.randint(10, (3,))
    truth = _step(model.double(), images.double(), labels, "reference")
    model, floor = model.float(), 100 * torch.finfo(torch.float32).eps
    ours = _step(model, images, labels, "triton")
    theirs = _step(model, images, labels, "reference")
    for name, true in truth.items():
        if not true.is_floating_point():
            assert torch.equal(ours[name], true), name
            continue
        error, allowed = ((x[name] - true).norm() for x in (ours, theirs))
        assert error <= 1.5 * allowed + floor * true.norm(), name
