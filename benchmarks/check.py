"""A wrong result is not timed: every contender's output and gradients against float64 truth."""

from collections.abc import Callable

import torch
from cases import Case
from torch import Tensor

# A contender may be this much further from the truth than eager is in the same dtype. Our units are
# held to the tests' rule. What is not ours draws roundings of its own and owes us no rule; and a
# network amplifies each rounding by its depth, and flips a ReLU where one moves an activation over
# zero, so that eager's error and ours are draws as well: there, twice that.
RULE, DRAW = 1.5, 3.0
OURS = ("cpu", "cuda", "triton")
# Eager may be lucky; spacings of the dtype, of the norm.
FLOOR = 8


def check(
    case: Case,
    steps: dict[str, Callable[[], list[Tensor]]],
    truth: Callable[[], list[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Raises AssertionError for a contender that is further from the truth than that."""
    true = [tensor.double() for tensor in truth()]
    eager = _errors(steps["eager"](), true)
    for name, step in steps.items():
        factor = RULE if case.group == "unit" and name in OURS else DRAW
        for error, theirs in zip(_errors(step(), true), eager, strict=True):
            limit = factor * theirs + FLOOR * torch.finfo(dtype).eps
            assert error <= limit, (
                f"{case.name} {case.passes}: {name} is {error:.2g} from float64, eager "
                f"{theirs:.2g}, allowed {limit:.2g}: not timed"
            )


def _errors(results: list[Tensor], true: list[Tensor]) -> list[float]:
    return [
        ((ours.double() - exact).norm() / exact.norm()).item()
        for ours, exact in zip(results, true, strict=True)
    ]
