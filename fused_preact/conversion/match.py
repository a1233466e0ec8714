"""Which layers of a graph make up units, as functional.Unit has them.

A unit is a row of convolutions behind BatchNorm and activation; the first may read its input raw.
What is added to its result is its shortcut where it is the unit's input or first activation, as
it is or through a convolution; else a residual. BatchNorm and activation alone are a unit without
convolutions.
"""

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import blocks
from .layers import Layers, activation_of, is_batch_norm

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    "relu": "relu",  # a Tensor's methods
    "relu_": "relu",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Match(NamedTuple):
    """A unit in a graph."""

    layers: Layers
    input: fx.Node
    residual: fx.Node | None
    nodes: list[fx.Node]  # that it replaces, its result last


class _Preact(NamedTuple):
    """activation(bn(source))"""

    bn: str
    activation_layer: str | None
    activation: str
    source: fx.Node
    nodes: list[fx.Node]

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]


class _Branch(NamedTuple):
    """A row of convolutions, and what precedes each; only of the first it may be None."""

    preacts: list[_Preact | None]
    convs: list[fx.Node]

    @property
    def input(self) -> fx.Node:
        first = self.preacts[0]
        return _operand(self.convs[0]) if first is None else first.source

    @property
    def is_shared(self) -> bool:
        """Whether others read what the first convolution reads, after its activation."""
        first = self.preacts[0]
        return first is not None and len(first.result.users) > 1

    def without_first_preact(self) -> "_Branch | None":
        rest = self.preacts[1:]
        return _Branch([None, *rest], self.convs) if rest else None


class Finder:
    """Of a graph of module.forward."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._graph = graph
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._called = [self._modules[n.target] for n in graph.nodes if n.op == "call_module"]

    def matches(self) -> list[Match]:
        """The units, the longest there are, in the graph's order; no two share a node."""
        found: list[Match] = []
        taken: set[fx.Node] = set()
        for find in (self._unit_ending_at, self._lone_preact_ending_at):
            for node in reversed(self._graph.nodes):
                match = find(node)
                if match and taken.isdisjoint(match.nodes) and not self._is_disturbed(match):
                    found.append(match)
                    taken.update(match.nodes)
        return sorted(found, key=lambda match: self._position[match.nodes[-1]])

    def layer(self, node: Any) -> nn.Module | None:
        """That the node calls with one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or not _has_operands(node, 1):
            return None
        return self._modules[node.target]

    # --- units -----------------------------------------------------------------------------------

    def _unit_ending_at(self, end: fx.Node) -> Match | None:
        if self._is_conv(end):
            branch = self._branch(end)
            if branch and branch.is_shared:
                branch = branch.without_first_preact()
            return _match(branch, None, None, None, []) if branch else None
        if end.target not in _ADDITIONS or not _has_operands(end, 2):
            return None
        a, b = end.all_input_nodes if len(end.all_input_nodes) == 2 else (end, end)
        found = [(self._branch(y, end), other) for y, other in ((a, b), (b, a))]
        candidates = [(branch, other) for branch, other in found if branch]
        for branch, other in sorted(candidates, key=lambda pair: -len(pair[0].convs)):
            overwritten = end.target in (operator.iadd, "add_") and other is a
            if not overwritten or self._is_conv(other):
                match = self._with_addition(branch, other, end)
                if match:
                    return match
        return None

    def _branch(self, end: fx.Node, user: fx.Node | None = None) -> _Branch | None:
        """The longest that ends with this convolution; whose result goes to user alone, if any."""
        if not self._is_conv(end) or (user is not None and list(end.users) != [user]):
            return None
        preacts: list[_Preact | None] = []
        convs = [end]
        while True:
            preact = self._preact(_operand(convs[0]))
            if preact and preact.activation not in (p.activation for p in preacts if p):
                preact = preact if not preacts else None
            preacts.insert(0, preact)
            if preact is None or len(preact.result.users) > 1:
                break
            if not self._is_conv(preact.source) or len(preact.source.users) > 1:
                break
            convs.insert(0, preact.source)
        return _Branch(preacts, convs) if any(preacts) else None

    def _with_addition(self, branch: _Branch, other: fx.Node, end: fx.Node) -> Match | None:
        projection, source = None, other
        if self._is_conv(other) and list(other.users) == [end]:
            projection, source = other, _operand(other)
        own = [end] if projection is None else [projection, end]
        name = None if projection is None else str(projection.target)
        first = branch.preacts[0]
        if first and branch.is_shared and source is first.result:
            if set(first.result.users) == {branch.convs[0], own[0]}:
                return _match(branch, "preact", name, None, own)
        elif not branch.is_shared and source is branch.input:
            return _match(branch, "input", name, None, own)
        plain = branch.without_first_preact() if branch.is_shared else branch
        return _match(plain, None, None, other, [end]) if plain else None

    def _lone_preact_ending_at(self, end: fx.Node) -> Match | None:
        preact = self._preact(end)
        if preact is None:
            return None
        layers = Layers((preact.bn,), (preact.activation_layer,), (), None, None, preact.activation)
        return Match(layers, preact.source, None, preact.nodes)

    # --- layers ----------------------------------------------------------------------------------

    def _is_conv(self, node: Any) -> bool:
        layer = self.layer(node)
        return layer is not None and blocks.is_plain_conv(layer)

    def _preact(self, h: fx.Node) -> _Preact | None:
        layer = self.layer(h)
        if isinstance(layer, nn.BatchNorm2d):
            return self._preact_in_one(h, layer)
        if layer is not None:
            activation, name = activation_of(layer), str(h.target)
        else:
            activation, name = _FUNCTIONS.get(h.target), None
            if not _has_operands(h, 1, "inplace"):
                return None
        if activation is None:
            return None
        bn = _operand(h)
        bn_layer = self.layer(bn)
        if type(bn_layer) is not nn.BatchNorm2d or not self._is_bn(bn_layer) or len(bn.users) > 1:
            return None
        return _Preact(str(bn.target), name, activation, _operand(bn), [bn, h])

    def _preact_in_one(self, h: fx.Node, layer: Any) -> _Preact | None:
        """Of timm's BatchNorm, which holds its activation."""
        if type(layer) is nn.BatchNorm2d or not self._is_bn(layer):
            return None
        activation = activation_of(layer.act)
        if activation is None:
            return None
        return _Preact(str(h.target), f"{h.target}.act", activation, _operand(h), [h])

    def _is_bn(self, layer: nn.Module) -> bool:
        """Whether it is a BatchNorm that is called once."""
        return is_batch_norm(layer) and sum(called is layer for called in self._called) == 1

    # --- order -----------------------------------------------------------------------------------

    def _is_disturbed(self, match: Match) -> bool:
        """Whether something writes in place between a unit's layers, which now run at the end."""
        positions = [self._position[node] for node in match.nodes]
        between = list(self._graph.nodes)[min(positions) : max(positions)]
        return any(self._writes(node) for node in between if node not in match.nodes)

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._modules[node.target], "inplace", False))
        if node.kwargs.get("inplace"):
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        is_operator = getattr(node.target, "__module__", "") == "_operator"
        return (is_operator and name.startswith("i") and hasattr(operator, name[1:])) or (
            node.op != "get_attr" and name.endswith("_") and not name.endswith("__")
        )


def _match(
    branch: _Branch,
    shortcut: str | None,
    projection: str | None,
    residual: fx.Node | None,
    behind: list[fx.Node],
) -> Match:
    preacts = branch.preacts
    layers = Layers(
        tuple(preact and preact.bn for preact in preacts),
        tuple(preact and preact.activation_layer for preact in preacts),
        tuple(str(conv.target) for conv in branch.convs),
        shortcut,
        projection,
        next(preact.activation for preact in preacts if preact),
    )
    nodes = [node for preact in preacts if preact for node in preact.nodes]
    return Match(layers, branch.input, residual, [*nodes, *branch.convs, *behind])


def _operand(node: fx.Node) -> fx.Node:
    """The only one."""
    (operand,) = node.all_input_nodes
    return operand


def _has_operands(node: fx.Node, count: int, *ignored: str) -> bool:
    """Whether it takes so many results of other nodes, and no setting but those ignored."""
    nodes = all(isinstance(arg, fx.Node) for arg in node.args)
    return nodes and len(node.args) == count and set(node.kwargs) <= set(ignored)
