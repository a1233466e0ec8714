"""preact_conv_backward: both gradients of one convolution, wgrad and dgrad one after the other."""

from torch import Tensor

from .launch import operator
from .preact_conv_dgrad import preact_conv_dgrad
from .preact_conv_wgrad import preact_conv_wgrad


@operator
def preact_conv_backward(
    grad: Tensor,
    output: Tensor | None,
    output_affine: Tensor | None,
    output_sums: Tensor | None,
    weight: Tensor,
    input: Tensor,
    affine: Tensor | None,
    addend: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    with_sums: bool,
    allow_tf32: bool = False,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = grad, output, output_affine, output_sums
    conv = stride, padding, dilation, groups, activation
    dw = preact_conv_wgrad(*dy, input, affine, list(weight.shape[2:]), *conv, allow_tf32)
    g, sums = preact_conv_dgrad(
        *dy, weight, input, affine, addend, *conv, with_sums, allow_tf32, frozen, residual
    )
    return g, sums, dw
