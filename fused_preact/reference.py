"""Every operator and unit in plain PyTorch: the definition that each backend is held against.

The operators come first, with the signatures that all backends share; then the eager layers
themselves, which PyTorch differentiates on its own and tests take (in float64) for the truth.

What the operators hand each other, for an activation u of C channels and M = N*H*W values each:

    stats   (2, C)  mean and biased variance of u
    affine  (4, C)  mean, rstd = (var + eps)^-1/2, scale = gamma * rstd, shift = beta
    sums    (2, C)  S1 = sum g (= dbeta), S2 = sum g * (u - mean) * rstd (= dgamma)

all of them float32, or float64 where u is float64. He et al. 2016, arXiv:1603.05027.

allow_tf32 lets a backend round float32 to TF32 where it multiplies. PyTorch's convolutions, and
so the reference, go by torch.backends.cudnn instead; the CPU never rounds.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad as grad_of
from torch import Tensor

# --- operators -----------------------------------------------------------------------------------


def bn_stats(input: Tensor) -> Tensor:
    """Mean and biased variance of each channel of input (N, C, H, W): (2, C)."""
    var, mean = torch.var_mean(input.to(accumulator(input.dtype)), (0, 2, 3), correction=0)
    return torch.stack((mean, var))


def bn_affine(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """What BatchNorm applies, z = scale * (u - mean) + shift, from statistics (2, C): (4, C)."""
    mean, var = stats
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight * rstd
    shift = torch.zeros_like(mean) if bias is None else bias
    return torch.stack((mean, rstd, scale, shift))


def bn_update_running(
    running_mean: list[Tensor],
    running_var: list[Tensor],
    stats: list[Tensor],
    momentum: list[float],
    counts: list[int],
) -> None:
    """Moves running statistics, each (C,) of any dtype, towards those of a batch, (2, C), in place.

    By momentum of the way; the variance of counts values a channel is made unbiased. One after the
    other, so that a BatchNorm may come twice.
    """
    for mean, var, batch, step, count in zip(
        running_mean, running_var, stats, momentum, counts, strict=True
    ):
        batch_mean, batch_var = batch.to(mean.dtype)
        mean.lerp_(batch_mean, step)
        var.lerp_(batch_var * (count / (count - 1)), step)


def bn_relu_forward(input: Tensor, affine: Tensor, activation: str) -> Tensor:
    """h = act(scale * (u - mean) + shift), in input's dtype."""
    return _channels_last(_activate(_normalise(input, affine), activation).to(input.dtype))


def bn_relu_backward(
    grad: Tensor,
    input: Tensor,
    affine: Tensor,
    activation: str,
    with_sums: bool,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """g = grad * act'(z) and its sums; residual_grad turns both into the gradient of input.

    With frozen statistics nothing is left to do: the first result is the gradient of input,
    residual + scale * g. Without with_sums the second one is empty, (2, 0).
    """
    g = grad * _activation_slope(_normalise(input, affine), activation)
    if not frozen:
        g = _channels_last(g.to(input.dtype))
    sums = _sums(g, input, affine) if with_sums else _no_channels(input)
    if frozen:
        g = _per_channel(affine[2]) * g
        g = _channels_last((g if residual is None else residual + g).to(input.dtype))
    return g, sums


def preact_conv_forward(
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
    """y = conv(h, weight) + residual, its statistics, and bn_affine of these for who reads y.

    h = bn_relu_forward(input), or without affine input itself. padding is (top, bottom, left,
    right) and zero in h. Without with_stats the second result is empty, (2, 0), without next_eps
    the third, (4, 0).
    """
    h = input if affine is None else bn_relu_forward(input, affine, activation)
    with torch.autocast(input.device.type, enabled=False):
        output = conv2d(h, weight, stride, padding, dilation, groups)
    if residual is not None:
        output = output + residual
    output = _channels_last(output)
    stats = bn_stats(output) if with_stats else _no_channels(input)
    if next_eps is None:
        return output, stats, _no_channels(input, 4)
    return output, stats, bn_affine(stats, next_weight, next_bias, next_eps)


def preact_conv_dgrad(
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
    """g = (dgrad(dy, weight) + addend) * act'(z) and its sums.

    grad is dy itself; or, where output is given, the g of the BatchNorm that reads this
    convolution's output: its backward pass is finished here, dy = residual_grad(None, grad,
    output, output_affine, output_sums). Without affine, g = dgrad(dy, weight) + addend. frozen,
    residual and with_sums as in bn_relu_backward; without affine there are no sums either.
    """
    dy = _output_grad(grad, output, output_affine, output_sums)
    top, bottom, left, right = padding
    n, c, height, width = input.shape
    padded = (n, c, height + top + bottom, width + left + right)
    with torch.autocast(input.device.type, enabled=False):
        dh = grad_of.conv2d_input(padded, weight, dy, stride, 0, dilation, groups)
    dh = dh[:, :, top : top + height, left : left + width]
    if addend is not None:
        dh = dh + addend
    if affine is None:
        return _channels_last(dh), _no_channels(input)
    return bn_relu_backward(dh, input, affine, activation, with_sums, frozen, residual)


def preact_conv_wgrad(
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
    """dW = wgrad(h, dy), (K, C / groups, R, S) in the accumulator's dtype; h is computed again.

    In channels_last memory, where autograd takes it for a parameter's grad as it is.
    grad, output, output_affine and output_sums as in preact_conv_dgrad.
    """
    dy = _output_grad(grad, output, output_affine, output_sums)
    h = input if affine is None else bn_relu_forward(input, affine, activation)
    top, bottom, left, right = padding
    shape = (grad.shape[1], input.shape[1] // groups, *kernel_size)
    acc = accumulator(input.dtype)
    h = F.pad(h, (left, right, top, bottom))
    if tuple(kernel_size) == (1, 1):
        # The pixels that are read; given a stride, PyTorch's kernel for few channels writes past
        # its buffers (oneDNN on AVX2, torch 2.13 and 2.14).
        h, stride = h[:, :, :: stride[0], :: stride[1]], [1, 1]
    with torch.autocast(input.device.type, enabled=False):
        return _channels_last(
            grad_of.conv2d_weight(h.to(acc), shape, dy.to(acc), stride, 0, dilation, groups)
        )


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
    """g and its sums as preact_conv_dgrad has them, and dW as preact_conv_wgrad, bit for bit.

    For a backend that loads once what both of them read.
    """
    conv = stride, padding, dilation, groups, activation
    size = list(weight.shape[2:])
    dy = _output_grad(grad, output, output_affine, output_sums)
    dw = preact_conv_wgrad(dy, None, None, None, input, affine, size, *conv, allow_tf32)
    g, sums = preact_conv_dgrad(
        dy,
        None,
        None,
        None,
        weight,
        input,
        affine,
        addend,
        *conv,
        with_sums=with_sums,
        frozen=frozen,
        residual=residual,
    )
    return g, sums, dw


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
    """dy = residual_grad(residual, grad, output, ...), then g, sums and dW as of that dy.

    Of the last convolution of a residual unit: output is the sum, grad the g of the BatchNorm that
    reads it, residual what its shortcut gets. For a backend that multiplies dy as it is made.
    """
    dy = residual_grad(residual, grad, output, output_affine, output_sums)
    conv = stride, padding, dilation, groups, activation
    gradients = preact_conv_backward(
        dy, None, None, None, weight, input, affine, None, *conv, True, allow_tf32
    )
    return dy, *gradients


def residual_grad(
    grad: Tensor | None, g: Tensor, input: Tensor, affine: Tensor, sums: Tensor
) -> Tensor:
    """du = grad + scale * g + B * (u - mean) + C, the end of BatchNorm's backward pass.

    B = -scale * rstd * S2 / M and C = -scale * S1 / M. Without grad the first term is missing.
    """
    acc = accumulator(input.dtype)
    mean, rstd, scale, _ = (_per_channel(row) for row in affine)
    du = scale * g.to(acc)
    s1, s2 = (_per_channel(row) for row in sums / (input.numel() // input.shape[1]))
    du = du - scale * rstd * s2 * (input.to(acc) - mean) - scale * s1
    if grad is not None:
        du = du + grad
    return _channels_last(du.to(input.dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, reductions and weight gradients for activations of dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _output_grad(
    grad: Tensor, output: Tensor | None, affine: Tensor | None, sums: Tensor | None
) -> Tensor:
    if output is None:
        return grad
    assert affine is not None and sums is not None
    return residual_grad(None, grad, output, affine, sums)


def _normalise(input: Tensor, affine: Tensor) -> Tensor:
    mean, _, scale, shift = (_per_channel(row) for row in affine)
    return scale * (input.to(accumulator(input.dtype)) - mean) + shift


def _activate(z: Tensor, activation: str) -> Tensor:
    return F.relu(z) if activation == "relu" else F.silu(z)


def _activation_slope(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return (z > 0).to(z.dtype)
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sums(g: Tensor, input: Tensor, affine: Tensor) -> Tensor:
    acc = accumulator(input.dtype)
    mean, rstd = _per_channel(affine[0]), affine[1]
    g = g.to(acc)
    s1 = g.sum((0, 2, 3))
    s2 = (g * (input.to(acc) - mean)).sum((0, 2, 3)) * rstd
    return torch.stack((s1, s2))


def _per_channel(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _no_channels(input: Tensor, rows: int = 2) -> Tensor:
    return input.new_empty((rows, 0), dtype=accumulator(input.dtype))


# --- the eager layers ----------------------------------------------------------------------------
#
# bn is (weight, bias, running_mean, running_var, training, momentum, eps), conv is (weight, stride,
# padding, dilation, groups) with padding (top, bottom, left, right): see functional.py.


def bn_relu(input: Tensor, bn: Any, activation: str) -> Tensor:
    """activation(batch_norm(input)) by PyTorch's own layers."""
    weight, bias, running_mean, running_var, training, momentum, eps = bn[:7]
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(z) if activation == "relu" else F.silu(z)


def conv2d(
    h: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """conv2d(h, weight) by PyTorch's own layer; padding is (top, bottom, left, right)."""
    weight = weight.to(h.dtype)
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return F.conv2d(h, weight, None, stride, (top, left), dilation, groups)
    h = F.pad(h, (left, right, top, bottom))
    return F.conv2d(h, weight, None, stride, 0, dilation, groups)


def preact_unit(
    input: Tensor,
    bns: Sequence[Any],
    convs: Sequence[Any],
    shortcut: str | None,
    projection: Any,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """u[i+1] = conv[i](activation(bn[i](u[i]))), u[0] = input, plus the shortcut or residual."""
    u = h = input if bns[0] is None else bn_relu(input, bns[0], activation)
    if shortcut is not None:
        residual = h if shortcut == "preact" else input
        if projection is not None:
            residual = conv2d(residual, *projection)
    for i, (bn, conv) in enumerate(zip(bns, convs, strict=True)):
        u = conv2d(h if i == 0 else bn_relu(u, bn, activation), *conv)
    return u if residual is None else u + residual
