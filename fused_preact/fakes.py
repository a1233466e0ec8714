"""The operators' shapes, dtypes and strides: their fake kernels for torch.compile.

A namespace like reference.py, of the same functions, which compute nothing.
"""

from typing import Any

import torch
from torch import Tensor

from . import reference


def bn_stats(input):
    return _vectors(input, 2, input.shape[1])


def bn_affine(stats, weight, bias, eps):
    _check_devices(stats, weight=weight, bias=bias)
    return stats.new_empty((4, stats.shape[1]))


def bn_update_running(running_mean, running_var, stats, momentum, counts):
    for mean, var, batch in zip(running_mean, running_var, stats, strict=True):
        _check_devices(batch, running_mean=mean, running_var=var)


def bn_relu_forward(input, affine, activation):
    _check_devices(input, affine=affine)
    return _activations(input, input.shape)


def bn_relu_backward(grad, input, affine, activation, with_sums, frozen=False, residual=None):
    return _activations(input, input.shape), _vectors(input, 2, input.shape[1] * with_sums)


def preact_conv_forward(
    input,
    affine,
    weight,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
    with_stats,
    allow_tf32=False,
    next_weight=None,
    next_bias=None,
    next_eps=None,
):
    _check_devices(input, affine=affine, weight=weight, residual=residual)
    size = output_size(input.shape, weight.shape[2:], stride, padding, dilation)
    output = _activations(input, (input.shape[0], weight.shape[0], *size))
    stats = _vectors(input, 2, weight.shape[0] if with_stats else 0)
    return output, stats, _vectors(input, 4, 0 if next_eps is None else weight.shape[0])


def preact_conv_dgrad(
    grad,
    output,
    output_affine,
    output_sums,
    weight,
    input,
    affine,
    addend,
    stride,
    padding,
    dilation,
    groups,
    activation,
    with_sums,
    allow_tf32=False,
    frozen=False,
    residual=None,
):
    _check_devices(input, grad=grad, weight=weight, affine=affine)
    channels = 0 if affine is None or not with_sums else input.shape[1]
    return _activations(input, input.shape), _vectors(input, 2, channels)


def preact_conv_wgrad(
    grad,
    output,
    output_affine,
    output_sums,
    input,
    affine,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    activation,
    allow_tf32=False,
):
    shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    return _activations(input, shape).to(reference.accumulator(input.dtype))


def preact_conv_backward(grad, output, output_affine, output_sums, weight, input, *rest):
    g, sums = preact_conv_dgrad(grad, output, output_affine, output_sums, weight, input, *rest)
    return g, sums, _activations(input, weight.shape).to(reference.accumulator(input.dtype))


def residual_conv_backward(
    residual, grad, output, output_affine, output_sums, weight, input, affine, *rest
):
    gradients = preact_conv_backward(
        *(grad, output, output_affine, output_sums, weight, input, affine, None),
        *(*rest[:5], True),
    )
    return _activations(input, grad.shape), *gradients


def residual_grad(grad, g, input, affine, sums):
    return _activations(input, input.shape)


def output_size(
    input_shape: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[Any, Any]:
    """Height and width of a convolution's output; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    height = input_shape[2] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1
    width = input_shape[3] + left + right - dilation[1] * (kernel_size[1] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1


def _check_devices(input: Tensor, **tensors: Tensor | None) -> None:
    """A tensor on "meta" among others leads here too: its weights were never loaded."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{name}: expected a tensor on {input.device}, as the input is, got one on "
                f"{tensor.device}"
            )


def _vectors(like: Tensor, rows: int, channels: int | torch.SymInt) -> Tensor:
    return like.new_empty((rows, channels), dtype=reference.accumulator(like.dtype))


def _activations(like: Tensor, shape: Any) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
