"""The operators on single layers, each beside what PyTorch's own layers run in its place.

Shapes are those of the stages of the CIFAR and ImageNet networks: a bottleneck's 1x1 in, 3x3 and
1x1 out, and a basic unit's 3x3. All are of stride 1, as all but two units of a stage's are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contenders import Contender
from torch import Tensor

from fused_preact import backend, ops, reference

Results = list[Tensor | None]  # None: not computed
EPS = 1e-5
aten = torch.ops.aten


@dataclass(frozen=True)
class OperatorCase:
    """An operator on one convolution of a network.

    shape     of the convolution's input.
    channels  of its output.
    kernel    height and width of its filter.
    residual  whether a shortcut is added to its output.
    """

    operator: str
    label: str
    shape: tuple[int, int, int, int]
    channels: int
    kernel: int
    residual: bool
    quick: bool
    group: str = "operator"

    @property
    def name(self) -> str:
        return f"{self.operator}-{self.label}"

    @property
    def passes(self) -> str:
        return OPERATORS[self.operator].passes

    @property
    def counterpart(self) -> str:
        return OPERATORS[self.operator].counterpart

    def step(
        self, contender: Contender, dtype: torch.dtype, device: torch.device
    ) -> Callable[[int], Results]:
        """Runs the operator once on the operands of an index, for comparison and timing."""
        rotation = [_operands(self, dtype, device, i) for i in range(rotated(device))]
        operator = OPERATORS[self.operator]
        if contender.backend == "eager":
            run, arguments = operator.eager, [(operands,) for operands in rotation]
        else:
            with backend(contender.backend):
                run = getattr(ops.plan(rotation[0].input), self.operator)
            arguments = [operator.arguments(operands) for operands in rotation]

        def step(index: int) -> Results:
            given = arguments[index % len(arguments)]
            with torch.no_grad():
                results = run(*given)
            if results is None:  # bn_update_running, which writes to its first arguments
                return [*given[0], *given[1]]
            results = results if isinstance(results, tuple | list) else [results]
            # an empty result is one that nobody asked for
            return [t if t is None or t.numel() else None for t in results]

        return step


def rotated(device: torch.device) -> int:
    """How many inputs take turns: on a GPU, so that none is left in its caches."""
    return 4 if device.type == "cuda" else 1


class _Sum(NamedTuple):
    """A residual sum that the convolution ends in, and the BatchNorm that reads it."""

    output: Tensor
    gamma: Tensor
    affine: Tensor
    g: Tensor
    sums: Tensor


class _Operands(NamedTuple):
    """What a unit has at hand as it comes to this convolution; vectors in the accumulator."""

    input: Tensor  # u
    gamma: Tensor
    beta: Tensor
    stats: Tensor
    affine: Tensor
    running: tuple[list[Tensor], list[Tensor]]  # means and variances of a unit's BatchNorms
    h: Tensor  # what eager saves for the backward pass
    weight: Tensor
    residual: Tensor | None
    sum: _Sum | None
    dy: Tensor
    dh: Tensor
    g: Tensor
    sums: Tensor
    padding: int


def _operands(
    case: OperatorCase, dtype: torch.dtype, device: torch.device, index: int
) -> _Operands:
    generator = torch.Generator().manual_seed(index)
    acc = reference.accumulator(dtype)

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        # float32 numbers that bfloat16 holds: every dtype sees the same operands
        values = torch.randn(shape, generator=generator).bfloat16().to(device, of)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    n, c, height, width = case.shape
    k, size = case.channels, case.kernel
    input, dh = random(*case.shape), random(*case.shape)
    dy, weight = random(n, k, height, width), random(k, c, size, size) * (c * size**2) ** -0.5
    gamma, beta = random(c, of=acc), random(c, of=acc)
    stats = reference.bn_stats(input)
    affine = reference.bn_affine(stats, gamma, beta, EPS)
    g, sums = reference.bn_relu_backward(dh, input, affine, "relu", True)
    residual = residual_sum = None
    if case.residual:
        residual, output = random(n, k, height, width), random(n, k, height, width)
        of_output = random(k, of=acc), random(k, of=acc)
        bn = reference.bn_affine(reference.bn_stats(output), *of_output, EPS)
        gradients = reference.bn_relu_backward(dy, output, bn, "relu", True)
        residual_sum = _Sum(output, of_output[0], bn, *gradients)
    return _Operands(
        input,
        gamma,
        beta,
        stats,
        affine,
        ([random(c, of=acc) for _ in range(3)], [torch.ones_like(beta) for _ in range(3)]),
        reference.bn_relu_forward(input, affine, "relu"),
        weight,
        residual,
        residual_sum,
        dy,
        dh,
        g,
        sums,
        size // 2,
    )


# --- PyTorch's counterparts ----------------------------------------------------------------------


def _eager_bn_stats(o: _Operands) -> Results:
    running = torch.zeros_like(o.gamma), torch.ones_like(o.gamma)
    return [torch.stack(torch.batch_norm_update_stats(o.input, *running, 0.1))]


def _updates(o: _Operands) -> tuple[Any, ...]:
    """Arguments of bn_update_running for a bottleneck of three BatchNorms."""
    values = o.input.numel() // o.input.shape[1]
    return *o.running, [o.stats] * 3, [0.1] * 3, [values] * 3


def _eager_bn_update_running(o: _Operands) -> Results:
    reference.bn_update_running(*_updates(o))
    return [*o.running[0], *o.running[1]]


def _eager_bn_relu(o: _Operands) -> Results:
    return [F.relu(F.batch_norm(o.input, *o.stats, o.gamma, o.beta, False, 0.1, EPS))]


def _eager_conv(o: _Operands) -> Results:
    running = torch.zeros_like(o.gamma), torch.ones_like(o.gamma)
    h = F.relu(F.batch_norm(o.input, *running, o.gamma, o.beta, True, 0.1, EPS))
    y = F.conv2d(h, o.weight, None, 1, o.padding)
    return [y if o.residual is None else y + o.residual, None, None]


def _eager_conv_grad(o: _Operands, dy: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    padding = [o.padding] * 2
    return aten.convolution_backward(
        dy, o.h, o.weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
    )


def _eager_bn_grad(
    g: Tensor, input: Tensor, gamma: Tensor, affine: Tensor, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    mean, rstd = affine[0], affine[1]
    return aten.native_batch_norm_backward(g, input, gamma, None, None, mean, rstd, True, EPS, mask)


def _eager_relu_and_sums(o: _Operands, dh: Tensor) -> Results:
    g = aten.threshold_backward(dh, o.h, 0)
    _, dgamma, dbeta = _eager_bn_grad(g, o.input, o.gamma, o.affine, [False, True, True])
    return [g, torch.stack((dbeta, dgamma))]


def _eager_backward(o: _Operands, dy: Tensor) -> Results:
    dh, dw, _ = _eager_conv_grad(o, dy, [True, True, False])
    return [*_eager_relu_and_sums(o, dh), dw]


def _eager_sum_backward(o: _Operands) -> Results:
    s = o.sum
    dy = _eager_bn_grad(s.g, s.output, s.gamma, s.affine, [True, False, False])[0].add_(o.residual)
    return [dy, *_eager_backward(o, dy)]


def _eager_residual_grad(o: _Operands) -> Results:
    mask = [True, False, False]
    return [_eager_bn_grad(o.g, o.input, o.gamma, o.affine, mask)[0].add_(o.dh)]


def _dgrad_arguments(o: _Operands) -> tuple[Any, ...]:
    return o.dy, None, None, None, o.weight, o.input, o.affine, None, *_geometry(o), True


class _Operator(NamedTuple):
    passes: str
    counterpart: str  # what eager runs, in a line
    eager: Callable[[_Operands], Results]
    arguments: Callable[[_Operands], tuple[Any, ...]]


def _geometry(o: _Operands) -> tuple[Any, ...]:
    return [1, 1], [o.padding] * 4, [1, 1], 1, "relu"


OPERATORS = {
    "bn_stats": _Operator(
        "forward",
        "batch_norm_update_stats, the first half of batch_norm in training",
        _eager_bn_stats,
        lambda o: (o.input,),
    ),
    "bn_affine": _Operator(
        "forward",
        "the vector operations that it is made of",
        lambda o: [reference.bn_affine(o.stats, o.gamma, o.beta, EPS)],
        lambda o: (o.stats, o.gamma, o.beta, EPS),
    ),
    "bn_update_running": _Operator(
        "forward",
        "lerp_ of mean and variance, for the three BatchNorms of a bottleneck",
        _eager_bn_update_running,
        _updates,
    ),
    "bn_relu_forward": _Operator(
        "forward",
        "batch_norm with given statistics, relu",
        _eager_bn_relu,
        lambda o: (o.input, o.affine, "relu"),
    ),
    "bn_relu_backward": _Operator(
        "backward",
        "threshold_backward, batch_norm_backward's sums",
        lambda o: _eager_relu_and_sums(o, o.dh),
        lambda o: (o.dh, o.input, o.affine, "relu", True),
    ),
    "preact_conv_forward": _Operator(
        "forward",
        "batch_norm in training, relu, conv2d and, after a unit's last, the addition: statistics "
        "of its input where ours takes those of its output",
        _eager_conv,
        lambda o: (o.input, o.affine, o.weight, o.residual, *_geometry(o), True),
    ),
    "preact_conv_dgrad": _Operator(
        "backward",
        "convolution_backward for the input, threshold_backward, batch_norm_backward's sums",
        lambda o: _eager_relu_and_sums(o, _eager_conv_grad(o, o.dy, [True, False, False])[0]),
        _dgrad_arguments,
    ),
    "preact_conv_wgrad": _Operator(
        "backward",
        "convolution_backward for the weight from the h that eager saved; ours computes h again",
        lambda o: [_eager_conv_grad(o, o.dy, [False, True, False])[1]],
        lambda o: (
            o.dy,
            *(None, None, None),
            o.input,
            o.affine,
            list(o.weight.shape[2:]),
            *_geometry(o),
        ),
    ),
    "preact_conv_backward": _Operator(
        "backward",
        "convolution_backward for both, threshold_backward, batch_norm_backward's sums",
        lambda o: _eager_backward(o, o.dy),
        _dgrad_arguments,
    ),
    "residual_conv_backward": _Operator(
        "backward",
        "batch_norm_backward for the output and the addition, then as preact_conv_backward",
        _eager_sum_backward,
        lambda o: (
            *(o.residual, o.sum.g, o.sum.output, o.sum.affine, o.sum.sums),
            *(o.weight, o.input, o.affine, *_geometry(o)),
        ),
    ),
    "residual_grad": _Operator(
        "backward",
        "batch_norm_backward for the input, which takes its sums in the same call, and the "
        "addition; ours has the sums from bn_relu_backward or preact_conv_dgrad",
        _eager_residual_grad,
        lambda o: (o.dh, o.g, o.input, o.affine, o.sums),
    ),
}
_CONVOLUTIONS = [name for name in OPERATORS if name.startswith("preact_conv")]
_SUMS = ["residual_conv_backward"]  # of the convolution at a unit's end
_POINTWISE = [name for name in OPERATORS if name not in _CONVOLUTIONS + _SUMS]


def operator_cases(batches: dict[str, int]) -> list[OperatorCase]:
    """All operators at all stages; batches says how many images "bottleneck" and so on have."""
    stages = [("bottleneck", size, planes) for size, planes in ((32, 16), (16, 32), (8, 64))] + [
        ("imagenet", size, planes) for size, planes in ((56, 64), (28, 128), (14, 256), (7, 512))
    ]
    cases = []
    for kind, size, planes in stages:
        n, quick = batches[kind], planes == 32
        wide, narrow = (n, 4 * planes, size, size), (n, planes, size, size)
        stage = f"{planes}x{size}"
        for name in _POINTWISE:
            cases.append(OperatorCase(name, stage, wide, planes, 1, False, quick))
        for name in _CONVOLUTIONS:
            cases += [
                OperatorCase(name, f"1x1-in-{stage}", wide, planes, 1, False, False),
                OperatorCase(name, f"3x3-{stage}", narrow, planes, 3, False, quick),
            ]
        for name in _CONVOLUTIONS + _SUMS:
            cases.append(OperatorCase(name, f"1x1-out-{stage}", narrow, 4 * planes, 1, True, quick))
    for size, planes in ((32, 64), (16, 128), (8, 256), (4, 512)):
        shape = (batches["basic"], planes, size, size)
        cases += [
            OperatorCase(name, f"basic-{planes}x{size}", shape, planes, 3, True, False)
            for name in _CONVOLUTIONS + _SUMS
        ]
    return cases
