"""Pre-activation ResNets of the paper, and their CIFAR, ImageNet and wide relatives."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .blocks import PreActBlock, PreActBottleneck, PreActStage, PreActUnit, bn_activation

_IMAGENET: dict[int, tuple[type[PreActUnit], tuple[int, ...]]] = {
    18: (PreActBlock, (2, 2, 2, 2)),
    34: (PreActBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
    101: (PreActBottleneck, (3, 4, 23, 3)),
    152: (PreActBottleneck, (3, 8, 36, 3)),
    200: (PreActBottleneck, (3, 24, 36, 3)),
}


class PreActResNet(nn.Module):
    """A pre-activation residual network.

    block        PreActBlock, PreActBottleneck, or a class that takes the same arguments.
    num_blocks   units in each stage.
    num_classes  outputs.
    stem         "cifar": a 3x3 convolution. "imagenet": a 7x7 convolution of stride 2, BN,
                 activation and a 3x3 max pooling of stride 2.
    widths       planes of each stage, as many as num_blocks; every stage after the first halves
                 height and width.
    stem_width   channels of the stem, by default those of the first stage.
    stride_at    which convolution carries a bottleneck's stride, "conv1" or "conv2" (default).
    first_unit   the kind of the first unit (preact of PreActBlock). By default "no_preact" after
                 the ImageNet stem, whose output is activated already, else the block's default;
                 "both_preact" is the paper's form after the CIFAR stem.
    final_bn     BN and activation before pooling, as in the paper; False for checkpoints of the
                 CIFAR implementation that lacks them.
    activation   "relu" or "silu", everywhere.
    dropout      probability, in training, before the last convolution of each unit.

    Children: conv1 (and bn1 in the ImageNet stem), layer1, layer2, ..., bn, linear. Convolutions
    start from He's normal distribution over fan_out, BN at 1 and 0, the classifier's bias at 0.

    Raises ValueError for settings that do not exist or do not fit.

    He et al. 2016; topologies of resnet-1k-layers (CIFAR) and fb.resnet.torch (ImageNet).
    """

    def __init__(
        self,
        block: type[PreActUnit],
        num_blocks: Sequence[int],
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int | None = None,
        stride_at: str | None = None,
        first_unit: str | None = None,
        final_bn: bool = True,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem: expected 'cifar' or 'imagenet', got {stem!r}")
        if len(widths) != len(num_blocks) or min(num_blocks, default=0) < 1:
            raise ValueError(
                f"num_blocks, widths: expected one of each, positive, for every stage, "
                f"got {tuple(num_blocks)} and {tuple(widths)}"
            )
        options: dict[str, Any] = {"activation": activation, "dropout": dropout}
        if stride_at is not None:
            options["stride_at"] = stride_at
        if stem == "imagenet" and first_unit is None:
            first_unit = "no_preact"
        make_unit: Callable[..., nn.Module] = block
        planes = stem_width or widths[0]
        self.stem = stem
        self.stages = len(widths)
        self.activation = activation
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
        else:
            self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        for stage, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            units = PreActStage()
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                preact = first_unit if stage == 0 and i == 0 else None
                units.append(make_unit(planes, width, stride, preact=preact, **options))
                planes = width * block.expansion
            self.add_module(f"layer{stage + 1}", units)
        self.bn = nn.BatchNorm2d(planes) if final_bn else None
        self.linear = nn.Linear(planes, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation: convolutions normal over fan_out, BN 1 and 0, the last bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W), any H and W, to logits (N, num_classes)."""
        if not ops.is_transformed():  # vmap knows no channels_last
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.conv1(images)
        if self.stem == "imagenet":
            x = bn_activation(self.bn1, x, self.activation)
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        if self.bn is not None:
            x = bn_activation(self.bn, x, self.activation)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def preact_resnet18(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """18 layers, basic units. With stem="cifar" the PreActResNet-18 of the robustness papers.

    11,690,512 parameters; with the CIFAR stem and 10 classes 11,172,170 (11.17 M as published:
    11,171,146 without the final BN, final_bn=False). options are those of PreActResNet.
    """
    return _imagenet(18, num_classes, stem, options)


def preact_resnet34(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """34 layers, basic units. options are those of PreActResNet."""
    return _imagenet(34, num_classes, stem, options)


def preact_resnet50(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """50 layers, bottleneck units, stride on the 3x3. options are those of PreActResNet."""
    return _imagenet(50, num_classes, stem, options)


def preact_resnet101(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """101 layers, bottleneck units, stride on the 3x3. options are those of PreActResNet."""
    return _imagenet(101, num_classes, stem, options)


def preact_resnet152(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """152 layers, bottleneck units, stride on the 3x3. options are those of PreActResNet."""
    return _imagenet(152, num_classes, stem, options)


def preact_resnet200(
    num_classes: int = 1000, stem: str = "imagenet", **options: Any
) -> PreActResNet:
    """200 layers, bottleneck units (3, 24, 36, 3), stride on the 3x3: fb.resnet.torch's network.

    options are those of PreActResNet.
    """
    return _imagenet(200, num_classes, stem, options)


def preact_resnet_cifar(
    depth: int, num_classes: int = 10, block: type[PreActUnit] | None = None, **options: Any
) -> PreActResNet:
    """The paper's CIFAR network of any depth: a stem of 16, three stages of 16, 32, 64 planes.

    depth is 6n + 2 with basic units and 9n + 2 with bottlenecks, whose stride is on the first
    1x1. block=None takes what the paper takes where both fit: basic units below 164 layers,
    bottlenecks from there on. options are those of PreActResNet.

    Raises ValueError for a depth that does not fit.
    """
    blocks: list[type[PreActUnit]] = [PreActBlock, PreActBottleneck] if block is None else [block]
    if depth >= 164:
        blocks.reverse()
    for block in blocks:
        count, rest = divmod(depth - 2, 3 * block.depth)
        if count >= 1 and rest == 0:
            break
    else:
        forms = " or ".join(f"{3 * block.depth}n + 2 ({block.__name__})" for block in blocks)
        raise ValueError(f"depth: expected {forms}, got {depth}")
    settings: dict[str, Any] = {"widths": (16, 32, 64), "first_unit": "both_preact"}
    if issubclass(block, PreActBottleneck):
        settings["stride_at"] = "conv1"
    return PreActResNet(block, (count,) * 3, num_classes, **{**settings, **options})


def preact_resnet110(num_classes: int = 10, **options: Any) -> PreActResNet:
    """The paper's ResNet-110 for CIFAR, basic units. options are those of PreActResNet."""
    return preact_resnet_cifar(110, num_classes, **options)


def preact_resnet164(num_classes: int = 10, **options: Any) -> PreActResNet:
    """The paper's ResNet-164 for CIFAR, bottleneck units. options are those of PreActResNet."""
    return preact_resnet_cifar(164, num_classes, **options)


def preact_resnet1001(num_classes: int = 10, **options: Any) -> PreActResNet:
    """The paper's ResNet-1001 for CIFAR, bottleneck units. options are those of PreActResNet."""
    return preact_resnet_cifar(1001, num_classes, **options)


def wide_resnet(
    depth: int, widen_factor: int, num_classes: int = 10, dropout: float = 0.0, **options: Any
) -> PreActResNet:
    """A wide ResNet for CIFAR: a stem of 16, three stages of 16k, 32k, 64k planes, basic units.

    depth is 6n + 4. WRN-28-10 has 36,479,194 parameters with 10 classes (36.5 M as published).
    options are those of PreActResNet.

    Raises ValueError for a depth or widen_factor that does not fit.

    Zagoruyko and Komodakis 2016, arXiv:1605.07146.
    """
    count, rest = divmod(depth - 4, 6)
    if count < 1 or rest:
        raise ValueError(f"depth: expected 6n + 4, got {depth}")
    if widen_factor < 1:
        raise ValueError(f"widen_factor: expected at least 1, got {widen_factor}")
    widths = tuple(width * widen_factor for width in (16, 32, 64))
    settings: dict[str, Any] = {"widths": widths, "stem_width": 16, "dropout": dropout}
    return PreActResNet(PreActBlock, (count,) * 3, num_classes, **{**settings, **options})


def create_model(arch: str, num_classes: int, stem: str = "cifar") -> PreActResNet:
    """The network of a name: preact_resnet18 or another depth, wide_resnet28_10.

    preact_resnet18, 34, 50, 101, 152 and 200 are the ImageNet topologies, with either stem. Any
    other depth is preact_resnet_cifar's, and wide_resnetDEPTH_FACTOR is wide_resnet's; these two
    have the CIFAR stem only.

    Raises ValueError for any other name, depth or stem.
    """
    if match := re.fullmatch(r"preact_resnet(\d+)", arch):
        depth = int(match[1])
        if depth in _IMAGENET:
            return _imagenet(depth, num_classes, stem, {})
        return preact_resnet_cifar(depth, num_classes)
    if match := re.fullmatch(r"wide_resnet(\d+)_(\d+)", arch):
        return wide_resnet(int(match[1]), int(match[2]), num_classes)
    depths = "|".join(str(depth) for depth in _IMAGENET)
    raise ValueError(
        f"arch: expected preact_resnet{depths}, preact_resnetDEPTH with DEPTH = 6n + 2 or 9n + 2, "
        f"or wide_resnetDEPTH_FACTOR with DEPTH = 6n + 4, got {arch!r}"
    )


def _imagenet(depth: int, num_classes: int, stem: str, options: dict[str, Any]) -> PreActResNet:
    block, num_blocks = _IMAGENET[depth]
    return PreActResNet(block, num_blocks, num_classes, stem=stem, **options)
