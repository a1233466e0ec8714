"""Training with fused kernels follows the reference, step by step."""

from itertools import islice

import torch
import torch.nn.functional as F

import fused_preact
from fused_preact.training.data import batches, epoch_order, load_data


def loss_curve(backend: str) -> torch.Tensor:
    """The losses of 50 steps of SGD on digits, from the same weights on the same batches."""
    torch.manual_seed(0)
    model = fused_preact.create_model("preact_resnet8", 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    samples = load_data("digits", "data", None, seed=0).train
    order = [index for epoch in range(3) for index in epoch_order(len(samples), 0, epoch)]
    losses = []
    with fused_preact.backend(backend):
        for images, labels in islice(batches(samples, order, 0, 64, workers=0), 50):
            loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses)


def test_loss_curve_lies_on_the_references():
    """The first loss is the reference's to rounding, all fifty are to 1%.

    No tighter: where rounding moves one z across zero, ReLU's mask changes and a gradient with it,
    by up to 1%, and each step multiplies that. Over four seeds the fused curve left the reference's
    by up to 0.5%, and the reference's in float64 did by up to 1.6%. No wider: with the gradients
    of the BNs' weights, of their biases or of the shortcuts left out, it leaves by more than 1%.
    """
    reference, fused = (loss_curve(backend) for backend in ("reference", "cpu"))
    torch.testing.assert_close(fused[0], reference[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(fused, reference, rtol=0.01, atol=0)
    assert reference[-5:].mean() < 0.85 * reference[:5].mean()  # there is something to follow
