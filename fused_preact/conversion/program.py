"""A module's forward with its units of layers as calls of the fused functions."""

import importlib
import operator
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional
from ..functional import Unit
from .concatenation import concatenate
from .layers import Found, child
from .match import Finder, Match
from .state import Inlined, Reads
from .trace import Traced

_CONCATENATIONS = (torch.cat, torch.concat)
_OF_LISTS = (*_CONCATENATIONS, torch.stack)  # functions whose first argument is one


class Program:
    """module.forward in training or in evaluation, compiled from a graph. Never changes."""

    def __init__(self, traced: Traced, module: nn.Module) -> None:
        graph = traced.graph
        identities = _remove_identities(graph, module)
        matches = Finder(graph, module).matches()
        self.units = [match.layers for match in matches]
        self.takes_lists = [_is_list(n) for n in graph.nodes if n.op == "placeholder"]
        self.is_unit = len(matches) == 1 and _is_all(matches[0], graph)
        inlined = dict.fromkeys(["", *traced.inlined, *identities])
        reads = {name: traced.reads.get(name, set()) for name in [*inlined, *traced.reads]}
        self.states: list[Inlined | Reads] = [
            *(Inlined.of(name, type(child(module, name))) for name in inlined),
            *(Reads.of(module, name, attributes) for name, attributes in reads.items()),
        ]
        _rewrite(graph, matches)
        code = graph.python_code("self")
        self._source, self._globals = code.src, code.globals
        self._compile()

    def takes(self, args: Sequence[Any]) -> bool:
        """Whether they are Tensors, or lists of Tensors, where the graph has them."""
        return len(args) == len(self.takes_lists) and all(
            _are_tensors(arg) if takes_list else isinstance(arg, Tensor)
            for arg, takes_list in zip(args, self.takes_lists, strict=True)
        )

    def find(self, module: nn.Module) -> list[Found] | None:
        """The units' layers, if everything is as it was when the graph was made."""
        if _has_any_global_hook():
            return None
        for state in self.states:
            if not state.holds(module):
                return None
        found = []
        for layers in self.units:
            unit = layers.find(module)
            if unit is None:
                return None
            found.append(unit)
        return found

    def read(self, module: nn.Module) -> list[Unit] | None:
        """Their tensors and settings, of all or none: a parametrization runs as they are read."""
        found = self.find(module)
        return None if found is None else [unit.read() for unit in found]

    def _compile(self) -> None:
        scope = dict(self._globals)
        exec(self._source, scope)
        self.run = scope["forward"]

    def __deepcopy__(self, memo: Any) -> "Program":
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "run"}
        is_module = {k: isinstance(v, types.ModuleType) for k, v in self._globals.items()}
        state["_globals"] = {k: v for k, v in self._globals.items() if not is_module[k]}
        state["_modules"] = {k: v.__name__ for k, v in self._globals.items() if is_module[k]}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {k: importlib.import_module(v) for k, v in state.pop("_modules").items()}
        self.__dict__.update(state)
        self._globals |= modules
        self._compile()


def run_unit(input: Tensor, unit: Unit, activation: str) -> Tensor:
    """What a unit in a program computes."""
    if not unit.convs:
        assert unit.bns[0] is not None
        return functional.bn_activation(input, unit.bns[0], activation)
    return functional.preact_units(input, [unit], activation=activation)


def run_unit_and_add(input: Tensor, unit: Unit, activation: str, residual: Tensor) -> Tensor:
    """Likewise, and a residual, which need not have the result's shape."""
    shape: Sequence[int] = input.shape
    for conv in unit.convs:
        shape = functional.output_shape(conv, shape)
    if residual.shape != shape:
        return run_unit(input, unit, activation) + residual
    bns, convs = unit.bns, unit.convs
    return functional.preact_unit(input, bns, convs, activation=activation, residual=residual)


def _are_tensors(arg: Any) -> bool:
    return isinstance(arg, (list, tuple)) and all(isinstance(item, Tensor) for item in arg)


# --- graphs --------------------------------------------------------------------------------------


def _remove_identities(graph: fx.Graph, module: nn.Module) -> list[str]:
    """Layers that hand on what they get, whose names are returned, and dropout in evaluation."""
    names = []
    for node in list(graph.nodes):
        layer = child(module, node.target) if node.op == "call_module" else None
        empty = type(layer) is nn.Sequential and not layer._modules
        if type(layer) is nn.Identity or empty:
            names.append(node.target)
        elif node.target is not F.dropout or node.kwargs.get("training") is not False:
            continue
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return names


def _is_list(placeholder: fx.Node) -> bool:
    """Whether it is handed to functions of lists of Tensors."""
    users = placeholder.users
    return any(user.target in _OF_LISTS and user.args[0] is placeholder for user in users)


def _is_all(match: Match, graph: fx.Graph) -> bool:
    """Whether the graph is a unit of its one argument, and nothing else."""
    plain = bool(match.layers.convs) and match.residual is None
    return plain and len(graph.nodes) == len(set(match.nodes)) + 2  # the argument, the result


def _rewrite(graph: fx.Graph, matches: Sequence[Match]) -> None:
    """Units become calls of the functions above; their tensors are a new first argument.

    Where an argument is concatenated, it may be a list that grows from module to module.
    """
    for node in graph.nodes:
        of_a_list = node.target in _CONCATENATIONS and isinstance(node.args[0], fx.Node)
        if of_a_list and set(node.kwargs) <= {"dim"}:
            node.target = concatenate
    with graph.inserting_before(next(iter(graph.nodes))):
        units = graph.placeholder("units")
    replaced: dict[fx.Node, fx.Node] = {}
    for i, match in enumerate(matches):
        end = match.nodes[-1]
        input = replaced.get(match.input, match.input)
        with graph.inserting_after(end):
            unit = graph.call_function(operator.getitem, (units, i))
        with graph.inserting_after(unit):
            args = (input, unit, match.layers.activation)
            if match.residual is None:
                call = graph.call_function(run_unit, args)
            else:
                residual = replaced.get(match.residual, match.residual)
                call = graph.call_function(run_unit_and_add, (*args, residual))
        end.replace_all_uses_with(call)
        replaced[end] = call
        for node in reversed(graph.nodes):
            if node in match.nodes:
                graph.erase_node(node)
