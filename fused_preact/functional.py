"""Pre-activated convolutions and whole residual units as differentiable functions.

Forward saves the raw inputs u of the convolutions and a few vectors; backward computes h again
and defers each BatchNorm's backward pass to whoever reads its gradient. He et al. 2016,
arXiv:1603.05027; the operators and what they hand each other are defined in reference.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops, reference

Padding = int | Sequence[int]


class BatchNorm(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm; training means batch statistics."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    running_mean: Tensor | None  # (C,)
    running_var: Tensor | None  # (C,)
    training: bool
    momentum: float
    eps: float


class Conv(NamedTuple):
    """A convolution without bias; padding is (top, bottom, left, right)."""

    weight: Tensor  # (K, C / groups, R, S)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


def preact_conv2d(
    input: Tensor,
    weight: Tensor,
    *,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """conv2d(activation(batch_norm(input)), weight) + residual, in one pass over memory.

    input       (N, C, H, W), float32, bfloat16, float16 or float64; fastest in channels_last.
    weight      (K, C / groups, R, S); any of these dtypes, used in input's.
    bn_*        (C,), None where BatchNorm2d has None.
    running_*   (C,), updated in training; None for batch statistics only.
    padding     an int, or (top, bottom, left, right); zeros after the activation.
    activation  "relu" or "silu".
    residual    (N, K, H', W') or None.
    Returns     (N, K, H', W') in channels_last, in input's dtype, under autocast in autocast's.

    Raises ValueError where N * H * W == 1 in training, as torch.nn.functional.batch_norm does,
    and for shapes that do not fit, naming the argument.

    He et al. 2016, eq. 1 with f the identity.
    """
    bn = BatchNorm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    conv = Conv(weight, strides, _four(padding), dilations, groups)
    return preact_unit(input, [bn], [conv], activation=activation, residual=residual)


def bn_relu(
    input: Tensor,
    *,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str = "relu",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """activation(batch_norm(input)), as after a network's last unit.

    input       (N, C, H, W), float32, bfloat16, float16 or float64; fastest in channels_last.
    bn_*        (C,), None where BatchNorm2d has None.
    running_*   (C,), updated in training; None for batch statistics only.
    activation  "relu" or "silu".
    Returns     (N, C, H, W) in channels_last, in input's dtype.

    Raises ValueError where N * H * W == 1 in training, as torch.nn.functional.batch_norm does,
    and for shapes that do not fit, naming the argument.
    """
    bn = BatchNorm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    _check_input(input)
    _check_activation(activation)
    _check_bn(bn, input.shape[1])
    _check_batch(bn, input.shape)
    if _runs_eager(input):
        return reference.bn_relu(input, bn, activation)
    operators = ops.plan(input)
    input = ops.channels_last(input)
    stats = _input_statistics(operators, input, bn)
    config = _BnReluConfig(operators, activation, bn.training, bn.eps)
    parameters = _with_grad_fn(bn.weight), _with_grad_fn(bn.bias)
    output = _BnRelu.apply(_with_grad_fn(input), config, stats, *parameters)
    _update_running(operators, [bn], [stats], [_values_per_channel(input.shape)])
    return output


def preact_unit(
    input: Tensor,
    bns: Sequence[BatchNorm | None],
    convs: Sequence[Conv],
    *,
    shortcut: str | None = None,
    projection: Conv | None = None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """A residual unit: u[i+1] = conv[i](activation(bn[i](u[i]))), u[0] = input, plus a shortcut.

    input       (N, C, H, W), float32, bfloat16, float16 or float64; fastest in channels_last.
    bns, convs  one each per convolution; bns[0] may be None: the first one then reads input raw.
    shortcut    what is added to the last convolution's output: "input", "preact" (the activated
                bns[0](input)), or None.
    projection  a convolution that the shortcut passes through first, or None.
    activation  "relu" or "silu".
    residual    (N, K, H', W'), added where there is no shortcut; or None.
    Returns     (N, K, H', W') in channels_last, in input's dtype, under autocast in autocast's.

    In training the result carries its own batch statistics, so that the next unit's BatchNorm
    does not read it again.

    Raises ValueError for one value per channel in training and for shapes that do not fit.

    He et al. 2016, eq. 1 and figure 4(e).
    """
    _check_unit(input, bns, convs, shortcut, projection, activation, residual)
    if _runs_eager(input):
        return reference.preact_unit(input, bns, convs, shortcut, projection, activation, residual)
    dtype = _compute_dtype(input)
    if dtype != input.dtype:
        input = input.to(dtype)
    all_convs = list(convs) if projection is None else [*convs, projection]
    operators = ops.plan(input, *_most_general(all_convs))
    input = ops.channels_last(input)
    first = bns[0]
    config = _UnitConfig(
        operators,
        activation,
        shortcut,
        tuple(
            ops.plan_conv(operators, conv.weight, conv.dilation, conv.groups) for conv in all_convs
        ),
        tuple(conv.geometry for conv in all_convs),
        tuple(None if bn is None else bn.eps for bn in bns),
        tuple(bn is not None and bn.training for bn in bns),
        any(bn is not None and bn.training for bn in bns) and not torch.compiler.is_compiling(),
        ops.allow_tf32(),
    )
    given = [None if first is None else _input_statistics(operators, input, first)]
    given += [
        None if bn is None or bn.training else _running_statistics(input.dtype, bn)
        for bn in bns[1:]
    ]
    tensors: list[Tensor | None] = []
    for bn, conv, stats in zip(bns, convs, given, strict=True):
        tensors += [
            conv.weight,
            None if bn is None else bn.weight,
            None if bn is None else bn.bias,
            stats,
        ]
    if residual is not None:
        residual = ops.channels_last(residual.to(dtype))
    tensors.append(None if projection is None else projection.weight)
    *tensors, projection_weight = map(_with_grad_fn, tensors)
    output, *stats = _PreActUnit.apply(
        _with_grad_fn(input), _with_grad_fn(residual), config, projection_weight, *tensors
    )
    shapes: list[Sequence[int]] = [input.shape]
    for conv in convs[:-1]:
        shapes.append(_conv_shape(shapes[-1], conv))
    counts = [_values_per_channel(shape) for shape in shapes]
    _update_running(operators, bns, [given[0], *stats[:-1]], counts)
    if config.hands_on:
        _hand_on(output, stats[-1])
    return output


# --- autograd ------------------------------------------------------------------------------------


class _UnitConfig(NamedTuple):
    operators: Any  # the backend's namespace, ops.plan
    activation: str
    shortcut: str | None
    # per convolution, the projection last
    convs: tuple[Any, ...]  # the namespace that has its three operators, ops.plan_conv
    geometries: tuple[Any, ...]  # stride, padding, dilation, groups
    eps: tuple[float | None, ...]  # per BatchNorm, None where there is none
    batch_stats: tuple[bool, ...]  # per BatchNorm
    hands_on: bool  # take the output's statistics for the unit that follows
    allow_tf32: bool


class _PreActUnit(Function):
    """A unit's convolutions with shortcut; saves each u and the affines, nothing else.

    tensors are weight, bn_weight, bn_bias, stats for each convolution; stats is None where the
    convolution before takes them. Returns the output and, per convolution, the statistics of
    what it wrote (empty where nobody asks). Gradients are in the accumulator's dtype; autograd
    casts them to the parameters'.
    """

    @staticmethod
    def forward(ctx, input, residual, config, projection, *tensors):
        op = config.operators
        weights, bn_weights, bn_biases, given_stats = (tensors[k::4] for k in range(4))
        weights = [weight.to(input.dtype) for weight in weights]  # once for both passes
        projection = None if projection is None else projection.to(input.dtype)
        last = len(weights) - 1
        bns = list(zip(bn_weights, bn_biases, config.eps, strict=True))
        u, affine = input, _affine(op, given_stats[0], *bns[0])
        inputs, affines, all_stats = [], [], []
        for i, weight in enumerate(weights):
            inputs.append(u)
            affines.append(affine)
            if i == last and config.shortcut is not None:
                residual = _shortcut(config, input, affines[0], projection)
            next_bn = ()
            if i < last and config.batch_stats[i + 1]:
                next_bn = _bn_arguments(reference.accumulator(input.dtype), *bns[i + 1])
            u, stats, affine = config.convs[i].preact_conv_forward(
                u,
                affine,
                weight,
                residual if i == last else None,
                *config.geometries[i],
                config.activation,
                config.hands_on if i == last else config.batch_stats[i + 1],
                config.allow_tf32,
                *next_bn,
            )
            all_stats.append(stats)
            if i < last and not next_bn:
                affine = _affine(op, given_stats[i + 1], *bns[i + 1])
        ctx.config = config
        ctx.save_for_backward(projection, *inputs, *affines, *weights)
        ctx.mark_non_differentiable(*all_stats)
        ctx.set_materialize_grads(False)
        return u, *all_stats

    @staticmethod
    def backward(ctx, dy, *_):
        config = ctx.config
        op, n = config.operators, len(config.eps)
        needs_input, needs_residual, _, needs_projection, *needs = _needs_input_grad(ctx)
        if dy is None:
            return (None,) * (4 + 4 * n)
        dy = dy.contiguous(memory_format=torch.channels_last)
        projection, *saved = ctx.saved_tensors
        inputs, affines, weights = saved[:n], saved[n : 2 * n], saved[2 * n :]
        input, affine = inputs[0], affines[0]

        # the shortcut's gradient joins at h, before the activation's slope, or at the input
        joins_h = config.shortcut == "preact" or affine is None
        to_shortcut = None
        if config.shortcut is not None and (needs_input or (joins_h and any(needs[1:3]))):
            to_shortcut = _shortcut_grad(config, dy, input, projection)

        grads: list[Tensor | None] = [None] * (4 * n)
        deferred = (dy, None, None, None)  # grad, output, output_affine, output_sums
        for i in reversed(range(n)):
            needs_weight, needs_gamma, needs_beta = needs[4 * i : 4 * i + 3]
            conv, geometry = config.convs[i], config.geometries[i]
            if not (needs_input or any(needs[: 4 * i]) or needs_gamma or needs_beta):
                if needs_weight:
                    grads[4 * i] = conv.preact_conv_wgrad(
                        *deferred,
                        inputs[i],
                        affines[i],
                        weights[i].shape[2:],
                        *geometry,
                        config.activation,
                        config.allow_tf32,
                    )
                break
            frozen = affines[i] is not None and not config.batch_stats[i]
            gradients = conv.preact_conv_backward if needs_weight else conv.preact_conv_dgrad
            g, sums, *dw = gradients(
                *deferred,
                weights[i],
                inputs[i],
                affines[i],
                to_shortcut if i == 0 and joins_h else None,
                *geometry,
                config.activation,
                config.batch_stats[i] or needs_gamma or needs_beta,
                config.allow_tf32,
                frozen,
                to_shortcut if i == 0 and frozen and not joins_h else None,
            )
            grads[4 * i] = dw[0] if needs_weight else None
            grads[4 * i + 1] = sums[1] if needs_gamma else None
            grads[4 * i + 2] = sums[0] if needs_beta else None
            # with frozen statistics, or without any, g is the gradient of inputs[i] itself
            deferred = g, None, None, None
            if config.batch_stats[i]:
                deferred = g, inputs[i], affines[i], sums

        dx = dw_projection = None
        if needs_input:
            dx = deferred[0]
            if config.batch_stats[0]:
                dx = op.residual_grad(None if joins_h else to_shortcut, *deferred)
        if needs_projection:
            dw_projection = config.convs[-1].preact_conv_wgrad(
                dy,
                None,
                None,
                None,
                input,
                affine if config.shortcut == "preact" else None,
                projection.shape[2:],
                *config.geometries[-1],
                config.activation,
                config.allow_tf32,
            )
        return _once(dx, dy if needs_residual else None, None, dw_projection, *grads)


def _shortcut(config, input, affine, projection):
    op = config.operators
    affine = affine if config.shortcut == "preact" else None
    if projection is not None:
        return config.convs[-1].preact_conv_forward(
            input,
            affine,
            projection,
            None,
            *config.geometries[-1],
            config.activation,
            False,
            config.allow_tf32,
        )[0]
    return input if affine is None else op.bn_relu_forward(input, affine, config.activation)


def _shortcut_grad(config, dy, input, projection):
    if projection is None:
        return dy
    return config.convs[-1].preact_conv_dgrad(
        dy,
        None,
        None,
        None,
        projection,
        input,
        None,
        None,
        *config.geometries[-1],
        config.activation,
        False,
        config.allow_tf32,
    )[0]


class _BnReluConfig(NamedTuple):
    operators: Any
    activation: str
    batch_stats: bool
    eps: float


class _BnRelu(Function):
    @staticmethod
    def forward(ctx, input, config, stats, bn_weight, bn_bias):
        op = config.operators
        affine = _affine(op, stats, bn_weight, bn_bias, config.eps)
        ctx.config = config
        ctx.save_for_backward(input, affine)
        return op.bn_relu_forward(input, affine, config.activation)

    @staticmethod
    def backward(ctx, dh):
        config = ctx.config
        op = config.operators
        input, affine = ctx.saved_tensors
        needs_input, _, _, needs_gamma, needs_beta = _needs_input_grad(ctx)
        dh = dh.contiguous(memory_format=torch.channels_last)
        with_sums = config.batch_stats or needs_gamma or needs_beta
        frozen = not config.batch_stats
        g, sums = op.bn_relu_backward(dh, input, affine, config.activation, with_sums, frozen)
        dx = None
        if needs_input:
            dx = g if frozen else op.residual_grad(None, g, input, affine, sums)
        dgamma, dbeta = sums[1] if needs_gamma else None, sums[0] if needs_beta else None
        return _once(dx, None, None, dgamma, dbeta)


def _with_grad_fn(tensor: Tensor | None) -> Tensor | None:
    """A leaf that requires a gradient as a view of itself; anything else as it is."""
    if tensor is None or not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    return tensor.view_as(tensor)


def _needs_input_grad(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad, less what torch.autograd.grad(outputs, inputs) does not ask for.

    The engine tells for a tensor that has a grad_fn, not for a leaf: see _with_grad_fn.
    """
    if torch.compiler.is_compiling():
        return ctx.needs_input_grad
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return tuple(
        needs and torch._C._will_engine_execute_node(next(nodes)) for needs in ctx.needs_input_grad
    )


class _Once(Function):
    """Passes gradients through; raises where they are differentiated again."""

    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "fused_preact: the fused backward pass cannot be differentiated again; run the "
            "forward pass under `with fused_preact.backend('eager'):` for double backward"
        )


def _once(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if not torch.is_grad_enabled():  # create_graph=True enables it
        return grads
    anchor = torch.zeros((), requires_grad=True)
    return _Once.apply(anchor, *grads)


def _affine(op, stats, weight, bias, eps):
    if eps is None:
        return None
    return op.bn_affine(stats, *_bn_arguments(stats.dtype, weight, bias, eps))


def _bn_arguments(dtype, weight, bias, eps):
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return weight, bias, eps


# --- statistics ----------------------------------------------------------------------------------


def _hand_on(output: Tensor, stats: Tensor) -> None:
    """Leave output's statistics with it; they hold until somebody writes to it in place."""
    if not torch.compiler.is_compiling() and not output.is_inference():
        output._preact_stats = (stats, output._version)  # type: ignore[attr-defined]


def _input_statistics(operators: Any, input: Tensor, bn: BatchNorm) -> Tensor:
    if not bn.training:
        return _running_statistics(input.dtype, bn)
    handed_on = getattr(input, "_preact_stats", None)
    if handed_on is not None and not torch.compiler.is_compiling():
        stats, version = handed_on
        if input._version == version:
            return stats
    return operators.bn_stats(input.detach())


def _running_statistics(dtype: torch.dtype, bn: BatchNorm) -> Tensor:
    assert bn.running_mean is not None and bn.running_var is not None
    stats = torch.stack((bn.running_mean, bn.running_var))
    return stats.to(reference.accumulator(dtype))


@torch.no_grad()
def _update_running(
    operators: Any,
    bns: Sequence[BatchNorm | None],
    stats: Sequence[Tensor | None],
    counts: Sequence[int],
) -> None:
    """By the batch statistics, each of so many values a channel, in one launch."""
    updates = [
        (bn.running_mean, bn.running_var, batch, bn.momentum, count)
        for bn, batch, count in zip(bns, stats, counts, strict=True)
        if bn is not None and bn.training and bn.running_mean is not None
    ]
    if updates:
        operators.bn_update_running(*map(list, zip(*updates, strict=True)))


# --- the eager layers ----------------------------------------------------------------------------


def _runs_eager(input: Tensor) -> bool:
    exporting = torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()
    return ops.current_backend() == "eager" or exporting or input.numel() == 0


# --- arguments -----------------------------------------------------------------------------------


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or two, got {tuple(value)}")
    return value[0], value[1]


def _four(padding: Padding) -> tuple[int, int, int, int]:
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) != 4:
        raise ValueError(
            f"padding: expected an int or (top, bottom, left, right), got {tuple(padding)}"
        )
    return tuple(padding)  # type: ignore[return-value]


def _compute_dtype(input: Tensor) -> torch.dtype:
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return input.dtype


def _values_per_channel(shape: Sequence[int]) -> int:
    return shape[0] * shape[2] * shape[3]


def _conv_shape(shape: Sequence[int], conv: Conv) -> tuple[int, ...]:
    size = ops.output_size(shape, conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation)
    return shape[0], conv.weight.shape[0], *size


def _most_general(convs: Sequence[Conv]) -> tuple[tuple[int, int], int, int]:
    dilation = max(conv.dilation[0] for conv in convs), max(conv.dilation[1] for conv in convs)
    taps = max(conv.weight.shape[2:].numel() for conv in convs)
    return dilation, max(conv.groups for conv in convs), taps


def _check_input(input: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")


def _check_activation(activation: str) -> None:
    if activation not in ("relu", "silu"):
        raise ValueError(f"activation: expected 'relu' or 'silu', got {activation!r}")


def _check_bn(bn: BatchNorm, channels: int, name: str = "") -> None:
    for field in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(bn, field)
        if vector is not None and tuple(vector.shape) != (channels,):
            argument = field if field.startswith("running") else f"bn_{field}"
            raise ValueError(
                f"{name}{argument}: expected shape ({channels},), got {tuple(vector.shape)}"
            )
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        raise ValueError(
            f"{name}running_mean, running_var: expected tensors in evaluation, got None"
        )


def _check_batch(bn: BatchNorm | None, shape: Sequence[int]) -> None:
    if bn is not None and bn.training and _values_per_channel(shape) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size(shape)}"
        )


def _check_conv(conv: Conv, shape: Sequence[int], name: str) -> None:
    weight = conv.weight
    if weight.dim() != 4 or weight.shape[1] * conv.groups != shape[1]:
        raise ValueError(
            f"{name}: expected shape (K, {shape[1] // conv.groups}, R, S), "
            f"got {tuple(weight.shape)}"
        )
    if min(conv.stride) < 1 or min(conv.dilation) < 1 or min(conv.padding) < 0:
        raise ValueError(
            f"{name}: expected stride and dilation >= 1 and padding >= 0, got stride "
            f"{conv.stride}, dilation {conv.dilation}, padding {conv.padding}"
        )
    if min(_conv_shape(shape, conv)[2:]) < 1:
        raise ValueError(
            f"{name}: a kernel of {tuple(weight.shape[2:])} does not fit into an input of "
            f"{tuple(shape[2:])} with padding {conv.padding}"
        )


def _check_unit(
    input: Tensor,
    bns: Sequence[BatchNorm | None],
    convs: Sequence[Conv],
    shortcut: str | None,
    projection: Conv | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    _check_input(input)
    _check_activation(activation)
    if shortcut not in (None, "input", "preact"):
        raise ValueError(f"shortcut: expected None, 'input' or 'preact', got {shortcut!r}")
    if shortcut is None and projection is not None:
        raise ValueError("projection: expected None where there is no shortcut")
    if shortcut is not None and residual is not None:
        raise ValueError("residual: expected None where there is a shortcut")
    if len(bns) != len(convs) or any(bn is None for bn in bns[1:]):
        raise ValueError(
            "bns: expected one BatchNorm for each convolution; only the first may be None"
        )
    shape: Sequence[int] = input.shape
    single = len(convs) == 1
    for i, (bn, conv) in enumerate(zip(bns, convs, strict=True)):
        if bn is not None:
            _check_bn(bn, shape[1], "" if single else f"bns[{i}].")
            _check_batch(bn, shape)
        _check_conv(conv, shape, "weight" if single else f"convs[{i}].weight")
        shape = _conv_shape(shape, conv)
    added: Sequence[int] | None = None if residual is None else residual.shape
    name = "residual"
    if shortcut is not None:
        added, name = input.shape, "shortcut"
        if projection is not None:
            _check_conv(projection, input.shape, "projection.weight")
            added = _conv_shape(input.shape, projection)
    if added is not None and tuple(added) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(added)}")
