"""Modules whose forward is a program: their class becomes one derived from the class they had."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import blocks
from ..functional import Unit
from .program import Program


class Row:
    """The forward of an nn.Sequential of units, for which several of them share a call."""

    def takes(self, args: Sequence[Any]) -> bool:
        return len(args) == 1

    def read(self, module: Any) -> list[Unit] | None:
        """Nothing yet: they are read one by one."""
        return []

    def run(self, module: Any, units: list[Unit], input: Tensor) -> Tensor:
        return blocks.call_in_turn(module, input, read_unit)


def read_unit(module: nn.Module) -> tuple[Unit, str] | None:
    """A unit and its activation, if calling module is nothing but running it."""
    if not isinstance(module, Converted):
        return blocks.read_unit(module)
    kind = _converted(module._kind)
    program = module._fused_preact[module.training]
    if not isinstance(program, Program) or not program.is_unit:
        return None
    units = program.read(module) if blocks.is_unchanged(module, kind) else None
    return None if units is None else (units[0], program.units[0].activation)


def has_units(module: nn.Module) -> bool:
    """Whether there are at least two in its children."""
    return sum(read_unit(child) is not None for child in module.children()) > 1


class Converted:
    """The first base of a converted module's class; the second is the class that it was of."""

    _kind: ClassVar[type[nn.Module]]  # that class
    _fused_preact: dict[bool, Program | Row]  # by the module's mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """By the program of its mode; as before where its layers are not what they were."""
        program = self._fused_preact[self.training]  # type: ignore[attr-defined]
        units = None if kwargs or not program.takes(args) else program.read(self)
        if units is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return program.run(self, units, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self._kind,), self.__getstate__()


def install(module: nn.Module, training: Program | Row, evaluation: Program | Row) -> None:
    """From now on module runs these."""
    module.__dict__["_fused_preact"] = {True: training, False: evaluation}
    module.__class__ = _converted(type(module))


def uninstall(module: nn.Module) -> None:
    """Undoes install(). Raises RuntimeError where another has changed its class since."""
    kind = type(module)
    if not issubclass(kind, Converted):
        return
    if kind is not _CLASSES[kind._kind]:
        raise RuntimeError(f"unconvert: after its conversion a module became a {kind.__name__}")
    del module.__dict__["_fused_preact"]
    module.__class__ = kind._kind


_CLASSES: dict[type[nn.Module], Any] = {}


def _converted(kind: type[nn.Module]) -> Any:
    """The class of converted modules of this kind."""
    if kind not in _CLASSES:
        members = {"_kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _CLASSES[kind] = type(f"Fused{kind.__name__}", (Converted, kind), members)
    return _CLASSES[kind]


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A converted module without its state, for copies and pickles."""
    converted = _converted(kind)
    return converted.__new__(converted)
