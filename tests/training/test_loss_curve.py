"""Training with fused kernels follows the reference, step by step."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import fused_preact
from fused_preact.training.data import batches, epoch_order, load_data

STEPS = 50


def loss_curve(backend: str, dtype: torch.dtype) -> torch.Tensor:
    """The losses of 50 steps of SGD on digits, from the same weights on the same batches."""
    torch.manual_seed(0)
    model = fused_preact.create_model("preact_resnet8", 10)
    model.to(dtype=dtype, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    samples = load_data("digits", "data", None, seed=0).train
    orders = [index for epoch in range(4) for index in epoch_order(len(samples), 0, epoch)]
    losses = []
    with fused_preact.backend(backend):
        for images, labels in islice(batches(samples, orders, 0, 64, workers=0), STEPS):
            images = images.to(dtype=dtype, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module")
def truth():
    return loss_curve("reference", torch.float64)


def test_loss_curve_lies_on_the_references(truth):
    """The fused float32 curve is as near to the float64 curve as the reference's float32 one.

    Each step multiplies what rounding has set apart, so after 50 steps no fixed number of digits
    agrees. The measure is therefore how far the reference itself is led off by float32. Two
    courses of equal rounding differ by chance: 4 times that is allowed, and 1e-5 at the least.
    """
    reference, fused = (
        (loss_curve(backend, torch.float32) - truth).abs() for backend in ("reference", "cpu")
    )
    assert truth[-5:].mean() < 0.5 * truth[:5].mean()  # it does learn
    assert (fused <= 4 * reference.cummax(0).values + 1e-5).all()
