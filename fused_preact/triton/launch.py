"""From a call of torch.ops.fused_preact_triton.* to launched kernels."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import config

NAMESPACE = "fused_preact_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(function: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> Any:
    """Registers function under its own name, for the device of its first tensor; returns the op.

    Where it has an argument input, that is checked first, in the words of csrc/torch/arguments.h.
    """
    parameters = list(inspect.signature(function).parameters)
    position = parameters.index("input") if "input" in parameters else None

    def on_device(*args: Any) -> Any:
        if position is not None:
            check_input(args[position])
        first = next(arg for arg in _flat(args) if isinstance(arg, Tensor))
        with torch.cuda.device_of(first):
            return function(*args)

    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=mutates_args)
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, on_device, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    for arg in args:
        yield from arg if isinstance(arg, list | tuple) else (arg,)


def check_input(input: Tensor) -> None:
    """Raises ValueError where input is no batch of images or holds no value."""
    if input.dim() != 4:
        raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(input.shape)}")
    if input.numel() == 0:
        raise ValueError(f"input: expected at least one value, got shape {tuple(input.shape)}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs kernel on the current device's current stream."""
    kernel[grid](*args, **options)


def nhwc(tensor: Tensor) -> Tensor:
    """tensor as [N, H, W, C] in memory."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"expected float32, bfloat16 or float16, got {tensor.dtype}")
    return tensor.contiguous(memory_format=torch.channels_last)


def activations(like: Tensor, shape: Any) -> Tensor:
    """An empty tensor, [N, H, W, C] in memory."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def vectors(like: Tensor, *shape: int) -> Tensor:
    """An empty float32 tensor on the same device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dot_precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    """tl.dot's input_precision: what 16-bit operands ignore is one choice for them, not two.

    Of AMD's GPUs Triton has TF32 on CDNA 3 alone, and refuses it elsewhere.
    """
    if not allow_tf32 or dtype != torch.float32:
        return "ieee"
    architecture = config.architecture()
    return "ieee" if architecture.startswith("gfx") and architecture != "gfx942" else "tf32"


def row_tiles(operator: str, input: Tensor) -> tuple[int, Mapping[str, int]]:
    """Number of tiles and options of a pointwise kernel on input (N, C, H, W) as x [M, C]."""
    channels = input.shape[1]
    rows = input.numel() // channels
    shape = config.row_class(channels, rows)
    options = config.best(operator, config.architecture(), input.dtype, shape)
    block_c = config.block(channels, options.pop("BLOCK_C"), least=1)
    block_m = config.block(rows, max(options.pop("TILE") // block_c, 1), least=1)
    return cdiv(rows, block_m), {"BLOCK_M": block_m, "BLOCK_C": block_c, **options}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
