"""A wrong result is not timed: every contender's output and gradient against eager's."""

from collections.abc import Callable

import torch
from cases import Case
from torch import Tensor

# Of the norm of the output and of all gradients together. A rounding that moves an activation over
# zero flips a ReLU, and with it one value in millions of a gradient; networks amplify that by their
# depth: there only a broken result is caught. The tests hold the results to much less.
UNIT = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
NETWORK = {torch.float32: 2.5e-1, torch.bfloat16: 5e-1}


def check(case: Case, steps: dict[str, Callable[[], list[Tensor]]], dtype: torch.dtype) -> None:
    """Raises AssertionError for a contender whose results are not those of "eager"."""
    expected = [tensor.float() for tensor in steps["eager"]()]
    tolerance = (UNIT if case.group == "unit" else NETWORK)[dtype]
    for name, step in steps.items():
        for ours, theirs in zip(step(), expected, strict=True):
            error = (ours.float() - theirs).norm() / theirs.norm()
            assert error <= tolerance, (
                f"{case.name} {case.passes}: {name} is {error:.2g} from eager, "
                f"more than {tolerance}: not timed"
            )
