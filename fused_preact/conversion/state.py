"""What a program takes for granted of the modules that it was made from."""

from argparse import Namespace
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import blocks
from .layers import child


class Inlined(NamedTuple):
    """A module whose own forward is a part of the program."""

    name: str  # below the converted module, which is ""
    kind: type[nn.Module]
    forward: Any  # kind's

    @classmethod
    def of(cls, name: str, kind: type[nn.Module]) -> "Inlined":
        return cls(name, kind, kind.forward)

    def holds(self, module: nn.Module) -> bool:
        """Whether calling it still does what kind's forward does, in the mode of module."""
        own = child(module, self.name)
        if own is not module and not (
            blocks.is_unchanged(own, self.kind) and own.training == module.training
        ):
            return False
        return self.kind.forward is self.forward

    def __reduce__(self) -> Any:  # not every function can be pickled
        return Inlined.of, (self.name, self.kind)


class Reads(NamedTuple):
    """What a forward has read of a module, apart from its tensors."""

    name: str
    kind: type[nn.Module]
    children: list[str]
    own: dict[str, Any]  # attributes of the module itself
    inherited: dict[str, Any]  # those of its class; _Absent where it has none

    @classmethod
    def of(cls, module: nn.Module, name: str, attributes: Iterable[str]) -> "Reads":
        read = child(module, name)
        held = vars(read)
        own = {attribute: _copied(held[attribute]) for attribute in attributes if attribute in held}
        others = [a for a in attributes if a not in own and a not in read._modules]
        kind = _kind(read)
        return cls(name, kind, _children(read), own, _inherited(kind, others))

    def holds(self, module: nn.Module) -> bool:
        """Whether they would be read again."""
        read = child(module, self.name)
        if _kind(read) is not self.kind or _children(read) != self.children:
            return False
        now = vars(read)
        for attribute, value in self.own.items():
            if not _is_same(value, now.get(attribute, _Absent)):
                return False
        for attribute, value in self.inherited.items():
            if attribute in now or not _is_same(value, getattr(self.kind, attribute, _Absent)):
                return False
        return True

    def __reduce__(self) -> Any:
        """Methods and properties are read again: not all can be pickled."""
        plain = {
            attribute: value
            for attribute, value in self.inherited.items()
            if not callable(value) and not hasattr(value, "__get__")
        }
        return _unpickled, (*self[:-1], plain, [*(self.inherited.keys() - plain.keys())])


class _Absent:
    """In place of an attribute that is not there."""


def _unpickled(
    name: str,
    kind: type[nn.Module],
    children: list[str],
    own: dict[str, Any],
    plain: dict[str, Any],
    others: Iterable[str],
) -> Reads:
    return Reads(name, kind, children, own, plain | _inherited(kind, others))


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class, before its conversion if it was converted."""
    kind = type(module)
    return getattr(kind, "_unconverted", kind)


def _children(module: nn.Module) -> list[str]:
    return [name for name, child in module._modules.items() if child is not None]


def _inherited(kind: type[nn.Module], attributes: Iterable[str]) -> dict[str, Any]:
    return {attribute: _copied(getattr(kind, attribute, _Absent)) for attribute in attributes}


def _copied(value: Any) -> Any:
    """A container as it is now; others as they are."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    for sequence in (list, tuple, set):
        if isinstance(value, sequence):
            return sequence(map(_copied, value))
    for namespace in (Namespace, SimpleNamespace):
        if isinstance(value, namespace):
            return namespace(**_copied(vars(value)))
    return value


def _is_same(then: Any, now: Any) -> bool:
    """By value, where == says yes or no; else only if it is the very same."""
    if then is now:
        return True
    try:
        return not isinstance(now, Tensor) and bool(then == now)
    except Exception:  # whatever a class of the user's raises
        return False
