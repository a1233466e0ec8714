"""Pre-activated convolutions and whole residual units as differentiable functions.

Forward saves the raw inputs u of the convolutions and a few vectors; backward computes h again
and defers each BatchNorm's backward pass to whoever reads its gradient. He et al. 2016,
arXiv:1603.05027; the operators and what they hand each other are defined in reference.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import fakes, ops, reference

Padding = int | Sequence[int]

# Units that share a call: enough to hide what a call costs on the host, few enough that backward
# frees activations and hands out gradients (to data-parallel training, say) as it goes. Those of a
# call's weights are there together: the larger they are, the fewer units.
UNITS_PER_CALL = 8
WEIGHTS_PER_CALL = 2**20  # values


class BatchNorm(NamedTuple):
    """The arguments of torch.nn.functional.batch_norm; training means batch statistics."""

    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    running_mean: Tensor | None  # (C,)
    running_var: Tensor | None  # (C,)
    training: bool
    momentum: float
    eps: float
    counter: Tensor | None = None  # of batches in running_*: num_batches_tracked


class Conv(NamedTuple):
    """A convolution without bias; padding is (top, bottom, left, right)."""

    weight: Tensor  # (K, C / groups, R, S)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Unit(NamedTuple):
    """A residual unit: u[i+1] = conv[i](activation(bn[i](u[i]))), plus a shortcut."""

    bns: Sequence[BatchNorm | None]  # one for each convolution; the first may be None
    convs: Sequence[Conv]
    shortcut: str | None  # what is added: "input", "preact" (the activated bns[0](input)), or None
    projection: Conv | None  # a convolution that the shortcut passes through first


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
    return bn_activation(input, bn, activation)


def bn_activation(input: Tensor, bn: BatchNorm, activation: str) -> Tensor:
    """bn_relu(), and counts the batch."""
    _check_input(input)
    _check_activation(activation)
    _check_bn(bn, input.shape[1])
    _check_batch(bn, input.shape)
    if _runs_eager(input):
        _count_batch([bn])
        return reference.bn_relu(input, bn, activation)
    operators = ops.plan(input)
    input = ops.channels_last(input)
    stats = _input_statistics(operators, input, bn)
    config = _BnReluConfig(operators, activation, bn.training, bn.eps)
    output = _BnRelu.apply(input, config, stats, bn.weight, bn.bias)
    _update_running(operators, [bn], [stats], [input.shape])
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
    unit = Unit(bns, convs, shortcut, projection)
    _check_input(input)
    _check_activation(activation)
    shapes, output_shape = _check_unit(unit, input.shape)
    if residual is not None:
        if shortcut is not None:
            raise ValueError("residual: expected None where there is a shortcut")
        _check_added("residual", residual.shape, output_shape)
    return _run_units(input, [unit], shapes, activation, residual)


def preact_units(input: Tensor, units: Sequence[Unit], *, activation: str = "relu") -> Tensor:
    """Residual units one after the other, each as preact_unit has it.

    input       (N, C, H, W), float32, bfloat16, float16 or float64; fastest in channels_last.
    units       any number of them; up to UNITS_PER_CALL run at a time, with that much less to do
                for Python and autograd, and without a pass for the statistics between them.
    activation  "relu" or "silu".
    Returns     the last unit's output, as preact_unit does.

    Raises ValueError for one value per channel in training and for shapes that do not fit.
    """
    _check_input(input)
    _check_activation(activation)
    shape: Sequence[int] = input.shape
    all_shapes = []
    for j, unit in enumerate(units):
        shapes, shape = _check_unit(unit, shape, f"units[{j}].")
        all_shapes.append(shapes)
    for begin, end in _calls(units):
        shapes = [shape for shapes in all_shapes[begin:end] for shape in shapes]
        input = _run_units(input, units[begin:end], shapes, activation)
    return input


def _calls(units: Sequence[Unit]) -> Iterator[tuple[int, int]]:
    """As many units at a time as may share a call; one that reads its input raw starts anew."""
    begin = weights = 0
    for j, unit in enumerate(units):
        own = sum(conv.weight.numel() for conv in unit.convs)
        full = j - begin == UNITS_PER_CALL or weights + own > WEIGHTS_PER_CALL
        if j > begin and (full or unit.bns[0] is None):
            yield begin, j
            begin, weights = j, 0
        weights += own
    if units:
        yield begin, len(units)


def _run_units(
    input: Tensor,
    units: Sequence[Unit],
    shapes: Sequence[Sequence[int]],
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Units that were checked, in one call; shapes are what their convolutions read."""
    if _runs_eager(input):
        _count_batch([bn for unit in units for bn in unit.bns])
        for unit in units:
            input = reference.preact_unit(input, *unit, activation, residual)
        return input
    dtype = _compute_dtype(input)
    if dtype != input.dtype:
        input = input.to(dtype)
    bns = [bn for unit in units for bn in unit.bns]
    convs = [conv for unit in units for conv in unit.convs]
    planned = [conv for unit in units for conv in (*unit.convs, unit.projection) if conv]
    operators = ops.plan(input, planned)
    input = ops.channels_last(input)
    takes_stats = [bn is not None and bn.training for bn in bns]
    config = _UnitsConfig(
        ops.units_of(operators),
        activation,
        [unit.shortcut or "none" for unit in units],
        [len(unit.convs) for unit in units],
        _geometries(planned),
        [0.0 if bn is None else bn.eps for bn in bns],
        takes_stats,
        any(takes_stats) and not torch.compiler.is_compiling(),
        torch.is_grad_enabled(),
        ops.allow_tf32(),
        ops.plan_convs(operators, planned, input),
    )
    given = [None if bns[0] is None else _input_statistics(operators, input, bns[0])]
    given += [
        None if bn is None or bn.training else _running_statistics(dtype, bn) for bn in bns[1:]
    ]
    if residual is not None:
        residual = ops.channels_last(residual.to(dtype))
    output, *stats = _PreActUnits.apply(
        input,
        residual,
        config,
        *(conv.weight for conv in convs),
        *(None if bn is None else bn.weight for bn in bns),
        *(None if bn is None else bn.bias for bn in bns),
        *given,
        *(None if unit.projection is None else unit.projection.weight for unit in units),
    )
    _update_running(operators, bns, [given[0], *stats[:-1]], shapes)
    if config.hands_on:
        _hand_on(output, stats[-1])
    return output


# --- autograd ------------------------------------------------------------------------------------


class _UnitsConfig(NamedTuple):
    """What does not change from call to call; as units.Chain has it."""

    operators: Any  # who has preact_units_forward and _backward, ops.units_of
    activation: str
    shortcuts: list[str]
    depths: list[int]
    geometries: list[int]
    eps: list[float]
    batch_stats: list[bool]
    hands_on: bool  # take the output's statistics for the unit that follows
    with_grad: bool
    allow_tf32: bool
    composed: list[bool]


class _PreActUnits(Function):
    """Units one after the other; saves each u and the affines, nothing else.

    tensors are all weights, bn_weights, bn_biases and stats, one for each convolution, and the
    projections, one for each unit; stats are None where the convolution before takes them. Returns
    the output and, for each convolution, the statistics of what it wrote (empty where nobody
    asks). Gradients are in the accumulator's dtype; autograd casts them to the parameters'.
    """

    @staticmethod
    def forward(ctx, input, residual, config, *tensors):
        dtype, accumulator = input.dtype, reference.accumulator(input.dtype)
        weights, bn_weights, bn_biases, stats, projections = _split(tensors, len(config.eps))
        weights, projections = _all_to(dtype, weights), _all_to(dtype, projections)
        output, inputs, affines, stats = config.operators.preact_units_forward(
            input,
            residual,
            weights,
            _all_to(accumulator, bn_weights),
            _all_to(accumulator, bn_biases),
            stats,
            config.eps,
            projections,
            config.depths,
            config.geometries,
            config.shortcuts,
            config.activation,
            config.hands_on,
            config.with_grad and any(ctx.needs_input_grad),
            config.allow_tf32,
            config.composed,
        )
        ctx.config = config
        ctx.save_for_backward(input, *inputs, *weights, *projections, *affines)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        return output, *stats

    @staticmethod
    def backward(ctx, dy, *_):
        config = ctx.config
        n, units = len(config.eps), len(config.depths)
        needs_input, needs_residual, _, *needs = _needs_input_grad(ctx)
        if dy is None:
            return (None,) * (3 + 4 * n + units)
        _check_one_gradient(dy)
        needs_weights, needs_gammas, needs_betas, _, needs_projections = _split(needs, n)
        needs_sums = [gamma or beta for gamma, beta in zip(needs_gammas, needs_betas, strict=True)]
        saved = ctx.saved_tensors
        dx, dweights, sums, dprojections = config.operators.preact_units_backward(
            dy.contiguous(memory_format=torch.channels_last),
            saved[:n],
            saved[2 * n + units :],
            saved[n : 2 * n],
            config.batch_stats,
            saved[2 * n : 2 * n + units],
            config.depths,
            config.geometries,
            config.shortcuts,
            config.activation,
            needs_input,
            needs_weights,
            needs_sums,
            needs_projections,
            config.allow_tf32,
            config.composed,
        )
        rows = (
            s.unbind() if need else (None, None) for need, s in zip(needs_sums, sums, strict=True)
        )
        dbetas, dgammas = zip(*rows, strict=True)
        return _once(
            dx if needs_input else None,
            dy if needs_residual else None,
            None,
            *map(_laid_out_as, saved[n : 2 * n], _where(needs_weights, dweights)),
            *_where(needs_gammas, dgammas),
            *_where(needs_betas, dbetas),
            *(None,) * n,
            *map(_laid_out_as, saved[2 * n :], _where(needs_projections, dprojections)),
        )


def _split(values: Sequence[Any], n: int) -> list[Sequence[Any]]:
    """Four times n of them, and the rest."""
    return [values[k * n : (k + 1) * n] for k in range(4)] + [values[4 * n :]]


def _where(needs: Sequence[bool], grads: Sequence[Tensor]) -> Iterator[Tensor | None]:
    return (grad if need else None for need, grad in zip(needs, grads, strict=True))


def _laid_out_as(weight: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A weight's gradient, of a 1x1 with its strides: others mean the same, but DDP warns."""
    if weight is None or grad is None or weight.stride() == grad.stride():
        return grad
    same = weight.is_contiguous() and grad.is_contiguous()
    return grad.as_strided(weight.shape, weight.stride()) if same else grad


def _all_to(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In this dtype; all that change are copied by one operator, on a GPU in one launch."""
    others = [tensor for tensor in tensors if tensor is not None and tensor.dtype != dtype]
    if not others:
        return list(tensors)
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in others]
    torch._foreach_copy_(copies, others)
    left = iter(copies)
    return [tensor if tensor is None or tensor.dtype == dtype else next(left) for tensor in tensors]


class _BnReluConfig(NamedTuple):
    operators: Any
    activation: str
    batch_stats: bool
    eps: float


class _BnRelu(Function):
    @staticmethod
    def forward(ctx, input, config, stats, bn_weight, bn_bias):
        op = config.operators
        weight, bias = _all_to(stats.dtype, [bn_weight, bn_bias])
        affine = op.bn_affine(stats, weight, bias, config.eps)
        ctx.config = config
        ctx.save_for_backward(input, affine)
        return op.bn_relu_forward(input, affine, config.activation)

    @staticmethod
    def backward(ctx, dh):
        _check_one_gradient(dh)
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


def _needs_input_grad(ctx: Any) -> tuple[bool, ...]:
    """ctx.needs_input_grad, less what torch.autograd.grad(outputs, inputs) does not ask for."""
    if torch.compiler.is_compiling():
        return ctx.needs_input_grad
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return tuple(needs and _is_wanted(next(nodes)) for needs in ctx.needs_input_grad)


def _is_wanted(node: Any) -> bool:
    """Whether the engine will hand a gradient to a node that follows the one that runs now."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf, and only of one that torch.autograd.grad asks for
        return True


def _check_one_gradient(grad: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            "fused_preact: the fused backward pass takes one gradient at a time; run the forward "
            "pass under `with fused_preact.backend('eager'):` for is_grads_batched, vectorized "
            "Jacobians and vmap over gradients"
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


# --- statistics ----------------------------------------------------------------------------------


def _hand_on(output: Tensor, stats: Tensor) -> None:
    """Leave output's statistics with it; they hold until somebody writes to it in place.

    PyTorch does not say who writes through .data or NumPy; nor do we see it.
    """
    if not torch.compiler.is_compiling() and not output.is_inference():
        written = output._version, output.data_ptr()
        output._preact_stats = (stats, written)  # type: ignore[attr-defined]


def _input_statistics(operators: Any, input: Tensor, bn: BatchNorm) -> Tensor:
    if not bn.training:
        return _running_statistics(input.dtype, bn)
    handed_on = getattr(input, "_preact_stats", None)
    if handed_on is not None and not torch.compiler.is_compiling():
        stats, written = handed_on
        if (input._version, input.data_ptr()) == written:
            return stats
    return operators.bn_stats(input.detach())


def _running_statistics(dtype: torch.dtype, bn: BatchNorm) -> Tensor:
    assert bn.running_mean is not None and bn.running_var is not None
    stats = torch.stack((bn.running_mean, bn.running_var))
    return stats.to(reference.accumulator(dtype))


def _update_running(
    operators: Any,
    bns: Sequence[BatchNorm | None],
    stats: Sequence[Tensor | None],
    shapes: Sequence[Sequence[int]],
) -> None:
    """By the batch statistics of activations of these shapes, in one launch; counts the batch."""
    updates = [
        (bn.running_mean, bn.running_var, batch, bn.momentum, _values_per_channel(shape))
        for bn, batch, shape in zip(bns, stats, shapes, strict=True)
        if bn is not None and bn.training and bn.running_mean is not None
    ]
    if updates:
        operators.bn_update_running(*map(list, zip(*updates, strict=True)))
    _count_batch(bns)


def _count_batch(bns: Sequence[BatchNorm | None]) -> None:
    counters = [bn.counter for bn in bns if bn is not None and bn.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


# --- the eager layers ----------------------------------------------------------------------------


def _runs_eager(input: Tensor) -> bool:
    exporting = torch.onnx.is_in_onnx_export() or torch.compiler.is_exporting()
    eager = ops.current_backend() == "eager" or exporting or ops.is_transformed()
    return eager or input.numel() == 0 or input.is_meta


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


def _geometries(convs: Sequence[Conv]) -> list[int]:
    """As units.Chain has them."""
    flat: list[int] = []
    for _, stride, padding, dilation, groups in convs:
        flat += (*stride, *padding, *dilation, groups)
    return flat


def _check_input(input: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")


def _check_activation(activation: str) -> None:
    if activation not in ("relu", "silu"):
        raise ValueError(f"activation: expected 'relu' or 'silu', got {activation!r}")


_BN_VECTORS = BatchNorm._fields[:4]


def _check_bn(bn: BatchNorm, channels: int, name: str = "") -> None:
    expected = (channels,)
    for field, vector in zip(_BN_VECTORS, bn[:4], strict=True):
        if vector is not None and vector.shape != expected:
            argument = field if field.startswith("running") else f"bn_{field}"
            raise ValueError(
                f"{name}{argument}: expected shape ({channels},), got {tuple(vector.shape)}"
            )
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        raise ValueError(
            f"{name}running_mean, running_var: expected tensors in evaluation, got None"
        )
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(f"{name}running_mean, running_var: expected both, or None for both")


def _check_batch(bn: BatchNorm | None, shape: Sequence[int]) -> None:
    if bn is not None and bn.training and _values_per_channel(shape) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size(shape)}"
        )


def output_shape(conv: Conv, shape: Sequence[int]) -> tuple[int, ...]:
    """(N, K, H', W') of a convolution of (N, C, H, W)."""
    weight, stride, padding, dilation, _ = conv
    filters, _, *kernel_size = weight.shape
    size = fakes.output_size(shape, kernel_size, stride, padding, dilation)
    return shape[0], filters, *size


def _check_conv(conv: Conv, shape: Sequence[int], name: str) -> tuple[int, ...]:
    """Raises ValueError; returns the shape of the output."""
    weight, stride, padding, dilation, groups = conv
    weight_shape = weight.shape
    if len(weight_shape) != 4 or weight_shape[1] * groups != shape[1]:
        raise ValueError(
            f"{name}: expected shape (K, {shape[1] // groups}, R, S), got {tuple(weight_shape)}"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"{name}: expected stride and dilation >= 1 and padding >= 0, got stride "
            f"{stride}, dilation {dilation}, padding {padding}"
        )
    output = output_shape(conv, shape)
    if min(output[2:]) < 1:
        raise ValueError(
            f"{name}: a kernel of {tuple(weight_shape[2:])} does not fit into an input of "
            f"{tuple(shape[2:])} with padding {padding}"
        )
    return output


def _check_unit(
    unit: Unit, shape: Sequence[int], name: str = ""
) -> tuple[list[Sequence[int]], Sequence[int]]:
    """Raises ValueError; returns the shapes that its convolutions read, and that of its output."""
    bns, convs, shortcut, projection = unit
    if shortcut not in (None, "input", "preact"):
        raise ValueError(f"{name}shortcut: expected None, 'input' or 'preact', got {shortcut!r}")
    if shortcut is None and projection is not None:
        raise ValueError(f"{name}projection: expected None where there is no shortcut")
    if len(bns) != len(convs) or any(bn is None for bn in bns[1:]):
        raise ValueError(
            f"{name}bns: expected one BatchNorm for each convolution; only the first may be None"
        )
    added = None
    if shortcut is not None:
        added = shape
        if projection is not None:
            added = _check_conv(projection, shape, f"{name}projection.weight")
    shapes = []
    single = len(convs) == 1 and not name
    for i, (bn, conv) in enumerate(zip(bns, convs, strict=True)):
        shapes.append(shape)
        if bn is not None:
            _check_bn(bn, shape[1], "" if single else f"{name}bns[{i}].")
            _check_batch(bn, shape)
        shape = _check_conv(conv, shape, "weight" if single else f"{name}convs[{i}].weight")
    if added is not None:
        _check_added(f"{name}shortcut", added, shape)
    return shapes, shape


def _check_added(name: str, shape: Sequence[int], output: Sequence[int]) -> None:
    if tuple(shape) != tuple(output):
        raise ValueError(f"{name}: expected shape {tuple(output)}, got {tuple(shape)}")
