"""Finds the units in a model's modules, and has them run on the fused functions."""

from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import PreActStage, PreActUnit
from ..resnet import PreActResNet
from .converted import (
    Converted,
    Row,
    fused_units,
    has_units,
    install,
    is_current,
    uninstall,
)
from .layers import Layers, is_batch_norm
from .program import Program
from .trace import Untraceable, trace


@dataclass
class Conversion:
    """What convert() did; as a str, a line for each.

    fused   by a module's name, the units that were found in its forward.
    left    by a BatchNorm's name, why it runs as before.
    """

    fused: dict[str, list[str]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{name or 'model'}: {unit}" for name, units in self.fused.items() for unit in units
        ]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Has a model's layers run on the fused functions where they make up pre-activated units.

    model    any module. It is changed in place: the modules in whose forward units were found run
             them fused from now on. Parameters, names, hooks, copies and pickles stay as they are.
    Returns  what was fused and what was left, and why.

    Found are BatchNorm2d, ReLU or SiLU, and Conv2d without bias, one after the other; with other
    such convolutions before or behind it, and with what is added to the result, it is one unit.
    forward is read once in training and once in evaluation, without running it (torch.fx); so what
    it does must not depend on its tensors' values. A module runs as before while its layers, its
    methods, the attributes that forward reads (numbers, functions, lists, dicts, Namespaces and the
    like) or its arguments are not what they were then, and while a layer is hooked or patched;
    convert() once more reads it as it is now. Not watched are globals, what functions have in their
    closures, and what an attribute of any other class holds.

    The results are in channels_last, as they are in a PyTorch model with such weights, and as close
    to PyTorch's as those of preact_conv2d. Where forward has `x.view(len(x), -1)`, write
    `x.flatten(1)`, or reshape: a view of several dimensions as one may not exist in that format.
    """
    converter = _Converter()
    converter.visit(model, "")
    return Conversion(converter.fused, converter.left(model))


def unconvert(model: nn.Module) -> None:
    """Undoes convert(), in place."""
    for module in model.modules():
        uninstall(module)


class _Converter:
    """Goes through a model from its leaves up."""

    def __init__(self) -> None:
        self.fused: dict[str, list[str]] = {}
        self.fused_bns: set[str] = set()  # among them those of modules that were fused before
        self.unread: dict[str, str] = {}  # modules by name, and why
        # Converted, or with something converted inside, or unread: to those above they are layers.
        self._opaque: set[nn.Module] = set()
        self._seen: set[nn.Module] = set()

    def visit(self, module: nn.Module, name: str) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        if isinstance(module, PreActUnit | PreActStage | PreActResNet):
            self._opaque.add(module)
            self.fused_bns |= {_join(name, bn) for bn, _ in module.named_modules() if bn}
            return
        if isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
            self._leave(module, name, "it is a graph already, of torch.fx or torch.jit")
            return
        if not module._modules or isinstance(module, _BatchNorm):
            return
        for child_name, child in module.named_children():
            self.visit(child, _join(name, child_name))
        if any(child in self._opaque for child in module.children()):
            self._opaque.add(module)
        if isinstance(module, Converted) and is_current(module):
            self._opaque.add(module)
            self._note_bns(name, fused_units(module))
            return
        uninstall(module)
        if type(module).forward is not nn.Module.forward:  # of a ModuleList there is none
            self._convert(module, name)

    def _convert(self, module: nn.Module, name: str) -> None:
        try:
            training, evaluation = (self._program(module, mode) for mode in (True, False))
        except Untraceable as why:
            self._leave(module, name, str(why))
            return
        units = training.units or evaluation.units
        if units:
            install(module, training, evaluation)
            self.fused[name] = [str(unit) for unit in units]
            self._note_bns(name, units)
        elif type(module) is nn.Sequential and has_units(module):
            install(module, Row(), Row())
        if isinstance(module, Converted):
            self._opaque.add(module)

    def _program(self, module: nn.Module, training: bool) -> Program:
        return Program(trace(module, self._opaque, training=training), module)

    def _note_bns(self, name: str, units: list[Layers]) -> None:
        self.fused_bns |= {_join(name, bn) for unit in units for bn in unit.bns if bn}

    def _leave(self, module: nn.Module, name: str, why: str) -> None:
        self.unread[name] = why
        self._opaque.add(module)

    def left(self, model: nn.Module) -> dict[str, str]:
        """BatchNorms that run as before, and why."""
        return {
            name: self._why_left(name, module)
            for name, module in model.named_modules()
            if _is_any_batch_norm(module) and name not in self.fused_bns
        }

    def _why_left(self, name: str, bn: nn.Module) -> str:
        if not is_batch_norm(bn):
            return f"it is no plain BatchNorm2d, but a {type(bn).__name__}"
        parent = name
        while parent and parent not in self.fused:
            parent = parent.rpartition(".")[0]
            if parent in self.unread:
                why = self.unread[parent]
                return f"the forward of {parent or 'the model'} cannot be read: {why}"
        return "its result does not go to a ReLU or SiLU alone"


def _is_any_batch_norm(module: nn.Module) -> bool:
    """Whether it is one, compiled or not."""
    compiled_from = module.original_name if isinstance(module, torch.jit.ScriptModule) else ""
    return isinstance(module, _BatchNorm) or str(compiled_from).startswith("BatchNorm")


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
