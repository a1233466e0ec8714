"""What a module's forward computes, as an fx graph of its layers, or why there is none."""

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Untraceable(Exception):
    """Says why."""


def trace(
    module: nn.Module, opaque: set[nn.Module], *, training: bool
) -> tuple[fx.Graph, list[str]]:
    """The graph of module.forward in training or evaluation, and the modules inlined in it.

    Its nodes call layers and the modules in `opaque`; other modules are part of the graph.
    Arguments with a default have it. Raises Untraceable where forward does more than hand tensors
    from layer to layer: looks at their values, draws random numbers by itself, writes attributes,
    or switches gradients on or off.
    """
    if "forward" in module.__dict__:
        raise Untraceable("it was given another forward")
    with _as_it_was(module, training):
        try:
            drawn = _generators()
            tracer = _Tracer(opaque)
            graph = tracer.trace(module)
            if _generators() != drawn:
                raise Untraceable("it draws random numbers by itself")
            return graph, tracer.inlined
        except Untraceable:
            raise
        except Exception as error:
            first_line = str(error).split("\n", maxsplit=1)[0]
            raise Untraceable(f"{type(error).__name__}: {first_line}") from error


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque
        self._modes = _modes()
        self.inlined: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, _BatchNorm) or not m._modules
        if m in self._opaque or layer or super().is_leaf_module(m, module_qualified_name):
            return True
        self.inlined.append(module_qualified_name)
        return False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args: list[Any] = [self.root]
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            positional = parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD
            if parameter.default is not parameter.empty:
                continue  # so are all behind it, and it is not passed
            if parameter.kind not in positional:
                raise Untraceable(f"it takes {parameter}")
            args.append(self.create_proxy("placeholder", parameter.name, (), {}))
        return root_fn, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            known = (*self.root.parameters(), *self.root.buffers())
            if not any(a is tensor for tensor in known):
                raise Untraceable("it makes a tensor of its own")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Untraceable("it switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)


class _Proxy(fx.Proxy):
    """One whose `x += y` writes to x: fx.Proxy makes it x = x + y."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor".split():  # noqa: SIM905
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), *autocast


def _generators() -> list[Any]:
    """The states of all from which random numbers are drawn."""
    _, numbers, position, *_ = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *devices)]
    return [random.getstate(), list(numbers), position, *states]


@contextmanager
def _as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    """Tracing leaves no trace: Untraceable if forward has written to a module's attributes."""
    modules = list(module.modules())
    before = [{name: _copied(value) for name, value in vars(m).items()} for m in modules]
    for m in modules:
        m.training = training
    try:
        yield
    finally:
        written = False
        for m, old in zip(modules, before, strict=True):
            now = vars(m)
            names = now.keys() | old.keys()
            written |= any(not _same(old.get(name), now.get(name)) for name in names - {"training"})
            for name in now.keys() - old.keys():
                del now[name]
            for name, (value, held) in old.items():
                now[name] = value
                _restore(value, held)
    if written:
        raise Untraceable("it writes to attributes")


def _copied(value: Any) -> tuple[Any, Any]:
    """The value, and what it holds if it may be written to."""
    return value, value.copy() if type(value) in (list, dict, set) else None


def _same(old: tuple[Any, Any] | None, now: Any) -> bool:
    return old is not None and old[0] is now and _holds_the_same(old[1], now)


def _holds_the_same(held: Any, now: Any) -> bool:
    if held is None:
        return True
    values = (held.values(), now.values()) if isinstance(held, dict) else (held, now)
    return len(held) == len(now) and all(map(operator.is_, *values))


def _restore(value: Any, held: Any) -> None:
    if _holds_the_same(held, value):
        return
    value.clear()
    value.extend(held) if isinstance(value, list) else value.update(held)
