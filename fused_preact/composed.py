"""Pre-activated convolutions as PyTorch's convolution between the pointwise kernels of a backend.

    y = conv(bn_relu_forward(u)) + residual, then bn_stats(y)
    g = bn_relu_backward(dgrad(residual_grad(g', u')))      dW = wgrad(bn_relu_forward(u), dy)

Three more passes over memory than a fused kernel, for layers so wide that arithmetic is what counts
and the vendor's convolution is faster at it (see ops.plan_convs); and for grouped and dilated ones.
The same operators as reference.py defines, but that dW comes in the dtype of the activations, as
PyTorch rounds it: another pass over a wide weight would not bring back what is lost. h and dy are
computed again, never saved. TF32 is as torch.backends.cudnn has it when the convolution runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


class Composed:
    """The convolutions, between the pointwise operators of the namespace kernels."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def preact_conv_forward(
        self,
        input: Tensor,
        affine: Tensor | None,
        weight: Tensor,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        activation: str,
        with_stats: bool,
        allow_tf32: bool = False,
        next_weight: Tensor | None = None,
        next_bias: Tensor | None = None,
        next_eps: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(input.device.type, enabled=False):
            h = self._activated(input, affine, activation)
            output = _channels_last(reference.conv2d(h, weight, stride, padding, dilation, groups))
        if residual is not None:
            output = output.add_(residual)
        stats = self.kernels.bn_stats(output) if with_stats else _no_channels(input)
        if next_eps is None:
            return output, stats, _no_channels(input, 4)
        return output, stats, self.kernels.bn_affine(stats, next_weight, next_bias, next_eps)

    def preact_conv_dgrad(
        self,
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
    ) -> tuple[Tensor, Tensor]:
        dy = self._output_grad(grad, output, output_affine, output_sums)
        top, bottom, left, right = padding
        symmetric = top == bottom and left == right
        n, c, height, width = input.shape
        source = input
        if not symmetric:
            source = input.new_empty(n, c, height + top + bottom, width + left + right)
        inner = (top, left) if symmetric else (0, 0)
        dh, _, _ = _convolution_backward(
            dy, source, weight, stride, inner, dilation, groups, [True, False, False]
        )
        if not symmetric:
            dh = dh[:, :, top : top + height, left : left + width]
        return self._input_grad(dh, input, affine, addend, activation, with_sums, frozen, residual)

    def preact_conv_wgrad(
        self,
        grad: Tensor,
        output: Tensor | None,
        output_affine: Tensor | None,
        output_sums: Tensor | None,
        input: Tensor,
        affine: Tensor | None,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        activation: str,
        allow_tf32: bool = False,
    ) -> Tensor:
        dy = self._output_grad(grad, output, output_affine, output_sums)
        h = self._activated(input, affine, activation)
        top, bottom, left, right = padding
        inner = (top, left)
        if tuple(kernel_size) == (1, 1) or top != bottom or left != right:
            h, inner = F.pad(h, (left, right, top, bottom)), (0, 0)
        if tuple(kernel_size) == (1, 1):
            # PyTorch's own strided kernel writes past its buffers, see reference.py.
            h, stride = _channels_last(h[:, :, :: stride[0], :: stride[1]]), [1, 1]
        weight = torch.empty(
            (grad.shape[1], input.shape[1] // groups, *kernel_size),
            dtype=h.dtype,
            device=h.device,
            memory_format=torch.channels_last,
        )
        _, dw, _ = _convolution_backward(
            dy, h, weight, stride, inner, dilation, groups, [False, True, False]
        )
        return _channels_last(dw)

    def preact_conv_backward(
        self,
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
        dy = self._output_grad(grad, output, output_affine, output_sums)
        if not _same_source(weight.shape[2:], stride, padding):
            conv = stride, padding, dilation, groups, activation
            size = list(weight.shape[2:])
            dw = self.preact_conv_wgrad(dy, None, None, None, input, affine, size, *conv)
            ends: dict[str, Any] = {"with_sums": with_sums, "frozen": frozen, "residual": residual}
            g, sums = self.preact_conv_dgrad(
                dy, None, None, None, weight, input, affine, addend, *conv, **ends
            )
            return g, sums, dw
        h = self._activated(input, affine, activation)
        dh, dw, _ = _convolution_backward(
            dy, h, weight, stride, padding[::2], dilation, groups, [True, True, False]
        )
        g, sums = self._input_grad(
            dh, input, affine, addend, activation, with_sums, frozen, residual
        )
        return g, sums, _channels_last(dw)

    def residual_conv_backward(
        self,
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
        dy = self.kernels.residual_grad(residual, grad, output, output_affine, output_sums)
        conv = stride, padding, dilation, groups, activation
        gradients = self.preact_conv_backward(
            dy, None, None, None, weight, input, affine, None, *conv, True, allow_tf32
        )
        return dy, *gradients

    def _input_grad(
        self,
        dh: Tensor,
        input: Tensor,
        affine: Tensor | None,
        addend: Tensor | None,
        activation: str,
        with_sums: bool,
        frozen: bool,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dh = _channels_last(dh)
        if addend is not None:
            dh = dh.add_(addend)
        if affine is None:
            return dh, _no_channels(input)
        return self.kernels.bn_relu_backward(
            dh, input, affine, activation, with_sums, frozen, residual
        )

    def _activated(self, input: Tensor, affine: Tensor | None, activation: str) -> Tensor:
        if affine is None:
            return input
        return self.kernels.bn_relu_forward(input, affine, activation)

    def _output_grad(
        self, grad: Tensor, output: Tensor | None, affine: Tensor | None, sums: Tensor | None
    ) -> Tensor:
        if output is None:
            return grad
        return self.kernels.residual_grad(None, grad, output, affine, sums)


def _same_source(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether PyTorch can take both gradients at once: h needs no padding or gaps of its own."""
    if tuple(kernel_size) == (1, 1):
        return tuple(stride) == (1, 1) and not any(padding)
    return padding[0] == padding[1] and padding[2] == padding[3]


def _convolution_backward(dy, input, weight, stride, padding, dilation, groups, wanted):
    return torch.ops.aten.convolution_backward(
        dy,
        _channels_last(input),
        _channels_last(weight),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        wanted,
    )


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _no_channels(input: Tensor, rows: int = 2) -> Tensor:
    return input.new_empty((rows, 0), dtype=reference.accumulator(input.dtype))
