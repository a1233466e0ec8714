"""What is measured: operators, units, whole training steps and attack steps, with their shapes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused_preact
from fused_preact.resnet import create_model

Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """A module, its input and what of a step is run.

    passes  "forward" (evaluation), "forward+backward" (training), "attack" (the gradient of the
            input alone: frozen weights, evaluation mode).
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    passes: str
    quick: bool  # whether a run without --full has it


def contender(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
    compiled: bool = False,
) -> Step:
    """A step of case under one backend: each call runs it and returns what can be compared.

    The same seed gives every contender the same weights and images. bfloat16 runs under autocast,
    float64 is the truth that the others are checked against.
    """
    torch.manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)
    model = case.build().to(device, exact).to(memory_format=memory_format)
    model.train(case.passes == "forward+backward").requires_grad_(case.passes != "attack")
    images = torch.randn(case.shape).to(device, exact).contiguous(memory_format=memory_format)
    images.requires_grad_(case.passes == "attack" or case.group == "unit")
    run = torch.compile(model) if compiled else model

    def forward() -> Tensor:
        with (
            fused_preact.backend(backend),
            torch.autocast(device.type, dtype, enabled=dtype != exact),
        ):
            return run(images)

    def step() -> list[Tensor]:
        if case.passes == "forward":
            with torch.no_grad():
                return [forward()]
        output = forward()
        loss = output.to(exact).square().mean()
        if case.passes == "attack":
            return [output.detach(), torch.autograd.grad(loss, images)[0]]
        model.zero_grad(set_to_none=True)
        images.grad = None
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [output.detach(), torch.cat(gradients)]

    return step


def _bottleneck(in_planes: int, planes: int, stride: int = 1) -> Callable[[], nn.Module]:
    return lambda: fused_preact.PreActBottleneck(in_planes, planes, stride)


def _basic(in_planes: int, planes: int, stride: int = 1) -> Callable[[], nn.Module]:
    return lambda: fused_preact.PreActBlock(in_planes, planes, stride)


def _model(arch: str, stem: str = "cifar", num_classes: int = 10) -> Callable[[], nn.Module]:
    return lambda: create_model(arch, num_classes, stem)


def _units() -> list[Case]:
    cases = []
    for size, planes in ((32, 16), (16, 32), (8, 64)):
        shape = (64, 4 * planes, size, size)
        cases.append(
            ("bottleneck", f"{planes}x{size}", _bottleneck(4 * planes, planes), shape, True)
        )
    for size, planes, in_planes in ((32, 32, 64), (16, 64, 128)):
        shape = (64, in_planes, size, size)
        build = _bottleneck(in_planes, planes, 2)
        cases.append(("projection", f"{planes}x{size}", build, shape, False))
    for size, planes in ((56, 64), (28, 128), (14, 256), (7, 512)):
        shape = (8, 4 * planes, size, size)
        cases.append(
            ("bottleneck", f"{planes}x{size}", _bottleneck(4 * planes, planes), shape, False)
        )
    for size, planes in ((32, 64), (16, 128), (8, 256), (4, 512)):
        shape = (16, planes, size, size)
        cases.append(("basic", f"{planes}x{size}", _basic(planes, planes), shape, planes < 256))
    for size, planes in ((32, 160), (16, 320), (8, 640)):
        shape = (16, planes, size, size)
        cases.append(("basic", f"{planes}x{size}", _basic(planes, planes), shape, False))
    return [
        Case(f"{kind}-{label}", "unit", build, shape, passes, quick and passes != "forward")
        for kind, label, build, shape, quick in cases
        for passes in ("forward", "forward+backward")
    ]


def _steps() -> list[Case]:
    train, attack = "forward+backward", "attack"
    image = (3, 32, 32)
    return [
        Case("R-164", "step", _model("preact_resnet164"), (64, *image), train, True),
        Case("R-1001", "step", _model("preact_resnet1001"), (8, *image), train, False),
        Case(
            "R-200",
            "step",
            _model("preact_resnet200", "imagenet", 1000),
            (4, 3, 224, 224),
            train,
            False,
        ),
        Case("PreActResNet-18", "step", _model("preact_resnet18"), (16, *image), train, True),
        Case("WRN-28-10", "step", _model("wide_resnet28_10"), (16, *image), train, False),
        Case("R-164", "attack", _model("preact_resnet164"), (64, *image), attack, True),
        Case("PreActResNet-18", "attack", _model("preact_resnet18"), (16, *image), attack, False),
        Case("WRN-28-10", "attack", _model("wide_resnet28_10"), (16, *image), attack, False),
    ]


CASES = [*_units(), *_steps()]
