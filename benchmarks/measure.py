"""Times contenders side by side, and counts what a step moves and computes.

Rounds alternate between the contenders, so that a machine's drift hits all alike; what counts is
the median of the ratios of a round.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fused_preact.units import Chain

Step = Callable[[int], object]  # one step on the inputs of an index

WARMUP = 2
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
SHORTEST = 2e-3  # seconds; on a CPU, what takes less is repeated within a round


@dataclass
class Measured:
    """A contender's seconds a step, one a round; its memory in bytes; on a GPU its launches.

    None is what was not measured.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Clock:
    """A timer that shows what was measured: each replayed step moves it by its seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def alternate(
    contenders: dict[str, Step], device: torch.device, budget: float
) -> dict[str, Measured]:
    """Each contender once a round, after a warm-up; 3 to 15 rounds in about `budget` seconds."""
    measured = {name: Measured() for name in contenders}
    repeats = {}
    for name, step in contenders.items():
        for index in range(WARMUP):
            step(index)
        repeats[name] = 1 if device.type == "cuda" else math.ceil(SHORTEST / _seconds(step, device))
    start = time.perf_counter()
    for index in range(MOST_ROUNDS):
        if index >= FEWEST_ROUNDS and time.perf_counter() - start > budget:
            break
        # every other round backwards: nobody always runs after the same neighbour
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        for name in order:
            seconds = _seconds(contenders[name], device, index, repeats[name])
            measured[name].seconds.append(seconds)
    return measured


def ratios(slower: Measured, faster: Measured) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the rounds' ratios slower / faster."""
    values = [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _seconds(step: Step, device: torch.device, index: int = 0, repeats: int = 1) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_cache(device)
        begin.record()
        step(index)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    for _ in range(repeats):
        step(index)
    return (time.perf_counter() - start) / repeats


def _flush_cache(device: torch.device) -> None:
    torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_()


# --- the floor -----------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Adds up the floor of every operator that runs: its bytes moved, or its arithmetic.

    An operator's bytes are its tensors, each once; views and allocations move nothing. Arithmetic
    is a direct convolution's: a kernel that multiplies less can be below its floor.
    """

    def __init__(self, bandwidth: float, rate: float) -> None:
        super().__init__()
        self.bandwidth, self.rate = bandwidth, rate
        self.bytes, self.flops, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if runs_units(function):
            with self:
                return layer_by_layer(function, args, kwargs)
        output = function(*args, **(kwargs or {}))
        if moves_nothing(function) or not function.namespace.startswith(("aten", "fused_preact")):
            return output
        tensors = {}
        for value in torch.utils._pytree.tree_leaves((args, kwargs, output)):
            if isinstance(value, torch.Tensor):
                tensors[value.data_ptr()] = value.numel() * value.element_size()
        moved, flops = sum(tensors.values()), count_flops(function, args, kwargs or {}, output)
        self.bytes += moved
        self.flops += flops
        self.seconds += max(moved / self.bandwidth, flops / self.rate)
        return output


def moves_nothing(function) -> bool:
    """Whether all that an operator does is a view, an empty tensor, or bookkeeping."""
    name = function._schema.name.split("::")[1]
    prefixes = "empty", "new_empty", "detach", "_to_view"
    return function.is_view or name.startswith(prefixes) or name == "as_strided_"


def runs_units(function) -> bool:
    return function._schema.name.startswith("fused_preact::preact_units_")


def layer_by_layer(function, args, kwargs) -> Any:
    """What an operator that runs units does, by the operators for single layers."""
    chain = Chain(torch.ops.fused_preact)
    return getattr(chain, function._schema.name.split("::")[1])(*args, **(kwargs or {}))


def count_flops(function, args, kwargs, output) -> int:
    """Multiplications and additions of an operator, 0 where it has few."""
    name = function._schema.name.split("::")[1]
    products = 1
    if name == "preact_conv_forward":
        weight, result = args[2], output[0]
    elif name == "preact_conv_dgrad":
        weight, result = args[4], args[0]
    elif name == "preact_conv_wgrad":
        weight, result = output, args[0]
    elif name == "preact_conv_backward":
        weight, result, products = args[4], args[0], 2
    elif name == "residual_conv_backward":
        weight, result, products = args[5], args[1], 2
    else:
        count = flop_registry.get(function.overloadpacket)
        return count(*args, **kwargs, out_val=output) if count else 0
    return products * 2 * result.numel() * weight[0].numel()
