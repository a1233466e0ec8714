"""Concatenations of lists that grow, as a dense block's layers read them.

Each layer concatenates what all layers before it gave. But for its last part that is what the
layer before has concatenated: copied from there it is two long pieces of a pixel instead of many
short ones, and in the backward pass its gradient is added as one tensor, not part by part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .. import ops


class _Seen(NamedTuple):
    """A tensor as it was."""

    tensor: TensorWeakRef
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> "_Seen":
        return cls(TensorWeakRef(tensor), tensor._version)

    def unchanged(self) -> Tensor | None:
        """It, if it still exists and nobody has written to it."""
        tensor = self.tensor()
        return tensor if tensor is not None and tensor._version == self.version else None


class _Concatenated(NamedTuple):
    parts: list[_Seen]
    dim: int
    result: _Seen


# By a list's first part, the last that began with it. Not an attribute of the part: whoever saves
# that to a file would have to save this.
_last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def concatenate(tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """torch.cat(tensors, dim); where all but the last were concatenated before, from that."""
    if not tensors or torch.compiler.is_compiling() or ops.is_transformed():
        return torch.cat(tensors, dim)
    if any(tensor.is_inference() for tensor in tensors):  # nobody counts what is written to them
        return torch.cat(tensors, dim)
    before = _concatenated_before(tensors[:-1], dim)
    result = torch.cat(tensors if before is None else (before, tensors[-1]), dim)
    seen = _Concatenated([*map(_Seen.now, tensors)], dim, _Seen.now(result))
    _last[tensors[0]] = seen
    return result


def _concatenated_before(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    seen = _last.get(tensors[0]) if tensors else None
    if seen is None or seen.dim != dim or len(seen.parts) != len(tensors):
        return None
    if any(part.unchanged() is not own for part, own in zip(seen.parts, tensors, strict=True)):
        return None
    result = seen.result.unchanged()
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return result if result is not None and result.requires_grad == wants_grad else None
