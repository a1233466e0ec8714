"""The operator calls of a training step, taken from the model itself, on tensors without data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from measure import count_flops, layer_by_layer, moves_nothing, runs_units
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fused_preact import backend
from fused_preact.resnet import create_model


@dataclass(frozen=True)
class Spec:
    """A tensor but for its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


@dataclass(frozen=True)
class Call:
    operator: str  # "fused_preact::bn_stats"
    arguments: tuple[Any, ...]  # a Spec for each tensor; lists are tuples
    results: tuple[Spec, ...]
    flops: int  # of PyTorch's own convolutions and products
    weight_gradients: tuple["Call", ...] = ()  # of which a call of units adds up partial results

    def specs(self) -> list[Spec]:
        """Of all tensors, arguments first."""
        leaves = tree_leaves((self.arguments, self.results))
        return [leaf for leaf in leaves if isinstance(leaf, Spec)]


class Step(NamedTuple):
    """A training step of the report."""

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]  # of its images
    goal: str  # on one H100


BY_WARPGROUPS = " by wgmma"  # behind a step's name, in the report, of the kernels asked for
ZEROS = 16 << 10  # bytes, of a call of units: csrc/torch/units_call.h

STEPS = {
    "R-1001": Step(
        partial(create_model, "preact_resnet1001", 10, "cifar"),
        (128, 3, 32, 32),
        "at most 20 ms; floor 18.5",
    ),
    "R-200": Step(
        partial(create_model, "preact_resnet200", 1000, "imagenet"),
        (256, 3, 224, 224),
        "at most 85.3 ms, 3000 images/s; floor 65.5",
    ),
    "WRN-28-10": Step(
        partial(create_model, "wide_resnet28_10", 10, "cifar"), (128, 3, 32, 32), "floor 5.8 ms"
    ),
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if runs_units(function):
            # what its reductions count arrivals in is set to zero once for all of them
            self.calls.append(Call("aten::zero_", (Spec((ZEROS,), (1,), torch.uint8),), (), 0))
            first = len(self.calls)
            with self:
                output = layer_by_layer(function, args, kwargs)
            wgrads = tuple(c for c in self.calls[first:] if weight_gradient(c) is not None)
            if wgrads:
                results = tuple(map(weight_gradient, wgrads))
                arguments = _frozen(tree_map(_spec, (*args, *(kwargs or {}).values())))
                self.calls.append(Call(function._schema.name, arguments, results, 0, wgrads))
            return output
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if _launches(function):
            specs = tree_map(_spec, (*args, *kwargs.values()))
            results = tuple(_spec(t) for t in tree_leaves(output) if isinstance(t, Tensor))
            flops = 0
            if function.namespace == "aten":
                flops = count_flops(function, args, kwargs, output)
            call = Call(function._schema.name, _frozen(specs), results, flops)
            self.calls.append(call)
        return output


def step_calls(build: Callable[[], nn.Module], shape: tuple[int, int, int, int]) -> list[Call]:
    """Of a training step of build()'s model on images of a shape: autocast to bfloat16, SGD.

    Every convolution is by our kernels, as under backend("cuda"): the planner itself gives wide
    ones to PyTorch. The step is the second one, when the optimiser's state exists.
    """
    model = build().to(memory_format=torch.channels_last).train()
    fake = FakeTensorMode()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)
    with fake:
        images = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(shape[0], dtype=torch.long)
        # foreach: the default on a GPU
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=True
        )
        for _ in range(2):
            with _Recorder() as recorder:
                with backend("cpu"), torch.autocast("cpu", torch.bfloat16):
                    output = model(images)
                optimizer.zero_grad()
                nn.functional.cross_entropy(output.float(), labels).backward()
                optimizer.step()
    return recorder.calls


def _launches(function: Any) -> bool:
    """Whether an operator has work for a GPU."""
    return function.namespace in ("aten", "fused_preact") and not moves_nothing(function)


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Spec(tuple(value.shape), tuple(value.stride()), value.dtype)
    return value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def parts(call: Call) -> list[Call]:
    """What a call of both gradients does one after the other where it has no kernel; else nothing.

    Of a residual sum: residual_grad and preact_conv_backward. Of that: wgrad and dgrad.
    """
    name = call.operator.split("::")[1]
    if name == "residual_conv_backward":
        dy, *gradients = call.results
        sum_bn, layer, conv = call.arguments[:5], call.arguments[5:8], call.arguments[8:13]
        both = dy, None, None, None, *layer, None, *conv, True, *call.arguments[13:]
        return [
            Call("fused_preact::residual_grad", sum_bn, (dy,), 0),
            Call("fused_preact::preact_conv_backward", both, tuple(gradients), 0),
        ]
    if name == "preact_conv_backward":
        *of_dy, weight, u, affine = call.arguments[:7]
        conv, allow_tf32 = call.arguments[8:13], call.arguments[14:15]  # none where the default
        g, sums, dw = call.results
        wgrad = *of_dy, u, affine, weight.shape[2:], *conv, *allow_tf32
        return [
            Call("fused_preact::preact_conv_wgrad", wgrad, (dw,), 0),
            Call("fused_preact::preact_conv_dgrad", call.arguments, (g, sums), 0),
        ]
    return []


def by_kernel(call: Call, has_kernel: Callable[[Call], bool]) -> list[Call]:
    """A call as what of it has a kernel."""
    pieces = parts(call)
    if not pieces or has_kernel(call):
        return [call]
    return [one for part in pieces for one in by_kernel(part, has_kernel)]


# --- what a call amounts to ---------------------------------------------------------------------


def weight_gradient(call: Call) -> Spec | None:
    """The result of a call that is one; None where it has none."""
    name = call.operator.split("::")[1]
    of_name = {"preact_conv_wgrad": 0, "preact_conv_backward": 2, "residual_conv_backward": 3}
    return call.results[of_name[name]] if name in of_name else None


def call_bytes(call: Call) -> int:
    """Of a call's tensors, each once: a 1x1 of stride 2 reads a quarter of its input."""
    if call.weight_gradients:
        return sum(result.bytes for result in call.results)
    total = sum(spec.bytes for spec in call.specs())
    if call.operator.endswith("preact_conv_forward"):
        u, _, weight, _, stride = call.arguments[:5]
        kernel = weight.shape[2:]
    elif call.operator.endswith("preact_conv_wgrad"):
        u, _, kernel, stride = call.arguments[4:8]
    else:
        return total
    read = min(1, kernel[0] / stride[0]) * min(1, kernel[1] / stride[1])
    return total - round((1 - read) * u.bytes)


def call_flops(call: Call) -> int:
    """Of a convolution: 2 M' K C R S, of both its gradients twice that."""
    name = call.operator.split("::")[1]
    if name == "preact_conv_forward":
        weight, result = call.arguments[2].shape, call.results[0].shape
    elif name == "preact_conv_dgrad":
        weight, result = call.arguments[4].shape, call.arguments[0].shape
    elif name == "preact_conv_wgrad":
        weight, result = call.results[0].shape, call.arguments[0].shape
    elif name in ("preact_conv_backward", "residual_conv_backward"):
        return sum(map(call_flops, parts(call)))
    else:
        return call.flops
    return 2 * math.prod(result) * math.prod(weight[1:])


def shape_class(call: Call) -> str:
    """A convolution's geometry, or the activations of a pointwise kernel."""
    name = call.operator.split("::")[1]
    if name == "preact_conv_forward":
        u, _, weight, residual, stride = call.arguments[:5]
        kernel, filters, extra = weight.shape[2:], weight.shape[0], residual
    elif name in ("preact_conv_dgrad", "preact_conv_backward"):
        weight, u, _, extra, stride = call.arguments[4:9]
        kernel, filters = weight.shape[2:], weight.shape[0]
    elif name == "residual_conv_backward":
        weight, u, _, stride = call.arguments[5:9]
        kernel, filters, extra = weight.shape[2:], weight.shape[0], call.arguments[0]
    elif name == "preact_conv_wgrad":
        u, _, kernel, stride = call.arguments[4:8]
        filters, extra = call.results[0].shape[0], None
    elif call.weight_gradients:
        return f"{len(call.results)} weights, {'x'.join(map(str, call.results[0].shape))} first"
    else:
        return "x".join(map(str, call.specs()[0].shape)) if call.specs() else ""
    n, c, h, w = u.shape
    text = f"{n}x{h}x{w}, {c} -> {filters}, {kernel[0]}x{kernel[1]}"
    text += f"/{stride[0]}" if stride[0] > 1 else ""
    deferred = name != "preact_conv_forward" and call.arguments[1] is not None
    return text + ", deferred" * deferred + ", added" * (extra is not None)
