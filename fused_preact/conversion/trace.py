"""What a module's forward computes, as an fx graph of its layers, or why there is none."""

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Untraceable(Exception):
    """Says why."""


class Traced(NamedTuple):
    """What a module's forward does, and by which modules and attributes."""

    graph: fx.Graph
    inlined: list[str]  # modules whose own forward is a part of the graph
    reads: dict[str, set[str]]  # attributes by the module, without those of every nn.Module


def trace(module: nn.Module, opaque: set[nn.Module], *, training: bool) -> Traced:
    """The graph of module.forward in training or evaluation.

    Its nodes call layers and the modules in `opaque`; other modules are part of the graph.
    Arguments with a default have it. Raises Untraceable where forward does more than hand tensors
    from layer to layer: looks at their values, draws random numbers by itself, writes attributes,
    or switches gradients on or off.
    """
    if "forward" in module.__dict__:
        raise Untraceable("it was given another forward")
    with _as_it_was(module, training):
        try:
            tracer = _Tracer(opaque)
            with _undrawn():
                graph = tracer.trace(module)
            names = {m: name for name, m in module.named_modules()}
            reads = {names[m]: read for m, read in tracer.reads.items() if m in names}
            return Traced(graph, tracer.inlined, reads)
        except Untraceable:
            raise
        except Exception as error:
            first_line = str(error).split("\n", maxsplit=1)[0]
            raise Untraceable(f"{type(error).__name__}: {first_line}") from error


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # so that whoever looks at their values is found out

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque
        self._modes = _modes()
        self._known: list[torch.Tensor] = []
        self.inlined: list[str] = []
        self.reads: dict[nn.Module, set[str]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._opaque or isinstance(m, _BatchNorm) or not vars(m)["_modules"]:
            return True
        if super().is_leaf_module(m, module_qualified_name):
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
        self._known = [*self.root.parameters(), *self.root.buffers()]

        def forward(*args: Any) -> Any:
            with _recorded(self.reads):
                return root_fn(*args)

        return forward, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not any(a is tensor for tensor in self._known):
            raise Untraceable("it makes a tensor of its own")
        # a graph's code has numbers as repr() gives them
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

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


_OF_EVERY_MODULE = frozenset(dir(nn.Module()))


@contextmanager
def _recorded(reads: dict[nn.Module, set[str]]) -> Iterator[None]:
    """Notes which attributes of which modules are read; nothing, where only the children are.

    Another's own way to read them goes on, and stands there again afterwards.
    """
    others = vars(nn.Module).get("__getattribute__")
    get = others or object.__getattribute__

    def read(self: Any, name: str) -> Any:
        if name == "_modules":
            reads.setdefault(self, set())
        elif name not in _OF_EVERY_MODULE:
            reads.setdefault(self, set()).add(name)
        return get(self, name)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        if others:
            nn.Module.__getattribute__ = others  # type: ignore[method-assign]
        else:
            del nn.Module.__getattribute__


@contextmanager
def _undrawn() -> Iterator[None]:
    """Whoever draws random numbers gets the same afterwards; Untraceable if one was drawn here."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        drawn = _generators()
        try:
            yield
            if _generators() != drawn:
                raise Untraceable("it draws random numbers by itself")
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _generators() -> list[Any]:
    """The states of all from which random numbers are drawn."""
    _, numbers, position, *_ = np.random.get_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *devices)]
    return [random.getstate(), list(numbers), position, *states]


@contextmanager
def _as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    """Tracing leaves no trace: Untraceable if forward has written to a module's attributes."""
    modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
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
