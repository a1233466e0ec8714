"""What is measured: operators, units, whole training steps and attack steps, with their shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from contenders import Contender
from graphs import Captured
from operators import OperatorCase, operator_cases, rotated
from torch import Tensor, nn

import fused_preact
from fused_preact.resnet import PreActResNet, create_model, preact_resnet_cifar

Step = Callable[[int], list[Tensor]]  # one step on the images of an index

# Images in a batch: a CPU's take seconds at most, a GPU's are those of the papers. There
# R-200 has as many as float64 truth leaves room for.
BATCHES = {
    "cpu": {
        "bottleneck": 64,
        "imagenet": 8,
        "basic": 16,
        "R-164": 64,
        "R-1001": 8,
        "R-200": 4,
        "PreActResNet-18": 16,
        "WRN-28-10": 16,
        "DenseNet-121": 4,
        "ResNetV2-50": 4,
        "depth": 8,
    },
    "cuda": {
        "bottleneck": 128,
        "imagenet": 64,
        "basic": 128,
        "R-164": 128,
        "R-1001": 128,
        "R-200": 64,
        "PreActResNet-18": 128,
        "WRN-28-10": 128,
        "DenseNet-121": 64,
        "ResNetV2-50": 64,
        "depth": 128,
    },
}


@dataclass(frozen=True)
class Case:
    """A module, its input and what of a step is run.

    passes  "forward" (evaluation), "forward+backward" (training), "attack" (the gradient of the
            input alone: frozen weights, evaluation mode).
    quick   whether a run without options has it.
    deep    a network that takes too long to compile as a whole.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    passes: str
    quick: bool
    deep: bool = False
    seed: int = 0

    def step(self, contender: Contender, dtype: torch.dtype, device: torch.device) -> Step:
        """A step by a contender: each call runs it and returns what can be compared.

        The same seed gives every contender the same weights and images. bfloat16 runs under
        autocast, float64 is the truth that the others are checked against.
        """
        torch.manual_seed(self.seed)
        exact = torch.promote_types(dtype, torch.float32)
        layout = getattr(torch, contender.memory_format)
        model = self.build()
        if contender.backend == "eager":
            fused_preact.unconvert(model)
        model = model.to(device, exact).to(memory_format=layout)
        model.train(self.passes == "forward+backward").requires_grad_(self.passes != "attack")
        if layout == torch.contiguous_format and isinstance(model, PreActResNet):
            # it turns its images to channels_last; from the stem on all is NCHW
            model.conv1.register_forward_hook(lambda module, args, output: output.contiguous())
        # a unit reads what the unit before it wrote; every dtype sees the same numbers
        read = dtype if self.group == "unit" else exact
        batch = [
            torch.randn(self.shape).bfloat16().to(device, read).contiguous(memory_format=layout)
            for _ in range(rotated(device))
        ]
        wants_grad = self.passes == "attack" or self.group == "unit"
        run = _compiled(model, contender)

        def forward(images: Tensor) -> Tensor:
            with (
                fused_preact.backend(contender.backend),
                torch.autocast(device.type, dtype, enabled=dtype != exact),
            ):
                return run(images)

        def step(images: Tensor) -> list[Tensor]:
            if self.passes == "forward":
                with torch.no_grad():
                    return [forward(images)]
            images = images.detach().requires_grad_(wants_grad)
            output = forward(images)
            loss = output.to(exact).square().mean()
            if self.passes == "attack":
                return [output.detach(), *torch.autograd.grad(loss, images)]
            loss.backward()
            leaves = [images, *model.parameters()]
            grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
            model.zero_grad(set_to_none=True)  # each step starts without, so that its peak has them
            return [output.detach(), *grads]

        run_step = Captured(step, batch[0]) if contender.captured else step

        def next_step(index: int) -> list[Tensor]:
            if contender.compiled == "max-autotune":
                torch.compiler.cudagraph_mark_step_begin()
            return run_step(batch[index % len(batch)])

        return next_step


def _compiled(model: nn.Module, contender: Contender) -> Callable[[Tensor], Tensor]:
    if contender.compiled is None:
        return model
    if not contender.units:
        return torch.compile(model, mode=contender.compiled)
    torch._dynamo.config.recompile_limit = 64  # units of all shapes share the code of forward()
    for unit in model.modules():
        if isinstance(unit, fused_preact.PreActBlock | fused_preact.PreActBottleneck):
            unit.compile(mode=contender.compiled)
    return model


def all_cases(device: str) -> list[OperatorCase | Case]:
    """Every case with the batches of a device, "cpu" or "cuda"."""
    batches = BATCHES[device]
    return [*operator_cases(batches), *_units(batches), *_networks(batches, device == "cuda")]


def _units(batches: dict[str, int]) -> list[Case]:
    """Named KIND-PLANESxSIZE, the size of the input's images."""
    bottleneck, basic = fused_preact.PreActBottleneck, fused_preact.PreActBlock
    units = []  # kind, batch, unit, channels in, planes, size, stride, quick
    for size, planes in ((32, 16), (16, 32), (8, 64)):
        units.append(("bottleneck", "bottleneck", bottleneck, 4 * planes, planes, size, 1, True))
    for size, planes in ((56, 64), (28, 128), (14, 256), (7, 512)):
        units.append(("bottleneck", "imagenet", bottleneck, 4 * planes, planes, size, 1, False))
    for size, planes in ((32, 64), (16, 128), (8, 256), (4, 512)):
        units.append(("basic", "basic", basic, planes, planes, size, 1, planes < 256))
    for size, planes in ((32, 160), (16, 320), (8, 640)):
        units.append(("basic", "basic", basic, planes, planes, size, 1, False))
    for size, planes in ((32, 32), (16, 64)):
        unit = "bottleneck", bottleneck, 2 * planes, planes, size, 2, False
        units.append(("projection-bottleneck", *unit))
    for size, planes in ((56, 128), (28, 256), (14, 512)):
        unit = "imagenet", bottleneck, 2 * planes, planes, size, 2, False
        units.append(("projection-bottleneck", *unit))
    for size, planes in ((32, 128), (16, 256), (8, 512), (32, 320), (16, 640)):
        unit = "basic", basic, planes // 2, planes, size, 2, False
        units.append(("projection-basic", *unit))
    return [
        Case(
            f"{kind}-{planes}x{size}",
            "unit",
            _unit(unit, in_planes, planes, stride),
            (batches[batch], in_planes, size, size),
            passes,
            quick and passes != "forward",
        )
        for kind, batch, unit, in_planes, planes, size, stride, quick in units
        for passes in ("forward", "forward+backward")
    ]


def _networks(batches: dict[str, int], fast: bool) -> list[Case]:
    """fast: on a device where deep and wide ones take seconds, so that a quick run has them."""
    train, attack = "forward+backward", "attack"
    small, large = (3, 32, 32), (3, 224, 224)
    r164, r18 = _model("preact_resnet164"), _model("preact_resnet18")
    wide, r1001 = _model("wide_resnet28_10"), _model("preact_resnet1001")
    r200 = _model("preact_resnet200", "imagenet", 1000)

    def case(name, group, build, image, passes, quick, deep=False):
        return Case(name, group, build, (batches[name], *image), passes, quick, deep)

    return [
        case("R-164", "step", r164, small, train, True, True),
        case("R-1001", "step", r1001, small, train, fast, True),
        case("R-200", "step", r200, large, train, fast, True),
        case("PreActResNet-18", "step", r18, small, train, True),
        case("WRN-28-10", "step", wide, small, train, fast),
        *(case(name, "step", build, large, train, False) for name, build in _others().items()),
        case("R-164", "attack", r164, small, attack, True, True),
        case("PreActResNet-18", "attack", r18, small, attack, False),
        case("WRN-28-10", "attack", wide, small, attack, False),
        *(
            Case(
                f"R-{depth}",
                "depth",
                _cifar(depth),
                (batches["depth"], *small),
                train,
                quick=False,
                deep=True,
            )
            for depth in (29, 83, 164, 326)
        ),
        *(
            # The kernels take next to nothing: without CUDA graphs a step lasts as long as the
            # processor needs to launch them.
            Case(name, "host", build, (8, 3, 8, 8), train, quick=False, deep=name == "R-164")
            for name, build in (("R-164", r164), ("PreActResNet-18", r18))
            if fast
        ),
    ]


def _unit(unit: type[nn.Module], *sizes: int) -> Callable[[], nn.Module]:
    return lambda: unit(*sizes)


def _model(arch: str, stem: str = "cifar", num_classes: int = 10) -> Callable[[], nn.Module]:
    return lambda: create_model(arch, num_classes, stem)


def _others() -> dict[str, Callable[[], nn.Module]]:
    """Networks of installed libraries, converted; PyTorch's layers run them as they were."""
    networks = {
        "DenseNet-121": ("torchvision", "torchvision.models", "densenet121"),
        "ResNetV2-50": ("timm", "timm.models.resnetv2", "resnetv2_50"),
    }

    def build(module: str, name: str) -> nn.Module:
        model = getattr(import_module(module), name)()
        fused_preact.convert(model)
        return model

    return {
        name: partial(build, module, function)
        for name, (library, module, function) in networks.items()
        if find_spec(library) is not None
    }


def _cifar(depth: int) -> Callable[[], nn.Module]:
    return lambda: preact_resnet_cifar(depth, block=fused_preact.PreActBottleneck)
