"""What the operators refuse, called directly: every backend in the same words."""

import re

import pytest
import torch
from operands import calls_with

INPUT = torch.ones(2, 4, 3, 3)
CALLS = calls_with(INPUT)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_no_value(name, shape, operators):
    """No image, no channel or no pixel: the same call runs where there is one."""
    getattr(operators, name)(*CALLS[name])
    message = re.escape(f"input: expected at least one value, got shape {shape}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        getattr(operators, name)(*calls_with(torch.ones(shape))[name])


@pytest.mark.parametrize("name", CALLS)
def test_not_four_dimensions(name, operators):
    """Likewise a matrix, or one image."""
    for shape in (2, 4), (4, 3, 3):
        args = [torch.ones(shape) if arg is INPUT else arg for arg in CALLS[name]]
        message = re.escape(f"input: expected (N, C, H, W), got shape {shape}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            getattr(operators, name)(*args)
