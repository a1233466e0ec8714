"""Shapes and data for each operator: small and odd, so that every edge of a tile is met."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from operands import operands
from torch import Tensor

from fused_preact import reference

SANITIZED = "PREACT_EMULATOR" in os.environ  # run once more, by test_sanitizers


class Shape(NamedTuple):
    images: int
    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)


SHAPES = [
    Shape(1, 8, 1, 1, 8, (1, 1)),
    Shape(2, 64, 8, 8, 64, (1, 1)),
    Shape(3, 72, 7, 7, 136, (1, 1)),
    Shape(2, 16, 6, 6, 8, (1, 1), (2, 2)),
    Shape(2, 8, 5, 7, 16, (3, 3), padding=(1, 1, 1, 1)),
    Shape(1, 40, 16, 16, 24, (3, 3), padding=(1, 1, 1, 1)),
    Shape(3, 16, 4, 4, 16, (3, 3), padding=(1, 1, 1, 1)),
    Shape(3, 3, 5, 6, 5, (3, 3), (2, 2), (1, 1, 1, 1)),
    Shape(2, 8, 7, 7, 72, (3, 3), (2, 2), (0, 1, 0, 1)),
    Shape(1, 65, 4, 9, 70, (3, 3), padding=(1, 1, 1, 1)),
    Shape(2, 40, 5, 5, 24, (3, 2), (1, 2), (1, 0, 2, 1)),
    Shape(1, 8, 9, 9, 8, (7, 7), (2, 2), (3, 3, 3, 3)),
    Shape(1, 1, 2, 130, 1, (1, 1)),
    Shape(2, 64, 8, 16, 128, (1, 1)),
    Shape(2, 128, 9, 15, 200, (1, 1)),
    Shape(2, 256, 8, 16, 72, (1, 1)),
    Shape(3, 40, 7, 9, 72, (3, 3), (2, 2), (1, 1, 1, 1)),
    Shape(4, 8, 8, 8, 128, (3, 3), padding=(1, 1, 1, 1)),
    Shape(2, 128, 11, 13, 8, (3, 3), (2, 2), (1, 1, 1, 1)),
    Shape(2, 32, 6, 9, 32, (3, 3), padding=(1, 1, 1, 1)),
    Shape(2, 24, 7, 10, 32, (3, 3), (2, 2), (1, 1, 1, 1)),
]
# Of both gradients of a 1x1: all tiles; one and two groups of input channels, the last one
# narrower; spans that are no power of two; fewer pixels than a tile has, and a last tile with some.
POINTWISE = [
    Shape(2, 16, 1, 1, 16, (1, 1)),
    Shape(2, 64, 9, 8, 16, (1, 1)),
    Shape(2, 16, 8, 8, 64, (1, 1)),
    Shape(3, 32, 7, 7, 128, (1, 1)),
    Shape(1, 208, 3, 5, 48, (1, 1)),
    Shape(2, 48, 9, 5, 160, (1, 1)),
    Shape(1, 256, 6, 7, 64, (1, 1)),
    Shape(2, 64, 5, 7, 256, (1, 1)),
]
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def run(
    operators,
    shape: Shape,
    dtype: torch.dtype,
    activation: str,
    whole: bool,
    *,
    allow_tf32: bool = False,
    factor: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """Every operator on the same data, whoever runs it; whole: with all that is optional.

    factor is applied to all that is multiplied in convolutions.
    """
    generator = torch.Generator().manual_seed(1)

    def images(channels: int, height: int, width: int) -> Tensor:
        values = torch.randn(shape.images, channels, height, width, generator=generator)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    def vectors(rows: int, channels: int) -> Tensor:
        return torch.randn(rows, channels, generator=generator)

    n, c, k = shape.images, shape.channels, shape.filters
    u = images(c, shape.height, shape.width)
    weight = torch.randn(k, c, *shape.kernel, generator=generator)
    weight = (weight / (c * shape.kernel[0] * shape.kernel[1]) ** 0.5).to(dtype)
    if whole:
        weight = weight.contiguous(memory_format=torch.channels_last)
    stats = reference.bn_stats(u)
    gamma, beta = vectors(2, c)
    affine = reference.bn_affine(stats, gamma, beta, 1e-5)
    geometry = (shape.stride, shape.padding, (1, 1), 1)
    y, y_stats, _ = reference.preact_conv_forward(
        u, affine, weight, None, *geometry, activation, True
    )
    g, residual = images(k, *y.shape[2:]), images(k, *y.shape[2:])
    addend, dh = images(c, shape.height, shape.width), images(c, shape.height, shape.width)
    output_affine = reference.bn_affine(y_stats, vectors(1, k)[0], None, 1e-5)
    output_sums = vectors(2, k) * (n * y.shape[2] * y.shape[3] / 4)
    deferred = (g, y, output_affine, output_sums) if whole else (g, None, None, None)
    bn = affine if whole else None

    next_bn = {}
    if whole:
        next_bn = {"next_weight": vectors(1, k)[0], "next_bias": vectors(1, k)[0], "next_eps": 1e-5}
    u, g, weight, tf32 = factor(u), factor(g), factor(weight), {"allow_tf32": allow_tf32}
    deferred = (g, *deferred[1:])
    results = {
        "bn_stats": operators.bn_stats(u),
        "bn_affine": operators.bn_affine(stats, gamma, beta if whole else None, 1e-5),
        "bn_relu_forward": operators.bn_relu_forward(u, affine, activation),
        "residual_grad": operators.residual_grad(
            addend if whole else None, dh, u, affine, vectors(2, c)
        ),
        "preact_conv_wgrad": operators.preact_conv_wgrad(
            *deferred, u, bn, shape.kernel, *geometry, activation, **tf32
        ),
    }
    pairs = {
        "bn_relu_backward": operators.bn_relu_backward(dh, u, affine, activation, whole),
        "bn_relu_backward, frozen": operators.bn_relu_backward(
            dh, u, affine, activation, whole, True, addend if whole else None
        ),
        "preact_conv_dgrad, frozen": operators.preact_conv_dgrad(
            *(*deferred, weight, u, affine, None, *geometry, activation, whole),
            **tf32,
            frozen=True,
            residual=addend if whole else None,
        ),
        "preact_conv_forward": operators.preact_conv_forward(
            *(u, bn, weight, residual if whole else None),
            *(*geometry, activation, whole),
            **tf32,
            **next_bn,
        ),
        "preact_conv_dgrad": operators.preact_conv_dgrad(
            *(*deferred, weight, u, bn, addend if whole else None),
            *(*geometry, activation, whole),
            **tf32,
        ),
    }
    pairs["preact_conv_backward"] = operators.preact_conv_backward(
        *(*deferred, weight, u, bn, addend if whole else None),
        *(*geometry, activation, whole),
        **tf32,
    )
    if whole:
        pairs["residual_conv_backward"] = operators.residual_conv_backward(
            *(residual, *deferred, weight, u, affine, *geometry, activation), **tf32
        )
    for name, (activations, *reduced) in pairs.items():
        results |= {name: activations}
        results |= {f"{name} ({i})": vectors for i, vectors in enumerate(reduced)}
    return results


# Results of the convolutions' operators.
NAMES = {
    "preact_conv_forward": ("output", "stats", "affine"),
    "preact_conv_dgrad": ("g", "sums"),
    "preact_conv_wgrad": ("dweight",),
}


def calls(shape: Shape, dtype: torch.dtype, whole: bool) -> dict[str, tuple]:
    """The arguments of each convolution's operator; whole: with all that is optional."""
    images = (shape.images, shape.channels, shape.height, shape.width)
    conv = (shape.filters, shape.kernel, shape.stride, shape.padding)
    o = operands(dtype, images, conv, deferred=whole)
    affine, residual, addend = (o.affine, o.residual, o.addend) if whole else (None, None, None)
    weight = o.weight.contiguous(memory_format=torch.channels_last)
    dy = (o.grad, *o.deferred)
    return {
        "preact_conv_forward": (o.input, affine, weight, residual, *o.geometry, "relu", whole),
        "preact_conv_dgrad": (*dy, weight, o.input, affine, addend, *o.geometry, "relu", whole),
        "preact_conv_wgrad": (*dy, o.input, affine, shape.kernel, *o.geometry, "relu"),
    }


def results(operators, name: str, arguments: tuple) -> dict[str, torch.Tensor]:
    found = getattr(operators, name)(*arguments)
    found = found if isinstance(found, tuple | list) else (found,)
    return dict(zip(NAMES[name], found, strict=True))
