"""Per-tile results to one, in a fixed order: up to FAN_IN at a time until one is left.

    moments  mean = near_0 + sum n_i (mean_i - near_0) / n,  M2 = sum M2_i + n_i (mean_i - mean)^2
    sums     plain

Chan, Golub, LeVeque 1983. Reads each tile's vectors once; nothing beside the tiles themselves.
Merging in the last program to arrive would take a counter that is zero at each launch: a launch of
its own to clear it, or memory that outlives the call and that two streams must not share.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .bn_affine import store_affine
from .launch import cdiv, launch, vectors
from .tile import column_sums

FAN_IN = 1024  # tiles of one launch: a batch of 128 images of 32x32 pixels in tiles of 128


@triton.jit
def merge_moments_kernel(
    moments,  # [3, tiles, C]: a value near the mean, the mean less that, M2
    merged,  # [3, groups, C] likewise; or, of one group, [2, C]: mean, variance
    weight,  # gamma [C] of the BatchNorm that follows, or None
    bias,  # its beta [C], or None
    affine,  # its affine [4, C], or None
    tiles,
    groups,
    C,
    M,  # rows in all
    rows_per_tile,
    eps,  # None without affine
    FAN_IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = group * FAN_IN + tl.arange(0, FAN_IN)
    mask = (tile < tiles)[:, None] & (c < C)[None, :]
    source, next_row = moments + tile[:, None] * C + c[None, :], tl.cast(tiles, tl.int64) * C
    near = tl.load(source, mask=mask, other=0.0)
    rest = tl.load(source + next_row, mask=mask, other=0.0)
    m2 = tl.load(source + 2 * next_row, mask=mask, other=0.0)
    first = tl.load(moments + group * FAN_IN * C + c, mask=c < C, other=0.0)

    count = tl.minimum(tl.maximum(M - tile * rows_per_tile, 0), rows_per_tile).to(tl.float32)
    count = count[:, None]
    total = tl.sum(count, 0)
    delta = tl.where(mask, near - first[None, :] + rest, 0.0)
    rest = column_sums(count * delta) / total
    delta -= rest[None, :]
    m2 = column_sums(m2 + count * delta * delta)

    target, next_row = merged + group * C + c, tl.cast(groups, tl.int64) * C
    if groups == 1:
        tl.store(target, first + rest, mask=c < C)
        tl.store(target + next_row, m2 / total, mask=c < C)
        if affine is not None:
            store_affine(first + rest, m2 / total, weight, bias, affine, c, C, eps)
    else:
        tl.store(target, first, mask=c < C)
        tl.store(target + next_row, rest, mask=c < C)
        tl.store(target + 2 * next_row, m2, mask=c < C)


@triton.jit
def add_up_kernel(
    parts,  # [tiles, size]
    result,  # [groups, size]
    tiles,
    size,
    FAN_IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = group * FAN_IN + tl.arange(0, FAN_IN)
    mask = (tile < tiles)[:, None] & (i < size)[None, :]
    total = column_sums(tl.load(parts + tile[:, None] * size + i[None, :], mask=mask, other=0.0))
    tl.store(result + group * size + i, total, mask=i < size)


def _block(operator: str, tiles: int, size: int) -> dict[str, int]:
    """Tiles by columns of one program, and the other options of its kernel."""
    options = config.best(operator, config.architecture(), torch.float32)
    fan_in = config.block(tiles, FAN_IN, least=1)
    columns = config.block(size, max(options.pop("TILE") // fan_in, 8), least=1)
    return {"FAN_IN": fan_in, "BLOCK": columns, **options}


def merge_moments(
    moments: Tensor,
    rows: int,
    rows_per_tile: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (2, C) of (3, tiles, C) moments of tiles of rows, and their affine.

    affine (4, C) is bn_affine of them with weight, bias and eps; without eps it is empty, (4, 0).
    """
    _, tiles, channels = moments.shape
    affine = vectors(moments, 4, 0 if eps is None else channels)
    while True:
        options = _block("merge_moments", tiles, channels)
        groups = cdiv(tiles, options["FAN_IN"])
        last = groups == 1
        merged = vectors(moments, 2 if last else 3, groups, channels)
        launch(
            merge_moments_kernel,
            (cdiv(channels, options["BLOCK"]), groups),
            moments,
            merged,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            None if eps is None else affine,
            tiles,
            groups,
            channels,
            rows,
            rows_per_tile,
            eps,
            **options,
        )
        if last:
            return merged.view(2, channels), affine
        moments, tiles, rows_per_tile = merged, groups, rows_per_tile * options["FAN_IN"]


def add_up(parts: Tensor) -> Tensor:
    """The sum (...) of (tiles, ...)."""
    tiles, *shape = parts.shape
    size = math.prod(shape)
    while tiles > 1:
        options = _block("add_up", tiles, size)
        groups = cdiv(tiles, options["FAN_IN"])
        result = parts.new_empty((groups, size))
        launch(
            add_up_kernel,
            (cdiv(size, options["BLOCK"]), groups),
            parts,
            result,
            tiles,
            size,
            **options,
        )
        parts, tiles = result, groups
    return parts.view(shape)
