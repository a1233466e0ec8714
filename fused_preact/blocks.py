"""Residual units as modules: PreActBlock and PreActBottleneck, and PreActStage, a row of them.

Their children are PyTorch's own layers, named as in the widely used CIFAR implementation, so that
checkpoints load both ways. The fused functions read the children's tensors and settings at each
forward, and nothing is cached. A child that somebody replaced, hooked or patched is called
instead, and with it the whole unit runs child by child.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.modules.utils import _pair
from torch.nn.utils.parametrize import type_before_parametrizations

from . import functional
from .functional import BatchNorm, Conv, Unit

UNIT_KINDS = ("normal", "both_preact", "no_preact")

Layer = TypeVar("Layer", bound=nn.Module)

_ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
_FORWARDS: dict[type[nn.Module], Any] = {  # PyTorch's, as they are before somebody patches them
    kind: kind.forward
    for kind in (nn.BatchNorm2d, nn.Conv2d, nn.Identity, nn.ReLU, nn.Sequential, nn.SiLU)
}
_BNS, _CONVS = ("bn1", "bn2", "bn3"), ("conv1", "conv2", "conv3")  # children by the layer


class PreActUnit(nn.Module):
    """What PreActBlock and PreActBottleneck share: convolutions behind BN and activation, shortcut.

    Its children are bn1, conv1, bn2, conv2, ... and shortcut, an nn.Sequential that holds a 1x1
    convolution where the unit changes shape and is empty elsewhere.
    """

    expansion: ClassVar[int]  # channels of the output / planes
    depth: ClassVar[int]  # convolutions in the branch

    def __init__(
        self,
        convs: list[nn.Conv2d],
        stride: int,
        preact: str | None,
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        in_planes, out_planes = convs[0].in_channels, convs[-1].out_channels
        projects = stride != 1 or in_planes != out_planes
        self.preact = preact or ("both_preact" if projects else "normal")
        self.activation = activation
        self.dropout = dropout
        _check_choice("preact", self.preact, UNIT_KINDS)
        _check_choice("activation", activation, tuple(_ACTIVATIONS))
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability, got {dropout}")
        for i, conv in enumerate(convs):
            reads_raw = i == 0 and self.preact == "no_preact"
            self.register_module(_BNS[i], None if reads_raw else nn.BatchNorm2d(conv.in_channels))
            self.register_module(_CONVS[i], conv)
        self.shortcut = nn.Sequential()
        if projects:
            self.shortcut.append(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False))

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_planes, H, W) to (N, planes * expansion, H', W'), H' = ceil(H / stride).

        Raises ValueError for one value per channel in training, as nn.BatchNorm2d does.
        """
        unit = self._read() if isinstance(input, Tensor) else None
        if unit is None:
            return self._call_children(input)
        if self._drops():
            return self._call_dropping(input, unit)
        return functional.preact_units(input, [unit], activation=self.activation)

    def extra_repr(self) -> str:
        return f"preact={self.preact!r}, activation={self.activation!r}, dropout={self.dropout}"

    def _read(self) -> Unit | None:
        """Its tensors and settings, if its children are PyTorch's own layers and nothing but they
        has to be called."""
        modules: dict[str, Any] = self._modules
        shortcut = modules["shortcut"]
        if _has_any_global_hook():
            return None
        if not is_unchanged(shortcut, nn.Sequential) or len(shortcut._modules) > 1:
            return None
        bns: list[BatchNorm | None] = []
        for name in _BNS[: self.depth]:
            bn = modules[name]
            if bn is None:
                bns.append(None)
                continue
            if not is_unchanged(bn, nn.BatchNorm2d):
                return None
            bns.append(read_batch_norm(bn))
        convs = [modules[name] for name in _CONVS[: self.depth]]
        if not all(is_plain_conv(conv) for conv in (*convs, *shortcut._modules.values())):
            return None
        return Unit(
            bns,
            [read_conv(conv) for conv in convs],
            "preact" if self.preact == "both_preact" else "input",
            read_conv(shortcut[0]) if shortcut._modules else None,
        )

    def _drops(self) -> bool:
        return bool(self.dropout) and self.training

    def _call_dropping(self, input: Tensor, unit: Unit) -> Tensor:
        """The unit, cut where dropout lies: before its last convolution."""
        bns, convs = list(unit.bns), list(unit.convs)
        last_bn, last_conv = bns.pop(), convs.pop()
        assert last_bn is not None
        u = shortcut = input
        if unit.shortcut == "preact" and bns[0] is not None:  # read by branch and projection
            u = shortcut = functional.bn_activation(input, bns[0], self.activation)
            bns[0] = None
        if unit.projection is not None:
            shortcut = functional.preact_unit(shortcut, [None], [unit.projection])
        u = functional.preact_unit(u, bns, convs, activation=self.activation)
        h = functional.bn_activation(u, last_bn, self.activation)
        h = F.dropout(h, self.dropout)
        return functional.preact_unit(h, [None], [last_conv], residual=shortcut)

    def _call_children(self, input: Tensor) -> Tensor:
        activate = _ACTIVATIONS[self.activation]
        u = input
        for i in range(self.depth):
            bn, conv = getattr(self, _BNS[i]), getattr(self, _CONVS[i])
            h = u if bn is None else activate(bn(u))
            if i == 0:
                shortcut = self.shortcut(h if self.preact == "both_preact" else input)
            if i == self.depth - 1:
                h = F.dropout(h, self.dropout, self.training)
            u = conv(h)
        return u + shortcut


class PreActBlock(PreActUnit):
    """The basic unit: BN, activation, 3x3 convolution, twice, plus a shortcut.

    in_planes   channels of the input.
    planes      channels of both convolutions and of the output.
    stride      of the first convolution and of the projection.
    preact      what the shortcut reads. "normal": the raw input. "both_preact": the activated
                input, which the branch reads too. "no_preact": there is no first BN, and branch
                and shortcut read the input as it is. None: "both_preact" where the unit changes
                shape, else "normal".
    activation  "relu" or "silu".
    dropout     probability, in training, before the last convolution.

    Raises ValueError for a preact or activation that does not exist.

    He et al. 2016, figure 4(e); the names of the unit kinds are those of fb.resnet.torch.
    """

    expansion = 1
    depth = 2

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        *,
        preact: str | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        convs = [
            nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False),
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
        ]
        super().__init__(convs, stride, preact, activation, dropout)


class PreActBottleneck(PreActUnit):
    """The bottleneck unit: 1x1, 3x3 and 1x1 convolutions behind BN and activation, + shortcut.

    in_planes   channels of the input.
    planes      channels between the 1x1 convolutions; the output has 4 * planes.
    stride      of the convolution stride_at and of the projection.
    stride_at   "conv2", the 3x3 (ImageNet models); or "conv1" (the paper's CIFAR models).
    preact, activation, dropout  as in PreActBlock.

    Raises ValueError for a preact, stride_at or activation that does not exist.

    He et al. 2016, figure 4(e) with the bottleneck of the deeper networks.
    """

    expansion = 4
    depth = 3

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        *,
        preact: str | None = None,
        stride_at: str = "conv2",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        _check_choice("stride_at", stride_at, ("conv1", "conv2"))
        stride1, stride2 = (stride, 1) if stride_at == "conv1" else (1, stride)
        convs = [
            nn.Conv2d(in_planes, planes, 1, stride1, bias=False),
            nn.Conv2d(planes, planes, 3, stride2, padding=1, bias=False),
            nn.Conv2d(planes, planes * self.expansion, 1, bias=False),
        ]
        super().__init__(convs, stride, preact, activation, dropout)


class PreActStage(nn.Sequential):
    """Units one after the other, several in a call of the fused functions where they can be.

    A unit that somebody replaced, hooked or patched is called by itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """What calling its modules one after the other returns."""
        return call_in_turn(self, input, read_unit)


ReadUnit = Callable[[nn.Module], tuple[Unit, str] | None]  # a unit and its activation


def call_in_turn(modules: Iterable[nn.Module], input: Tensor, read: ReadUnit) -> Tensor:
    """What calling the modules one after the other returns; those that are units share calls."""
    together: list[Unit] = []
    counted: set[int] = set()  # by whom
    activation = ""
    for module in modules:
        found = read(module) if isinstance(input, Tensor) else None
        counters = set() if found is None else {id(bn.counter) for bn in _counting(found[0])}
        again = not counted.isdisjoint(counters)
        if together and (found is None or found[1] != activation or again):
            input = functional.preact_units(input, together, activation=activation)
            together, counted = [], set()
            if again:  # where momentum is None it goes by what has been counted
                found = read(module)
        if found is None:
            input = module(input)
        else:
            together.append(found[0])
            counted |= counters
            activation = found[1]
    if together:
        input = functional.preact_units(input, together, activation=activation)
    return input


def _counting(unit: Unit) -> Iterator[BatchNorm]:
    return (bn for bn in unit.bns if bn is not None and bn.counter is not None)


def read_unit(module: nn.Module) -> tuple[Unit, str] | None:
    """Of a PreActUnit, if calling it does what PreActUnit.forward does, and nothing else."""
    if (
        not isinstance(module, PreActUnit)
        or type(module).forward is not PreActUnit.forward
        or not is_unchanged(module, type(module))
        or module._drops()
    ):
        return None
    unit = module._read()
    return None if unit is None else (unit, module.activation)


def bn_activation(bn: nn.Module, input: Tensor, activation: str) -> Tensor:
    """activation(bn(input)), fused where bn is a plain nn.BatchNorm2d; (N, C, H, W) both."""
    if (
        isinstance(input, Tensor)
        and is_unchanged(bn, nn.BatchNorm2d)
        and not _has_any_global_hook()
    ):
        return functional.bn_activation(input, read_batch_norm(bn), activation)
    return _ACTIVATIONS[activation](bn(input))


def is_plain_conv(conv: nn.Module) -> bool:
    return (
        is_unchanged(conv, nn.Conv2d)
        and _tensor(conv, conv._parameters, "bias") is None
        and conv.padding_mode == "zeros"
        and type(conv.padding) is not str
    )


def is_unchanged(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether calling module does what kind.forward and global hooks do, and nothing else."""
    return (
        (type(module) is kind or type_before_parametrizations(module) is kind)
        and "forward" not in module.__dict__
        and "_conv_forward" not in module.__dict__  # which nn.Conv2d.forward calls
        and kind.forward is _FORWARDS.get(kind, kind.forward)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and module._compiled_call_impl is None
    )


def read_batch_norm(bn: nn.BatchNorm2d) -> BatchNorm:
    """What nn.BatchNorm2d.forward passes to batch_norm, and what it counts the batch with."""
    parameters, buffers, training, momentum = bn._parameters, bn._buffers, bn.training, bn.momentum
    mean = var = counter = None
    if not training or bn.track_running_stats:
        mean = _tensor(bn, buffers, "running_mean")
        var = _tensor(bn, buffers, "running_var")
        counter = _tensor(bn, buffers, "num_batches_tracked") if training else None
    if momentum is None:  # the average of all batches
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1)
    return BatchNorm(
        _tensor(bn, parameters, "weight"),
        _tensor(bn, parameters, "bias"),
        mean,
        var,
        training or (mean is None and var is None),
        momentum,
        bn.eps,
        counter,
    )


def read_conv(conv: Any) -> Conv:
    """The settings of a plain nn.Conv2d."""
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    if not type(stride) is type(padding) is type(dilation) is tuple:  # one was set later
        stride, padding, dilation = map(_pair, (stride, padding, dilation))
    rows, columns = padding
    weight = _tensor(conv, conv._parameters, "weight")
    return Conv(weight, stride, (rows, rows, columns, columns), dilation, conv.groups)


def _tensor(module: nn.Module, registered: Mapping[str, Any], name: str) -> Any:
    """module's attribute; by nn.Module.__getattr__ it takes five times as long."""
    return registered[name] if name in registered else getattr(module, name)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
