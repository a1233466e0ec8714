"""Arguments for the operators: one pre-activated convolution with all that surrounds it; units."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numerics import make_case
from torch import Tensor

from fused_preact import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Means far from zero, beside a deviation of 1, of which 16 bits keep a digit or two.
FAR_MEANS = [(torch.float32, 1e4), (torch.bfloat16, 100.0)]
DEFERRED = (False, True)

ONE, X3, TWO, NONE, SAME = (1, 1), (3, 3), (2, 2), (0, 0, 0, 0), (1, 1, 1, 1)
GEOMETRIES = {  # name: input shape, convolution (channels, kernel size, stride, padding)
    "1x1": ((2, 16, 5, 7), (24, ONE, ONE, NONE)),
    "1x1 stride 2": ((2, 17, 5, 7), (8, ONE, TWO, NONE)),
    "1x1 stride (1, 2)": ((3, 8, 4, 12), (3, ONE, (1, 2), NONE)),
    "1x1 stride 3 padded": ((2, 3, 4, 6), (17, ONE, (3, 3), (1, 0, 2, 1))),
    "1x1 image": ((3, 65, 1, 1), (17, ONE, ONE, NONE)),
    "1x1 many rows": ((2, 64, 56, 56), (48, ONE, ONE, NONE)),
    "3x3": ((2, 16, 5, 7), (24, X3, ONE, SAME)),
    "3x3 stride 2": ((2, 17, 5, 7), (16, X3, TWO, SAME)),
    "3x3 stride (1, 2)": ((2, 16, 7, 8), (70, X3, (1, 2), SAME)),
    "3x3 stride (2, 1)": ((2, 3, 33, 9), (8, X3, (2, 1), SAME)),
    "3x3 stride 3 unpadded": ((2, 8, 5, 7), (8, X3, (3, 3), NONE)),
    "3x3 padded (0, 1, 0, 1)": ((2, 8, 6, 8), (8, X3, TWO, (0, 1, 0, 1))),
    "3x3 padded (2, 0, 1, 3)": ((2, 8, 5, 7), (8, X3, ONE, (2, 0, 1, 3))),
    "3x3 padded by 4": ((1, 3, 2, 3), (4, X3, TWO, (4, 4, 4, 4))),
    "3x3 on a 1x1 image": ((4, 8, 1, 1), (8, X3, ONE, SAME)),
    "3x3 of one channel": ((2, 1, 5, 7), (1, X3, ONE, SAME)),
    "3x3 of 200 channels": ((1, 200, 5, 7), (65, X3, ONE, SAME)),
    "3x3 many images": ((40, 16, 8, 8), (16, X3, ONE, SAME)),
    "3x3 many rows": ((2, 24, 56, 56), (16, X3, ONE, SAME)),
    "2x2": ((2, 8, 5, 7), (8, (2, 2), TWO, NONE)),
    "3x1 stride 2 padded": ((2, 8, 7, 6), (8, (3, 1), TWO, (0, 0, 2, 1))),
    "1x3": ((2, 8, 5, 7), (8, (1, 3), ONE, (0, 0, 1, 1))),
    "5x5": ((2, 8, 5, 7), (8, (5, 5), ONE, (2, 2, 2, 2))),
    "7x7": ((1, 3, 33, 9), (8, (7, 7), TWO, (3, 3, 3, 3))),
}


@dataclass
class Operands:
    input: Tensor
    affine: Tensor
    weight: Tensor
    residual: Tensor
    addend: Tensor
    grad: Tensor  # what arrives at the convolution's output, or at the BatchNorm behind it
    deferred: tuple[Tensor | None, Tensor | None, Tensor | None]  # output, its affine and sums
    geometry: tuple  # stride, padding, dilation, groups


def operands(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    conv: tuple,
    *,
    deferred: bool = False,
    mean: float = 0.0,
    seed: int = 0,
) -> Operands:
    """Random operands of a convolution; deferred: is its output's BatchNorm yet to be finished."""
    case = make_case(dtype, shape, [conv], residual=True, mean=mean, seed=seed)
    (bn,), (layer,) = case.bns, case.convs
    generator = torch.Generator().manual_seed(seed + 1)
    acc = reference.accumulator(dtype)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def channels_last(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).contiguous(memory_format=torch.channels_last)

    def affine_of(tensor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stats = reference.bn_stats(tensor.double())
        return reference.bn_affine(stats, weight.double(), bias.double(), 1e-5).to(acc)

    channels = conv[0]
    output = channels_last(randn(*case.grad_output.shape) + mean)
    count = output.numel() // channels
    sums = (randn(2, channels) * count**0.5).to(acc)
    return Operands(
        input=case.input,
        affine=affine_of(case.input, bn.weight, bn.bias),
        weight=layer.weight,
        residual=case.residual,
        addend=channels_last(randn(*shape)),
        grad=channels_last(case.grad_output),
        deferred=(output, affine_of(output, randn(channels), randn(channels)), sums)
        if deferred
        else (None, None, None),
        geometry=layer[1:],
    )


def calls_with(input: Tensor) -> dict[str, tuple]:
    """Arguments of every operator that reads an input, everything else fitting to this one."""
    n, c, height, width = input.shape
    affine, sums = torch.ones(4, c), torch.ones(2, c)
    weight, grad = torch.ones(3, c, 1, 1), torch.ones(n, 3, height, width)
    rest = list(ONE), list(NONE), [1, 1], 1, "relu"
    dy = grad, None, None, None
    return {
        "bn_stats": (input,),
        "bn_relu_forward": (input, affine, "relu"),
        "bn_relu_backward": (input, input, affine, "relu", True),
        "preact_conv_forward": (input, affine, weight, None, *rest, True),
        "preact_conv_dgrad": (*dy, weight, input, affine, None, *rest, True),
        "preact_conv_wgrad": (*dy, input, affine, [1, 1], *rest),
        "preact_conv_backward": (*dy, weight, input, affine, None, *rest, True),
        "residual_conv_backward": (
            *(None, grad, grad, torch.ones(4, 3), torch.ones(2, 3)),
            *(weight, input, affine, *rest),
        ),
        "residual_grad": (None, input, input, affine, sums),
    }


@dataclass(frozen=True)
class UnitsOperands:
    """Operands of units one after the other."""

    input: Tensor
    residual: Tensor | None
    grad: Tensor
    weights: list[Tensor]
    bn_weights: list[Tensor | None]
    bn_biases: list[Tensor | None]
    stats: list[Tensor | None]
    batch_stats: list[bool]
    projections: list[Tensor | None]
    depths: list[int]
    geometries: list[int]
    shortcuts: list[str]
    composed: list[bool] = field(default_factory=list)

    def forward(self, *, with_stats: bool, for_backward: bool) -> tuple[Any, ...]:
        """Arguments of preact_units_forward."""
        vectors = self.bn_weights, self.bn_biases, self.stats, [1e-5] * len(self.weights)
        layers = self.projections, self.depths, self.geometries, self.shortcuts, "relu"
        rest = *layers, with_stats, for_backward, False, self.composed
        return self.input, self.residual, self.weights, *vectors, *rest

    def backward(
        self,
        inputs: list[Tensor],
        affines: list[Tensor],
        needs_input: bool,
        needs_weights: bool | list[bool],
        needs_sums: bool | list[bool],
        needs_projections: bool,
    ) -> tuple[Any, ...]:
        """Arguments of preact_units_backward; a bool stands for all of its list."""

        def each(needs: bool | list[bool]) -> list[bool]:
            return needs if isinstance(needs, list) else [needs] * len(self.weights)

        layers = self.projections, self.depths, self.geometries, self.shortcuts, "relu"
        saved = [self.input, *inputs], affines, self.weights, self.batch_stats
        wanted = each(needs_weights), each(needs_sums)
        projected = [needs_projections and weight is not None for weight in self.projections]
        rest = projected, False, self.composed
        return self.grad, *saved, *layers, needs_input, *wanted, *rest


def units_operands(
    dtype: torch.dtype,
    units: list[tuple[list[tuple[int, int, int]], str, int | None]],
    takes_batch: Callable[[int], bool],
    raw: bool,
) -> UnitsOperands:
    """Random operands of units on an input of 16 channels.

    Each unit is its convolutions (filters, kernel, stride), its shortcut, and the filters of its
    projection or None. takes_batch: whether the BatchNorm of a convolution takes the batch's
    statistics. raw: the first convolution has no BatchNorm.
    """
    generator = torch.Generator().manual_seed(0)
    acc = reference.accumulator(dtype)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def activation(*size: int) -> Tensor:
        return randn(*size).to(dtype).contiguous(memory_format=torch.channels_last)

    channels, height, width = 16, 6, 5
    input = activation(3, channels, height, width)
    o = UnitsOperands(input, None, input, *([] for _ in range(9)))
    for convs, shortcut, projection in units:
        unit_channels, unit_stride = channels, 1
        for filters, kernel, stride in convs:
            k = len(o.weights)
            o.weights.append(activation(filters, channels, kernel, kernel) * 0.3)
            for vectors in o.bn_weights, o.bn_biases:
                vectors.append(None if k % 3 == 2 else randn(channels).to(acc))
            batch = takes_batch(k)
            stats = torch.stack((randn(channels), randn(channels).square() + 0.5)).to(acc)
            if k == 0 and batch:
                stats = reference.bn_stats(input)
            no_bn = k == 0 and raw
            o.stats.append(None if no_bn or (k > 0 and batch) else stats)
            o.batch_stats.append(batch and not no_bn)
            o.geometries.extend((stride, stride, *(kernel // 2,) * 4, 1, 1, 1))
            channels, unit_stride = filters, unit_stride * stride
            height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        o.depths.append(len(convs))
        o.shortcuts.append(shortcut)
        o.projections.append(None)
        if projection is not None:
            o.projections[-1] = activation(projection, unit_channels, 1, 1) * 0.3
            o.geometries.extend((unit_stride, unit_stride, 0, 0, 0, 0, 1, 1, 1))
    output = 3, channels, height, width
    residual = activation(*output) if o.shortcuts[-1] == "none" else None
    return replace(o, residual=residual, grad=activation(*output))
