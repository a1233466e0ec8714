"""The tolerance rule: how far from the truth a fused result may be, and cases to try it on.

Truth is PyTorch's own layers under autograd in float64; eager is the same in the dtype under test
(BatchNorm's vectors stay float32 beside bfloat16 activations, as autocast has it). For every
result, as a whole and channel by channel, in norm and in largest absolute value,

    error(fused) <= 1.5 * error(eager) + floor.

The floor is there because eager can be lucky, even exact: one channel's sum is a single draw of
rounding errors. It is the error of the *truth* when one rounding of the dtype under test (and of
float32 for BatchNorm's mean) is made to fall elsewhere wherever a layer writes a tensor, forward
and backward. That follows the conditioning of each case: a sum that cancels gets a wide floor, a
mean of 1e4 no more than float32's rounding of it. Times that it is taken, for the norm of errors;
the largest of them gets twice as much:

                        whole tensor of C channels    one channel
    bfloat16, float16   1 +  4 / sqrt(C)              16
    float32             2 + 16 / sqrt(C)              64
    float64             as float32, from eight roundings at once: eager is the truth here

What the values of a channel share, its sums, is one draw, so few channels get more. Sums are kept
in float32: bfloat16's own rounding outweighs theirs, in float32 every addition is a rounding.

TF32 is float32 whose convolutions round both factors of each product to 11 significant bits, to
nearest: h and the weight forward, also dy backward. Eager does so on a GPU; here tf32() rounds the
factors for it, and what is then exact in float32 is all that TF32 means. To float32's floor comes
that of one such rounding of each factor falling elsewhere, taken as often as 16-bit types' are.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_preact import functional, reference
from fused_preact.functional import BatchNorm, Conv

FACTOR = 1.5
FLOORS = {
    torch.bfloat16: (1, 4, 16),
    torch.float16: (1, 4, 16),
    torch.float32: (2, 16, 64),
    torch.float64: (2, 16, 64),
}
DRAWS = 4
TF32_EPS = 2.0**-10

Results = dict[str, Tensor]


@dataclass
class Case:
    """A residual unit with its data; one convolution, or none (bn_relu), is a unit as well."""

    input: Tensor
    bns: list[BatchNorm | None]
    convs: list[Conv]
    grad_output: Tensor
    shortcut: str | None = None
    projection: Conv | None = None
    residual: Tensor | None = None
    activation: str = "relu"

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy with fresh leaves, the vectors in the accumulator of dtype."""
        acc = reference.accumulator(dtype)
        return replace(
            self,
            input=_leaf(self.input, dtype),
            bns=[bn and _map_bn(bn, lambda tensor: _leaf(tensor, acc)) for bn in self.bns],
            convs=[conv._replace(weight=_leaf(conv.weight, dtype)) for conv in self.convs],
            projection=self.projection
            and self.projection._replace(weight=_leaf(self.projection.weight, dtype)),
            residual=None if self.residual is None else _leaf(self.residual, dtype),
            grad_output=self.grad_output.to(dtype),
        )

    def leaves(self) -> Results:
        """What gradients are taken for, by name."""
        found = {"input": self.input, "residual": self.residual}
        found["projection"] = self.projection and self.projection.weight
        for i, bn in enumerate(self.bns):
            if bn is not None:
                found |= {f"gamma{i}": bn.weight, f"beta{i}": bn.bias}
        found |= {f"weight{i}": conv.weight for i, conv in enumerate(self.convs)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def make_case(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int] = (2, 8, 5, 7),
    convs: Sequence[tuple] = (),
    *,
    activation: str = "relu",
    affine: bool = True,
    training: bool = True,
    running: bool = True,
    raw: bool = False,
    residual: bool = False,
    shortcut: str | None = None,
    projection: tuple | None = None,
    mean: float = 0.0,
    constant: bool = False,
    seed: int = 0,
) -> Case:
    """Random data for a unit, exact in dtype.

    A convolution is (channels, kernel size, stride, four-sided padding). Scales are of both signs
    and one is zero; raw leaves the first BatchNorm out; with constant, channel 0 does not vary.
    """
    generator = torch.Generator().manual_seed(seed)
    acc = reference.accumulator(dtype)

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def batch_norm(channels: int) -> BatchNorm:
        gamma, beta, running_mean = (randn(channels, dtype=acc) for _ in range(3))
        if channels > 2:
            gamma[-1] = 0
        running_var = randn(channels, dtype=acc).square() + 0.5
        return BatchNorm(
            gamma if affine else None,
            beta if affine else None,
            running_mean + mean if running else None,
            running_var if running else None,
            training,
            0.1,
            1e-5,
        )

    def conv(channels_in: int, spec: tuple) -> Conv:
        channels, kernel, stride, padding = spec
        weight = randn(channels, channels_in, *kernel, dtype=torch.float64)
        weight *= math.sqrt(2 / (channels_in * kernel[0] * kernel[1]))
        return Conv(weight.to(dtype), stride, padding)

    input = (randn(*shape, dtype=torch.float64) + mean).to(dtype)
    if constant:
        input[:, 0] = 3.3
    channels = shape[1]
    bns, layers = [None if raw else batch_norm(channels)], []
    for i, spec in enumerate(convs):
        if i > 0:
            bns.append(batch_norm(channels))
        layers.append(conv(channels, spec))
        channels = spec[0]
    case = Case(
        _away_from_zero(input, bns[0]).contiguous(memory_format=torch.channels_last),
        bns,
        layers,
        grad_output=input,
        shortcut=shortcut,
        projection=projection and conv(shape[1], projection),
        activation=activation,
    )
    output_shape = eager(case.to(torch.float64)).shape
    if residual:
        case.residual = randn(*output_shape).contiguous(memory_format=torch.channels_last)
    case.grad_output = randn(*output_shape)
    return case


def fused(case: Case) -> Tensor:
    """The functions under test, on the current backend."""
    if not case.convs:
        return functional.bn_relu(
            case.input, **_bn_arguments(case.bns[0]), activation=case.activation
        )
    if len(case.convs) == 1 and case.bns[0] is not None and case.shortcut is None:
        (conv,) = case.convs
        return functional.preact_conv2d(
            case.input,
            **_bn_arguments(case.bns[0]),
            **conv._asdict(),
            activation=case.activation,
            residual=case.residual,
        )
    return functional.preact_unit(
        case.input,
        case.bns,
        case.convs,
        shortcut=case.shortcut,
        projection=case.projection,
        activation=case.activation,
        residual=case.residual,
    )


def eager(
    case: Case,
    rounding: tuple[float, float] | None = None,
    factor: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """PyTorch's layers; rounding, the spacings of dtype and accumulator, lets roundings fall.

    factor is applied to both factors of each product, forward and backward.
    """
    eps = rounding and rounding[0]

    def pre_activate(input: Tensor, bn: BatchNorm | None) -> Tensor:
        if bn is None:
            return input
        if rounding is None:
            parameters = bn.running_mean, bn.running_var, bn.weight, bn.bias
            z = F.batch_norm(input, *parameters, bn.training, bn.momentum, bn.eps)
        else:
            z = _rounded(_batch_norm(input, bn, rounding[1]), eps)
        return _rounded(F.relu(z) if case.activation == "relu" else F.silu(z), eps)

    def convolve(h: Tensor, conv: Conv) -> Tensor:
        top, bottom, left, right = conv.padding
        h, stride = F.pad(h, (left, right, top, bottom)), conv.stride
        if conv.weight.shape[2:] == (1, 1):
            # The pixels that are read; with a stride, PyTorch's weight gradient of few channels
            # writes past its buffers (oneDNN on AVX2, torch 2.13 and 2.14).
            h, stride = h[:, :, :: stride[0], :: stride[1]], 1
        options = stride, 0, conv.dilation, conv.groups
        if factor is not None:
            return _rounded(_Convolution.apply(h, conv.weight, factor, options), eps)
        return _rounded(F.conv2d(h, conv.weight, None, *options), eps)

    u = h = pre_activate(case.input, case.bns[0])
    added = case.residual
    if case.shortcut is not None:
        added = h if case.shortcut == "preact" else case.input
        added = convolve(added, case.projection) if case.projection else added
    for i, conv in enumerate(case.convs):
        u = convolve(u if i == 0 else pre_activate(u, case.bns[i]), conv)
    return u if added is None else _rounded(u + added, eps)


def run(case: Case, dtype: torch.dtype, unit: Callable[..., Tensor], *args: Any) -> Results:
    """Output, gradients and running statistics of one forward and backward pass in dtype."""
    case = case.to(dtype)
    output = unit(case, *args)
    output.backward(case.grad_output)
    results = {"output": output.detach()}
    results |= {f"grad {name}": leaf.grad for name, leaf in case.leaves().items()}
    for i, bn in enumerate(case.bns):
        if bn is not None and bn.running_mean is not None:
            results |= {f"running_mean{i}": bn.running_mean, f"running_var{i}": bn.running_var}
    return results


@dataclass
class Expected:
    """Truth, and how far from it eager and chance end up."""

    truth: Results
    dtypes: dict[str, torch.dtype]
    limits: dict[tuple[str, int | None], tuple[Tensor, Tensor]]  # error of eager, floor


def expect(
    eager: Results,
    truth: Results,
    draws: list[Results],
    dtype: torch.dtype,
    tf32_draws: Sequence[Results] = (),
) -> Expected:
    """What the rule asks for; draws are truth with roundings that fell at random."""
    floors = [(draws, FLOORS[dtype])]
    if tf32_draws:
        floors.append((list(tf32_draws), FLOORS[torch.bfloat16]))
    limits = {}
    for name, true in truth.items():
        for dim in _dims(true):
            floor = torch.finfo(torch.float64).eps * _errors(true, 0 * true, dim)  # truth's own
            for drawn_results, (base, shared, single) in floors:
                drawn = torch.stack([_errors(draw[name], true, dim) for draw in drawn_results])
                channels = true.shape[min(1, true.dim() - 1)] if true.dim() else 1
                times = single if dim is not None else base + shared / math.sqrt(channels)
                floor += times * drawn.new_tensor([[1.0], [2.0]]) * drawn.square().mean(0).sqrt()
            limits[name, dim] = _errors(eager[name], true, dim), floor
    return Expected(truth, {name: value.dtype for name, value in eager.items()}, limits)


def assert_close(ours: Results, expected: Expected, *, by_channel: bool = True) -> None:
    """The tolerance rule itself."""
    assert ours.keys() == expected.truth.keys()
    for name, true in expected.truth.items():
        assert ours[name].shape == true.shape, f"{name}: {ours[name].shape}, not {true.shape}"
        dtype = expected.dtypes[name]
        assert ours[name].dtype == dtype, f"{name}: {ours[name].dtype}, not {dtype}"
    failures = []
    for (name, dim), (theirs, floor) in expected.limits.items():
        if dim is not None and not by_channel:
            continue
        errors = _errors(ours[name], expected.truth[name], dim)
        broken = ~(errors <= FACTOR * theirs + floor)  # also where it is NaN
        failures += [
            f"{name}, {'whole' if dim is None else f'channel {i} of dimension {dim}'}: "
            f"{('norm of errors', 'largest error')[k]} {errors[k, i]:.3g} > "
            f"{FACTOR} * {theirs[k, i]:.3g} + {floor[k, i]:.3g}"
            for k, i in broken.nonzero().tolist()
        ]
    assert not failures, "\n".join(["tolerance rule broken", *failures])


def assert_rule(
    case: Case, dtype: torch.dtype, *, by_channel: bool = True, allow_tf32: bool = False
) -> None:
    """Hold the fused results for case to the tolerance rule."""

    def draws(*args: Any) -> list[Results]:
        return [run(case, torch.float64, eager, *args) for _ in range(DRAWS)]

    def expected() -> Expected:
        theirs = run(case, dtype, eager, None, tf32 if allow_tf32 else None)
        tf32_draws = draws(None, lambda x: perturbed(x, TF32_EPS)) if allow_tf32 else ()
        truth = run(case, torch.float64, eager)
        return expect(theirs, truth, draws(_rounding(dtype)), dtype, tf32_draws)

    ours = run(case, dtype, fused)
    key = case, dtype, allow_tf32
    assert_close(ours, _remembered(key, expected), by_channel=by_channel)


def assert_operator_rule(operators: Any, name: str, dtype: torch.dtype, *args: Any) -> None:
    """Hold one operator to the rule, against reference's in dtype and in float64.

    Its roundings fall on what it multiplies and writes, not on the raw activations and means that
    it reads: those are exact, and a mean of 1e4 is no excuse.
    """
    function = getattr(reference, name)
    parameters = list(inspect.signature(function).parameters)
    eps, vector_eps = _rounding(dtype)

    def draw(parameter: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or parameter in ("input", "output"):
            return value
        if parameter in ("affine", "output_affine"):
            return torch.cat((value[:1], perturbed(value[1:], vector_eps)))
        return perturbed(value, eps)

    def named(results: Any) -> Results:
        results = results if isinstance(results, tuple) else (results,)
        return {f"result {i}": result for i, result in enumerate(results)}

    def expected() -> Expected:
        exact = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        draws = []
        for _ in range(DRAWS):
            results = named(function(*map(draw, parameters, exact)))
            draws.append(
                {k: perturbed(v, eps if v.dim() == 4 else vector_eps) for k, v in results.items()}
            )
        return expect(named(function(*args)), named(function(*exact)), draws, dtype)

    ours = named(getattr(operators, name)(*args))
    assert_close(ours, _remembered((name, dtype, args), expected))


_memory: dict[Any, Expected] = {}


def _remembered(key: Any, expected: Callable[[], Expected]) -> Expected:
    """Truth takes longer than what is held against it, and is the same for every backend."""
    fingerprint = _fingerprint(key)
    if fingerprint not in _memory:
        _memory[fingerprint] = expected()
    return _memory[fingerprint]


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Tensor):
        values = value.detach().contiguous().flatten().view(torch.uint8)
        return hash(values.cpu().numpy().tobytes()), value.shape, value.dtype
    if isinstance(value, Case):
        value = tuple(vars(value).values())
    return tuple(map(_fingerprint, value)) if isinstance(value, list | tuple) else value


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """The spacings of dtype and its accumulator; for float64 eight times that, see above."""
    times = 8 if dtype == torch.float64 else 1
    return times * torch.finfo(dtype).eps, times * torch.finfo(reference.accumulator(dtype)).eps


def _errors(result: Tensor, truth: Tensor, dim: int | None) -> Tensor:
    """(2, channels): norm and largest absolute value of the difference; dim None is one channel."""
    difference = result.double() - truth.double()
    if dim is None:
        difference = difference.reshape(1, -1)
    else:
        difference = difference.movedim(dim, 0).reshape(truth.shape[dim], -1)
    return torch.stack((difference.norm(dim=1), difference.abs().amax(1)))


def _dims(tensor: Tensor) -> tuple[int | None, ...]:
    """None for the whole, and the dimensions whose channels are looked at by themselves."""
    if tensor.numel() == 0:
        return ()
    return (None, 0, 1)[: 1 + tensor.dim()]


class _Rounding(torch.autograd.Function):
    """tensor with a random relative error of up to half of eps, forward and backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        return perturbed(tensor, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return perturbed(grad, ctx.eps), None


class _Convolution(torch.autograd.Function):
    """conv2d of factor(h) and factor(weight), and in its gradients factor(dy)."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, factor: Callable[[Tensor], Tensor], options: tuple
    ) -> Tensor:
        h, weight = factor(h), factor(weight)
        ctx.save_for_backward(h, weight)
        ctx.factor, ctx.options = factor, options
        return F.conv2d(h, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dy = ctx.factor(dy)
        dh = torch.nn.grad.conv2d_input(h.shape, weight, dy, *ctx.options)
        return dh, torch.nn.grad.conv2d_weight(h, weight.shape, dy, *ctx.options), None, None


def tf32(tensor: Tensor) -> Tensor:
    """A float32 tensor to the nearest of TF32's numbers, ties away from zero as the GPU has it."""
    bits = tensor.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def perturbed(tensor: Tensor, eps: float) -> Tensor:
    return tensor * (1 + eps * (torch.rand_like(tensor) - 0.5))


def _rounded(tensor: Tensor, eps: float | None) -> Tensor:
    return tensor if eps is None else _Rounding.apply(tensor, eps)


def _batch_norm(input: Tensor, bn: BatchNorm, eps: float) -> Tensor:
    """Batch normalisation whose statistics and vectors carry rounding errors."""
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
    deviation = var.detach().sqrt()  # what the rounding of the sum behind a mean of 0 goes by
    mean = _rounded(mean + deviation, eps) - deviation
    var = _rounded(var, eps)
    if bn.training and bn.running_mean is not None:
        count = input.numel() // input.shape[1]
        for running, value in (bn.running_mean, mean), (bn.running_var, var * count / (count - 1)):
            running.copy_(perturbed(running.lerp(value.detach(), bn.momentum), eps))
    z = (input - _row(mean)) * _row((var + bn.eps).rsqrt())
    if bn.weight is not None:
        z = z * _row(_rounded(bn.weight, eps))
    return z if bn.bias is None else z + _row(_rounded(bn.bias, eps))


def _away_from_zero(input: Tensor, bn: BatchNorm | None) -> Tensor:
    """Moves what is normalised to almost 0, where a rounding decides which side ReLU sees."""
    if bn is None or input.numel() <= input.shape[1]:
        return input
    spacing = torch.finfo(input.dtype).eps
    bn = _map_bn(bn, lambda tensor: tensor.double().clone())
    u = input.double()
    z = _batch_norm(u, bn, 0.0)
    margin = 1e-5 + 4 * torch.finfo(torch.float32).eps * u.abs()
    return torch.where(z.abs() < margin, u + 8 * margin + 2 * spacing * u.abs(), u).to(input.dtype)


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def _map_bn(bn: BatchNorm, function: Callable[[Tensor], Tensor]) -> BatchNorm:
    vectors = [None if vector is None else function(vector) for vector in bn[:4]]
    running = [None if vector is None else vector.detach() for vector in vectors[2:]]
    return BatchNorm(*vectors[:2], *running, *bn[4:])


def _bn_arguments(bn: BatchNorm) -> dict[str, Any]:
    """Of the functions that take a BatchNorm's values one by one, and count no batches."""
    arguments = bn._asdict()
    assert arguments.pop("counter") is None
    return {"bn_weight": arguments.pop("weight"), "bn_bias": arguments.pop("bias"), **arguments}


def _row(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
