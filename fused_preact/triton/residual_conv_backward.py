"""residual_conv_backward: residual_grad, then both gradients of the convolution in the sum."""

from torch import Tensor

from .launch import operator
from .preact_conv_backward import preact_conv_backward
from .residual_grad import residual_grad


@operator
def residual_conv_backward(
    residual: Tensor | None,
    grad: Tensor,
    output: Tensor,
    output_affine: Tensor,
    output_sums: Tensor,
    weight: Tensor,
    input: Tensor,
    affine: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = residual_grad(residual, grad, output, output_affine, output_sums)
    conv = stride, padding, dilation, groups, activation
    gradients = preact_conv_backward(
        dy, None, None, None, weight, input, affine, None, *conv, True, allow_tf32
    )
    return dy, *gradients
