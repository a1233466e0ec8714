"""The layers of a unit, by their names in a module, and what they are as functional.Unit."""

from typing import Any, NamedTuple

from torch import nn

from .. import blocks
from ..functional import Unit

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}


class Layers(NamedTuple):
    """One name in each of the first three for each convolution; without any, a BatchNorm's."""

    bns: tuple[str | None, ...]  # only the first may be None
    activations: tuple[str | None, ...]  # None where it is a function
    convs: tuple[str, ...]
    shortcut: str | None  # as functional.Unit has it
    projection: str | None
    activation: str

    def find(self, module: nn.Module) -> "Found | None":
        """Them, if they are PyTorch's own and calling them does no more."""
        for name in self.activations:
            if name is not None and not self._is_activation(child(module, name)):
                return None
        bns, convs = [], []
        for name in self.bns:
            bn = None if name is None else child(module, name)
            if name is not None and not is_batch_norm(bn):
                return None
            bns.append(bn)
        for name in self.convs if self.projection is None else (*self.convs, self.projection):
            conv = child(module, name)
            if conv is None or not blocks.is_plain_conv(conv):
                return None
            convs.append(conv)
        return Found(self, bns, convs)

    def _is_activation(self, layer: nn.Module | None) -> bool:
        return layer is not None and activation_of(layer) == self.activation

    def __str__(self) -> str:
        words: list[str] = []
        for bn, conv in zip(self.bns, self.convs or ("",), strict=True):
            words += [bn, self.activation] if bn else []
            words += [conv] if conv else []
        if self.shortcut is not None:
            words += ["+", *([self.projection, "of"] if self.projection else [])]
            words += ["the input" if self.shortcut == "input" else "the first activation"]
        return " ".join(words)


class Found(NamedTuple):
    """The layers themselves."""

    layers: Layers
    bns: list[Any]
    convs: list[Any]  # and the projection, if there is one

    def read(self) -> Unit:
        """Their tensors and settings."""
        bns = [None if bn is None else blocks.read_batch_norm(bn) for bn in self.bns]
        convs = [blocks.read_conv(conv) for conv in self.convs]
        projection = None if self.layers.projection is None else convs.pop()
        return Unit(bns, convs, self.layers.shortcut, projection)


def child(module: nn.Module, path: str) -> Any:
    """The module of this name below it, itself if that is "", None if there is none."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found


def activation_of(layer: nn.Module) -> str | None:
    """Its name, of one of PyTorch's own layers that nobody hooked or patched."""
    kind = type(layer)
    return ACTIVATIONS[kind] if kind in ACTIVATIONS and blocks.is_unchanged(layer, kind) else None


def is_batch_norm(layer: Any) -> bool:
    """Whether it is a plain nn.BatchNorm2d, or timm's, which holds its activation as `act`."""
    kind = type(layer)
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return blocks.is_unchanged(layer, kind) and blocks.is_unchanged(layer.drop, nn.Identity)
    return blocks.is_unchanged(layer, nn.BatchNorm2d)
