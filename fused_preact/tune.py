"""The command fused-preact tune: measures tile sizes of the Triton kernels, keeps the best.

For the convolutions that most of a network consists of, at one batch size: forward, dgrad and
wgrad, and the pointwise operators on the input, run with every candidate; the fastest whose result
is right goes at once into the user's own table (triton/config.py), which the kernels read before
the package's. What is not in it keeps the package's defaults. Nothing is measured while a network
trains.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Options = dict[str, int]
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of one call
Measured = tuple[str, str, Options, float]  # operator, class of shapes, the best, milliseconds


class Layer(NamedTuple):
    """A convolution of C to K channels on a batch of square images, padded to keep their size."""

    batch: int
    C: int
    size: int
    K: int
    kernel: int
    stride: int


_STAGES_18 = (32, 64), (16, 128), (8, 256), (4, 512)  # size and width
NETWORKS: dict[str, tuple[Layer, ...]] = {
    "preact_resnet164": tuple(
        layer
        for size, width, wide in ((32, 16, 64), (16, 32, 128), (8, 64, 256))
        for layer in (
            Layer(128, wide, size, width, 1, 1),
            Layer(128, width, size, width, 3, 1),
            Layer(128, width, size, wide, 1, 1),
        )
    ),
    "preact_resnet18": (
        *(Layer(128, width, size, width, 3, 1) for size, width in _STAGES_18),
        *(Layer(128, width, size, 2 * width, 3, 2) for size, width in _STAGES_18[:-1]),
    ),
    "preact_resnet200": tuple(
        layer
        for size, width in ((56, 64), (28, 128), (14, 256), (7, 512))
        for layer in (
            Layer(256, 4 * width, size, width, 1, 1),
            Layer(256, width, size, width, 3, 1),
            Layer(256, width, size, 4 * width, 1, 1),
        )
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONVOLUTIONS = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad")
POINTWISE = ("bn_stats", "bn_relu_forward", "bn_relu_backward", "residual_grad")
OPERATORS = CONVOLUTIONS + POINTWISE
TOLERANCE = 2e-2  # of a candidate's result, relative; bfloat16 and TF32 round to 4e-3 and 5e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which networks, in which precision."""
    parser.add_argument(
        "--network",
        nargs="+",
        choices=NETWORKS,
        default=list(NETWORKS),
        metavar="NAME",
        help=f"whose layers, at whose batch size: {', '.join(_described())}; by default all",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=DTYPES,
        default=["bf16"],
        metavar="NAME",
        help=f"{', '.join(DTYPES)}; by default bf16",
    )


def run(args: argparse.Namespace) -> int:
    """Measures and extends the user's table; 2 where there is no GPU or no table to extend.

    130 where it is interrupted; what was measured until then is kept.
    """
    if not torch.cuda.is_available():
        print("fused-preact tune: needs a GPU to measure on, and there is none", file=sys.stderr)
        return 2
    try:
        import triton.testing

        from .triton import config
    except ImportError as error:
        print(f"fused-preact tune: {error}", file=sys.stderr)
        return 2
    path = config.user_table()
    try:
        table = config.read(path)
        write(path, table)  # what cannot be written is said before anything is measured
    except ValueError as error:
        print(f"fused-preact tune: {error}; move it away first", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fused-preact tune: cannot write the table ({error})", file=sys.stderr)
        return 2
    architecture = config.architecture()
    layers = list(dict.fromkeys(layer for name in args.network for layer in NETWORKS[name]))
    runs = list(itertools.product(args.precision, layers))
    print(f"{architecture}: {len(runs)} layers; what is fastest goes to {path}", flush=True)
    try:
        for number, (precision, layer) in enumerate(runs, 1):
            print(f"layer {number} of {len(runs)}: {precision}, {layer}", flush=True)
            measured = tune(layer, DTYPES[precision], "cuda", triton.testing.do_bench)
            for operator, shape, best, milliseconds in _that_fit(measured):
                table.setdefault(operator, {}).setdefault(architecture, {})[shape] = best
                write(path, table)
                print(f"  {operator:<22}{shape:<48}{milliseconds:8.3f} ms  {best}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; {path} keeps what was measured", file=sys.stderr)
        return 130
    finally:
        config.forget()
    print(f"{path}: what was measured is used from now on")
    return 0


def _that_fit(measured: Iterable[Measured]) -> Iterator[Measured]:
    """What is measured of a layer until the GPU's memory is too small for it."""
    try:
        yield from measured
    except torch.OutOfMemoryError:
        print("  passed over: too large for this GPU's memory", flush=True)


def _described() -> list[str]:
    return [f"{name} (batch {layers[0].batch})" for name, layers in NETWORKS.items()]


def candidates(operator: str) -> list[Options]:
    """Every combination of options that is worth a try."""
    if operator == "preact_conv_wgrad":
        choices = {
            "BLOCK_P": (32, 64),
            "BLOCK_K": (32, 64, 128),
            "BLOCK_C": (32, 64, 128),
            "PROGRAMS": (256, 1024),
        }
    elif operator in CONVOLUTIONS:
        choices = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64)}
    else:
        choices = {"TILE": (2048, 4096, 8192), "BLOCK_C": (32, 64, 128, 256)}
    choices["num_warps"] = 4, 8
    if operator in CONVOLUTIONS:
        choices["num_stages"] = 2, 3, 4
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def tune(layer: Layer, dtype: torch.dtype, device: str, timer: Timer) -> Iterator[Measured]:
    """For each operator of a layer: its name, its class of shapes, the best options, their time."""
    from . import reference, triton
    from .triton import config
    from .triton.conv import shape_of

    calls = _calls(layer, dtype, device)
    kernel, stride, padding, *rest = calls.pop("geometry")
    shape = (layer.batch, layer.C, layer.size, layer.size)
    conv, _, geometry = shape_of(shape, layer.K, kernel, stride, padding, *rest)
    classes = dict.fromkeys(CONVOLUTIONS, config.conv_class(conv, geometry))
    classes |= dict.fromkeys(POINTWISE, config.row_class(layer.C, layer.batch * layer.size**2))
    for operator, args in calls.items():
        name = f"{str(dtype).removeprefix('torch.')}, {classes[operator]}"
        right = getattr(reference, operator)(*args)
        found = choose(operator, getattr(triton, operator), args, right, timer)
        if found is not None:
            yield operator, name, *found


def choose(
    operator: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    right: Any,
    timer: Timer,
    options: Iterable[Options] | None = None,
) -> tuple[Options, float] | None:
    """The fastest options and their time; None, with a warning, where no candidate works.

    What does not compile, or does not fit into the GPU, is passed over; what gives another result
    than right as well, with a warning.
    """
    from triton.errors import TritonError

    from .triton import config

    best: tuple[Options, float] | None = None
    for candidate in candidates(operator) if options is None else options:
        with config.trial(operator, candidate):
            try:
                result = function(*args)
            except (torch.AcceleratorError, torch.OutOfMemoryError):
                raise  # no candidate's fault
            except (TritonError, RuntimeError):
                continue
            if not _same(result, right):
                warnings.warn(f"{operator} is wrong with {candidate}", stacklevel=2)
                continue
            milliseconds = timer(lambda: function(*args))
        if best is None or milliseconds < best[1]:
            best = candidate, milliseconds
    if best is None:
        warnings.warn(f"{operator}: no candidate works; it keeps the default", stacklevel=2)
    return best


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Replaces the file at once: a run killed at any moment leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            json.dump(table, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _calls(layer: Layer, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments for each operator, as inside of a network in training, and the geometry."""
    from . import ops

    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(size, generator=generator, device=device).to(dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(size) == 4 else tensor

    def affine(channels: int) -> Tensor:
        return randn(4, channels, dtype=torch.float32).abs()

    pad = layer.kernel // 2
    size = (layer.size - 1) // layer.stride + 1
    kernel, stride = [layer.kernel] * 2, [layer.stride] * 2
    geometry, tf32 = (stride, [pad] * 4, [1, 1], 1), ops.allow_tf32()
    input, input_affine = randn(layer.batch, layer.C, layer.size, layer.size), affine(layer.C)
    weight = randn(layer.K, layer.C, *kernel) / (layer.C * layer.kernel**2) ** 0.5
    output = randn(layer.batch, layer.K, size, size)
    sums = randn(2, layer.K, dtype=torch.float32) * (layer.batch * size * size) ** 0.5
    deferred = randn(*output.shape), output, affine(layer.K), sums
    g, input_sums = randn(*input.shape), randn(2, layer.C, dtype=torch.float32)
    return {
        "geometry": (kernel, *geometry),
        "preact_conv_forward": (input, input_affine, weight, None, *geometry, "relu", True, tf32),
        "preact_conv_dgrad": (
            *deferred,
            *(weight, input, input_affine, None),
            *(*geometry, "relu", True, tf32),
        ),
        "preact_conv_wgrad": (*deferred, input, input_affine, kernel, *geometry, "relu", tf32),
        "bn_stats": (input,),
        "bn_relu_forward": (input, input_affine, "relu"),
        "bn_relu_backward": (g, input, input_affine, "relu", True),
        "residual_grad": (g, g, input, input_affine, input_sums),
    }


def _same(result: Any, right: Any) -> bool:
    pairs = zip(_tensors(result), _tensors(right), strict=True)
    return all((a - b).float().norm() <= TOLERANCE * b.float().norm() for a, b in pairs)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
