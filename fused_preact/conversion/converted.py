"""Modules whose forward is a program: their class becomes one derived from the class they had."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import blocks
from ..functional import Unit
from .layers import Found, Layers
from .program import Program


class Row:
    """The forward of an nn.Sequential of units, for which several of them share a call."""

    is_unit = False
    units: ClassVar[list[Layers]] = []

    def takes(self, args: Sequence[Any]) -> bool:
        return len(args) == 1

    def find(self, module: Any) -> list[Found] | None:
        """Nothing yet: they are found and read one by one."""
        return []

    def read(self, module: Any) -> list[Unit] | None:
        return []

    def run(self, module: Any, units: list[Unit], input: Tensor) -> Tensor:
        return blocks.call_in_turn(module, input, read_unit)


def read_unit(module: nn.Module) -> tuple[Unit, str] | None:
    """A unit and its activation, if calling module is nothing but running it."""
    if not isinstance(module, Converted):
        return blocks.read_unit(module)
    kind = _converted(module._unconverted)
    program = _programs(module).get(module.training)
    if program is None or not program.is_unit:
        return None
    units = program.read(module) if blocks.is_unchanged(module, kind) else None
    return None if units is None else (units[0], program.units[0].activation)


def has_units(module: nn.Module) -> bool:
    """Whether there are at least two in its children."""
    return sum(_is_unit(child) for child in module.children()) > 1


def _is_unit(module: nn.Module) -> bool:
    if not isinstance(module, Converted):
        return isinstance(module, blocks.PreActUnit)
    return any(program.is_unit for program in _programs(module).values())


class Converted:
    """The first base of a converted module's class; the second is the class that it was of."""

    _unconverted: ClassVar[type[nn.Module]]  # that class

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (self._unconverted,), self.__getstate__()


def install(module: nn.Module, training: Program | Row, evaluation: Program | Row) -> None:
    """From now on module runs these."""
    module.__dict__["_fused_preact"] = {True: training, False: evaluation}
    module.__class__ = _converted(type(module))


def is_current(module: Any) -> bool:
    """Whether it has programs, and all that they take for granted holds."""
    programs = _programs(module).values()
    return bool(programs) and all(program.find(module) is not None for program in programs)


def fused_units(module: Any) -> list[Layers]:
    """In training, or if there are none, in evaluation."""
    return next((program.units for program in _programs(module).values() if program.units), [])


def _programs(module: Any) -> dict[bool, Program | Row]:
    """By its mode; none where others made it of a converted class, as a Sequential its slices."""
    return vars(module).get("_fused_preact", {})


def uninstall(module: nn.Module) -> None:
    """Undoes install(). Raises RuntimeError where another has changed its class since."""
    kind = type(module)
    if not issubclass(kind, Converted):
        return
    if kind is not _CLASSES[kind._unconverted]:
        raise RuntimeError(f"unconvert: after its conversion a module became a {kind.__name__}")
    module.__dict__.pop("_fused_preact", None)
    module.__class__ = kind._unconverted


_CLASSES: dict[type[nn.Module], Any] = {}


def _converted(kind: type[nn.Module]) -> Any:
    """The class of converted modules of this kind."""
    if kind not in _CLASSES:
        members = {
            "_unconverted": kind,
            "forward": _forward(kind),
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        }
        _CLASSES[kind] = type(f"Fused{kind.__name__}", (Converted, kind), members)
    return _CLASSES[kind]


def _forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """By the program of a module's mode; as before where its layers are not what they were."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        program = _programs(self).get(self.training)
        if program is not None and not kwargs and program.takes(args):
            units = program.read(self)
            if units is not None:
                return program.run(self, units, *args)
        return kind.forward(self, *args, **kwargs)

    return forward


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A converted module without its state, for copies and pickles."""
    converted = _converted(kind)
    return converted.__new__(converted)
