"""A wrong result is not timed: every contender's output and gradients against float64 truth."""

import torch
from cases import Case
from contenders import Contender
from operators import OperatorCase
from torch import Tensor

# A contender may be this much further from the truth than eager is in the same dtype, an operator
# of ours than its definition is. Our operators and units are held to the tests' rule. What is not
# ours draws roundings of its own and owes us no rule; and a network amplifies each rounding by its
# depth, and flips a ReLU where one moves an activation over zero, so that eager's error and ours
# are draws as well: there, twice that.
RULE, DRAW = 1.5, 3.0
# Eager may be lucky; spacings of the dtype, of the norm.
FLOOR = 8

AnyCase = Case | OperatorCase


def comparable(case: AnyCase, results: list[Tensor | None]) -> list[Tensor | None]:
    """A copy of what a step returned, all gradients of a module as one; None: not computed."""
    if case.group == "operator":
        return [None if result is None else result.clone() for result in results]
    output, *grads = results
    return [output.clone(), *([torch.cat([grad.flatten() for grad in grads])] if grads else [])]


def errors(results: list[Tensor | None], true: list[Tensor | None]) -> list[float | None]:
    """The relative error of each result, in norm."""
    return [
        None if ours is None else ((ours.double() - exact).norm() / exact.norm()).item()
        for ours, exact in zip(results, (t if t is None else t.double() for t in true), strict=True)
    ]


def check(
    case: AnyCase,
    contender: Contender,
    found: list[float | None],
    baseline: list[float | None],
    dtype: torch.dtype,
) -> None:
    """Raises AssertionError where an error found is further from baseline's than the rule says."""
    for error, theirs in zip(found, baseline, strict=True):
        if error is None:
            continue
        limit = _limit(case, contender, theirs, torch.finfo(dtype).eps)
        assert error <= limit, (
            f"{case.name} {case.passes}: {contender.name} is {error:.2g} from the truth, "
            f"the baseline {theirs:.2g}, allowed {limit:.2g}: not timed"
        )


def _limit(case: AnyCase, contender: Contender, theirs: float, eps: float) -> float:
    if case.group == "operator" and not contender.ours:
        return eps**0.5  # eager sums in its own order: half the digits tell that it is the same
    factor = RULE if case.group in ("operator", "unit") and contender.ours else DRAW
    return factor * theirs + FLOOR * eps
