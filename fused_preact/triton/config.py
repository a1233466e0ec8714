"""Tile sizes: for each operator, architecture and class of shapes the best that is known.

configs.json in this folder is the package's table; `fused-preact tune` writes a user's own, which
comes first, to user_table(). The package's entries are defaults, chosen by reasoning and not
measured yet: tiles that fit into every architecture, and that spill no registers on those that
tests/triton_kernels/test_compiled.py compiles for. Both map

    operator -> architecture -> class -> options

a class being a dtype and, where measured, conv_class or row_class. Where there is no entry for an
architecture or a class, "default" serves; block sizes shrink to the shape.
"""

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

PACKAGE_TABLE = Path(__file__).with_name("configs.json")
Table = dict[str, dict[str, dict[str, dict[str, int]]]]


def user_table() -> Path:
    """$FUSED_PREACT_TUNED, or fused_preact/triton.json in the XDG configuration folder."""
    named = os.environ.get("FUSED_PREACT_TUNED")
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else Path(home) / "fused_preact" / "triton.json"


def read(path: Path) -> Table:
    """The table in a file; empty where there is no such file.

    Raises ValueError where the file holds something else.
    """
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a table of tile sizes ({error})") from error
    if not _is_table(table):
        raise ValueError(f"{path}: not a table of tile sizes")
    return table


def best(operator: str, architecture: str, dtype: torch.dtype, shape: str = "") -> dict[str, int]:
    """The options of an operator's kernel: on trial, or from the user's table or the package's."""
    if operator in _on_trial:
        return dict(_on_trial[operator])
    return dict(_best(operator, architecture, str(dtype).removeprefix("torch."), shape))


def of_conv(
    operator: str, dtype: torch.dtype, conv: Any, geometry: Mapping[str, Any]
) -> dict[str, int]:
    """The options of a convolution's kernel."""
    return best(operator, architecture(), dtype, conv_class(conv, geometry))


def conv_class(conv: Any, geometry: Mapping[str, Any]) -> str:
    """What convolutions share their options: kernel, stride, channels, pixels to a power of two."""
    kernel = f"{geometry['R']}x{geometry['S']} stride {geometry['DOWN']}"
    return f"{kernel}, {conv.C} to {conv.K}, {_pixels(conv.output_pixels)}"


def row_class(channels: int, rows: int) -> str:
    """What pointwise kernels share their options: channels, pixels to a power of two."""
    return f"{channels} channels, {_pixels(rows)}"


def block(size: int, most: int, least: int = 16) -> int:
    """A power of two that covers size, from least to most; tl.dot takes 16 and more."""
    return max(least, min(most, 1 << (size - 1).bit_length()))


def architecture() -> str:
    """The current device's, such as "sm_90" or "gfx942"; or "interpreter"."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return _architecture(torch.cuda.current_device())


@contextmanager
def trial(operator: str, options: Mapping[str, int]) -> Iterator[None]:
    """Run an operator with these options inside the with statement."""
    _on_trial[operator] = options
    try:
        yield
    finally:
        del _on_trial[operator]


def forget() -> None:
    """Read the tables again at their next use."""
    _tables.cache_clear()
    _best.cache_clear()


_on_trial: dict[str, Mapping[str, int]] = {}


@functools.cache
def _architecture(device: int) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@functools.cache
def _best(operator: str, architecture: str, dtype: str, shape: str) -> Mapping[str, int]:
    for table in _tables():
        by_architecture = table.get(operator, {})
        for by_class in (by_architecture.get(architecture), by_architecture.get("default")):
            for name in (f"{dtype}, {shape}", dtype, "default"):
                if by_class and name in by_class:
                    return by_class[name]
    raise KeyError(f"{PACKAGE_TABLE}: no entry for {operator}")


@functools.cache
def _tables() -> tuple[Table, ...]:
    tables = []
    try:
        tables.append(read(user_table()))
    except ValueError as error:
        warnings.warn(f"{error}; using the package's", stacklevel=2)
    return *tables, read(PACKAGE_TABLE)


def _pixels(count: int) -> str:
    return f"2^{count.bit_length() - 1} pixels"


def _is_table(value: Any, depth: int = 4) -> bool:
    if depth == 0:
        return isinstance(value, int) and value > 0
    return isinstance(value, dict) and all(_is_table(item, depth - 1) for item in value.values())
