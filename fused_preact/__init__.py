"""Pre-activation residual networks on fused training kernels (He et al. 2016, arXiv:1603.05027)."""

from .doctor import build_info, require_torch

require_torch()  # one readable error, before anything that needs it

from importlib.metadata import PackageNotFoundError, version  # noqa: E402

from .blocks import PreActBlock, PreActBottleneck, PreActStage  # noqa: E402
from .conversion import Conversion, convert, unconvert  # noqa: E402
from .functional import bn_relu, preact_conv2d  # noqa: E402
from .ops import backend  # noqa: E402
from .resnet import (  # noqa: E402
    PreActResNet,
    create_model,
    preact_resnet18,
    preact_resnet34,
    preact_resnet50,
    preact_resnet101,
    preact_resnet110,
    preact_resnet152,
    preact_resnet164,
    preact_resnet200,
    preact_resnet1001,
    preact_resnet_cifar,
    wide_resnet,
)

try:
    __version__ = version("fused_preact")
except PackageNotFoundError:  # run from a source tree
    __version__ = "unknown"

__all__ = [
    "Conversion",
    "PreActBlock",
    "PreActBottleneck",
    "PreActResNet",
    "PreActStage",
    "__version__",
    "backend",
    "bn_relu",
    "build_info",
    "convert",
    "create_model",
    "preact_conv2d",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet110",
    "preact_resnet152",
    "preact_resnet164",
    "preact_resnet200",
    "preact_resnet1001",
    "preact_resnet_cifar",
    "unconvert",
    "wide_resnet",
]
