"""bn_stats: mean = sum u / M and var = sum (u - mean)^2 / M of each channel.

Reads u [M, C] once, 4 * M * C FLOPs; each tile's moments are merged in a fixed order (reduce.py).
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, nhwc, operator, row_tiles, vectors
from .reduce import merge_moments
from .tile import store_moments, tile_of


@triton.jit
def bn_stats_kernel(
    input,  # u [M, C]
    moments,  # [3, tiles, C], see store_moments
    M,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, m, c = tile_of(C, BLOCK_M, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    u = tl.load(input + m[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    store_moments(u, moments, tile, tl.cdiv(M, BLOCK_M), m, M, c, C, BLOCK_M)


@operator
def bn_stats(input: Tensor) -> Tensor:
    input = nhwc(input)
    channels = input.shape[1]
    rows = input.numel() // channels
    tiles, options = row_tiles("bn_stats", input)
    moments = vectors(input, 3, tiles, channels)
    programs = tiles * cdiv(channels, options["BLOCK_C"])
    launch(bn_stats_kernel, (programs,), input, moments, rows, channels, **options)
    stats, _ = merge_moments(moments, rows, options["BLOCK_M"])
    return stats
