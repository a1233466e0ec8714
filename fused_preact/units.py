"""Residual units one after the other, forward and backward, layer by layer.

In each unit u[i+1] = conv[i](act(bn[i](u[i]))), plus a shortcut; its output is the input of the
next. Chain runs on the operators of any backend; the native ones do the same in one call of
torch.ops.fused_preact, csrc/torch/units.h.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .composed import Composed

GEOMETRY = 9  # integers: stride, padding (top, bottom, left, right), dilation, groups


class Chain(NamedTuple):
    """preact_units_forward and preact_units_backward on a backend's operators for single layers.

    Lists that have an entry for each convolution go through the units in order. geometries have
    GEOMETRY integers for each, and those of a unit's projection after its convolutions.
    """

    operators: Any  # a namespace with the functions of reference.py

    def preact_units_forward(
        self,
        input: Tensor,
        residual: Tensor | None,
        weights: Sequence[Tensor],
        bn_weights: Sequence[Tensor | None],
        bn_biases: Sequence[Tensor | None],
        stats: Sequence[Tensor | None],
        eps: Sequence[float],
        projections: Sequence[Tensor | None],
        depths: Sequence[int],
        geometries: Sequence[int],
        shortcuts: Sequence[str],
        activation: str,
        with_stats: bool,
        for_backward: bool,
        allow_tf32: bool = False,
        composed: Sequence[bool] = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """The last unit's output, and what its backward pass and running statistics need.

        residual     (N, K, H', W') or None, added to the last unit's output if it has no shortcut.
        stats        for each convolution, the statistics that its BatchNorm takes. None: nothing,
                     there is no BatchNorm, for the first convolution; for the others those of what
                     the convolution before wrote.
        projections  for each unit the weight of a convolution in its shortcut, or None.
        depths       convolutions of each unit, without the projection.
        shortcuts    what each unit adds: "input", "preact" (the activated input), or "none".
        with_stats   whether to take the output's statistics.
        for_backward whether to return the second and third result, which are empty otherwise.
        composed     for each of geometries, whether PyTorch's convolution runs it, between the
                     operators' pointwise kernels (composed.py); none where it is empty.
        Returns      the output; the input of each convolution but the first; the affine of each
                     BatchNorm; for each convolution the statistics of its output, (2, 0) where
                     nobody asks.
        """
        u, affine = input, self._affine(stats[0], bn_weights[0], bn_biases[0], eps[0])
        inputs, affines, all_stats = [], [] if affine is None else [affine], []
        for j, unit in enumerate(_units(depths, projections)):
            unit_input, preact = u, affine if shortcuts[j] == "preact" else None
            for k in range(unit.first, unit.end):
                added = None
                if k + 1 == unit.end:
                    added = residual
                    if shortcuts[j] != "none":
                        added = self._shortcut(
                            unit_input,
                            preact,
                            projections[j],
                            unit,
                            geometries,
                            activation,
                            allow_tf32,
                            composed,
                        )
                is_output = k + 1 == len(weights)
                next_bn: tuple[Any, ...] = ()
                if not is_output and stats[k + 1] is None:
                    next_bn = bn_weights[k + 1], bn_biases[k + 1], eps[k + 1]
                u, output_stats, affine = self._conv(composed, unit.at(k)).preact_conv_forward(
                    u,
                    affine,
                    weights[k],
                    added,
                    *_geometry(geometries, unit.at(k)),
                    activation,
                    with_stats if is_output else bool(next_bn),
                    allow_tf32,
                    *next_bn,
                )
                all_stats.append(output_stats)
                if is_output:
                    break
                if not next_bn:
                    affine = self._affine(
                        stats[k + 1], bn_weights[k + 1], bn_biases[k + 1], eps[k + 1]
                    )
                if for_backward:
                    inputs.append(u)
                    affines.append(affine)
        return u, inputs, affines if for_backward else [], all_stats

    def preact_units_backward(
        self,
        grad: Tensor,
        inputs: Sequence[Tensor],
        affines: Sequence[Tensor],
        weights: Sequence[Tensor],
        batch_stats: Sequence[bool],
        projections: Sequence[Tensor | None],
        depths: Sequence[int],
        geometries: Sequence[int],
        shortcuts: Sequence[str],
        activation: str,
        needs_input: bool,
        needs_weights: Sequence[bool],
        needs_sums: Sequence[bool],
        needs_projections: Sequence[bool],
        allow_tf32: bool = False,
        composed: Sequence[bool] = (),
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """The gradients, from that of the last unit's output.

        inputs       of each convolution.
        affines      of each BatchNorm; one fewer where the first convolution has none.
        batch_stats  for each convolution, whether its BatchNorm took the batch's statistics.
        needs_*      what is wanted: the gradient of the first unit's input, of each weight, the
                     sums (dbeta, dgamma) of each BatchNorm, the gradient of each projection.
        Returns      these, each with no element where it is not wanted; with batch statistics the
                     sums may be there all the same.
        """
        by_conv = [None] * (len(weights) - len(affines)) + list(affines)
        dweights, sums = [grad.new_empty(0) for _ in weights], [grad.new_empty(0) for _ in weights]
        dprojections = [grad.new_empty(0) for _ in projections]
        # grad, output, output_affine, output_sums; and what joins a unit's output
        deferred: tuple[Tensor | None, ...] = (grad, None, None, None)
        joins: Tensor | None = None
        for j, unit in reversed(list(enumerate(_units(depths, projections)))):
            first, last, projection = unit.first, unit.end - 1, projections[j]
            input, affine = inputs[first], by_conv[first]
            needs_before = (
                needs_input
                or any(needs_weights[:first])
                or any(needs_sums[:first])
                or any(needs_projections[:j])
            )
            # the shortcut's gradient joins at h, before the activation's slope, or at the input
            joins_h = shortcuts[j] == "preact" or affine is None
            on_the_way = last > first and needs_before and needs_weights[last] and batch_stats[last]
            if not on_the_way:
                deferred, joins = self._end_backward_pass(joins, deferred), None
            dy, to_shortcut = deferred[0], None
            for k in reversed(range(first, unit.end)):
                conv, geometry = self._conv(composed, unit.at(k)), _geometry(geometries, unit.at(k))
                if not (
                    needs_before or any(needs_weights[first:k]) or any(needs_sums[first : k + 1])
                ):
                    if needs_weights[k]:
                        dweights[k] = conv.preact_conv_wgrad(
                            *deferred,
                            inputs[k],
                            by_conv[k],
                            weights[k].shape[2:],
                            *geometry,
                            activation,
                            allow_tf32,
                        )
                    break
                if k == first and shortcuts[j] != "none" and (needs_before or joins_h):
                    to_shortcut = self._shortcut_grad(
                        dy, input, projection, unit, geometries, allow_tf32, composed
                    )
                frozen = by_conv[k] is not None and not batch_stats[k]
                if k == last and deferred[1] is not None:
                    dy, g, sums[k], dweights[k] = conv.residual_conv_backward(
                        joins,
                        *deferred,
                        weights[k],
                        inputs[k],
                        by_conv[k],
                        *geometry,
                        activation,
                        allow_tf32,
                    )
                else:
                    both = needs_weights[k]
                    gradients = conv.preact_conv_backward if both else conv.preact_conv_dgrad
                    g, sums[k], *dweight = gradients(
                        *deferred,
                        weights[k],
                        inputs[k],
                        by_conv[k],
                        to_shortcut if joins_h else None,
                        *geometry,
                        activation,
                        batch_stats[k] or needs_sums[k],
                        allow_tf32,
                        frozen,
                        to_shortcut if frozen and not joins_h else None,
                    )
                    if both:
                        dweights[k] = dweight[0]
                # with frozen statistics, or without any, g is the gradient of inputs[k] itself
                deferred = g, None, None, None
                if batch_stats[k]:
                    deferred = g, inputs[k], by_conv[k], sums[k]
            if needs_projections[j] and projection is not None:
                dprojections[j] = self._conv(composed, unit.at_projection).preact_conv_wgrad(
                    dy,
                    None,
                    None,
                    None,
                    input,
                    affine if shortcuts[j] == "preact" else None,
                    projection.shape[2:],
                    *_geometry(geometries, unit.at_projection),
                    activation,
                    allow_tf32,
                )
            if not needs_before:
                return grad.new_empty(0), dweights, sums, dprojections
            joins = None if joins_h or deferred[1] is None else to_shortcut
        return self._end_backward_pass(joins, deferred)[0], dweights, sums, dprojections

    def _end_backward_pass(self, joins, deferred):
        """deferred as the gradient that it stands for, with joins in it."""
        if deferred[1] is None:
            return deferred
        return self.operators.residual_grad(joins, *deferred), None, None, None

    def _conv(self, composed: Sequence[bool], at: int) -> Any:
        return Composed(self.operators) if composed and composed[at] else self.operators

    def _affine(self, stats, weight, bias, eps):
        return None if stats is None else self.operators.bn_affine(stats, weight, bias, eps)

    def _shortcut(
        self, input, affine, projection, unit, geometries, activation, allow_tf32, composed
    ):
        if projection is None:
            if affine is None:
                return input
            return self.operators.bn_relu_forward(input, affine, activation)
        geometry = _geometry(geometries, unit.at_projection)
        return self._conv(composed, unit.at_projection).preact_conv_forward(
            input, affine, projection, None, *geometry, activation, False, allow_tf32
        )[0]

    def _shortcut_grad(self, grad, input, projection, unit, geometries, allow_tf32, composed):
        """Of what the shortcut reads."""
        if projection is None:
            return grad
        geometry = _geometry(geometries, unit.at_projection)
        return self._conv(composed, unit.at_projection).preact_conv_dgrad(
            grad,
            None,
            None,
            None,
            projection,
            input,
            None,
            None,
            *geometry,
            "relu",
            False,
            allow_tf32,
        )[0]


class _Place(NamedTuple):
    """Where a unit's layers are in the lists."""

    first: int  # of its convolutions
    end: int  # past the last
    shift: int  # by the projections of the units before

    def at(self, k: int) -> int:
        """Convolution k's place among geometries."""
        return k + self.shift

    @property
    def at_projection(self) -> int:
        return self.end + self.shift


def _units(depths: Sequence[int], projections: Sequence[Tensor | None]) -> Iterator[_Place]:
    first = shift = 0
    for depth, projection in zip(depths, projections, strict=True):
        yield _Place(first, first + depth, shift)
        first += depth
        shift += projection is not None


def _geometry(geometries: Sequence[int], at: int) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups."""
    g = geometries[GEOMETRY * at : GEOMETRY * (at + 1)]
    return g[:2], g[2:6], g[6:8], g[8]
