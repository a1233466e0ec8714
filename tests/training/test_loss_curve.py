"""Training with fused kernels follows the reference, step by step.

In float64: in float32 one rounding that moves a z across zero changes a gradient by up to 1%, each
step multiplies that, and after fifty steps a fused curve is as far from the reference's, by 1%, as
PyTorch's own layers are, and as one without the gradients of the BatchNorms' biases.
"""

from itertools import islice

import torch
import torch.nn.functional as F

import fused_preact
from fused_preact.training.data import batches, epoch_order, load_data


def loss_curve(backend: str) -> torch.Tensor:
    """The losses of 20 steps of SGD on digits, from the same weights on the same batches."""
    torch.manual_seed(0)
    model = fused_preact.create_model("preact_resnet8", 10).double()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    samples = load_data("digits", "data", None, seed=0).train
    order = epoch_order(len(samples), 0, 0)
    losses = []
    with fused_preact.backend(backend):
        for images, labels in islice(batches(samples, order, 0, 16, workers=0), 20):
            images = images.double().to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_loss_curve_lies_on_the_references():
    """To 1e-9: rounding alone moves a loss by some 1e-16, a gradient left out by 1e-5 and more."""
    reference, fused = (loss_curve(backend) for backend in ("reference", "cpu"))
    torch.testing.assert_close(fused, reference, rtol=1e-9, atol=0)
    assert reference[-5:].mean() < reference[:5].mean()  # there is something to follow
