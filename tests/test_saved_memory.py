"""What a unit saves for its backward pass."""

import pytest
import torch

from fused_preact import PreActBlock, PreActBottleneck
from fused_preact.ops import backend


def saved_activation_bytes(block: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct four-dimensional tensors saved for backward, parameters left out."""
    weights = {p.data_ptr() for p in block.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x)
    assert output.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize(
    ("block", "saved"),
    [
        # x with 64 channels, u2 and u3 with 16 each
        (PreActBottleneck(64, 16), 64 + 16 + 16),
        # x and u2 with 64 channels each
        (PreActBlock(64, 64), 64 + 64),
    ],
    ids=["bottleneck", "basic"],
)
def test_a_unit_saves_half_of_what_eager_saves(block, saved):
    """Exactly the raw inputs of the convolutions; eager saves each activated copy as well."""
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    element = 2 * 8 * 8 * 4
    assert saved_activation_bytes(block, x) == saved * element
    with backend("eager"):
        assert saved_activation_bytes(block, x) == 2 * saved * element
