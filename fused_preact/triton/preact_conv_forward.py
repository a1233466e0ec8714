"""preact_conv_forward: y = conv(act(scale * (u - mean) + shift), W) + residual, statistics of y.

Reads u [M, C], W and residual, writes y [M', K]; 2 * M' * K * C * R * S FLOPs.

A program makes BLOCK_M pixels by BLOCK_N channels of y. For each kernel tap and BLOCK_K channels
of u it computes h in registers, zero outside of the image, and multiplies; the epilogue adds the
residual, stores, and leaves the tile's moments.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .conv import shape_of
from .launch import activations, cdiv, dot_precision, launch, nhwc, operator, vectors
from .reduce import merge_moments
from .tile import activate, cast, dot, normalise, pixels, store_moments


@triton.jit
def preact_conv_forward_kernel(
    input,  # u [N, H, W, C]
    affine,  # [4, C], or None where h is u itself
    weight,  # [K, R, S, C]
    residual,  # [N, P, Q, K], or None
    output,  # y [N, P, Q, K]
    moments,  # [3, tiles, K], see store_moments, or None
    N,
    H,
    W,
    C,
    P,
    Q,
    K,
    M,  # N * P * Q
    R: tl.constexpr,
    S: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    k = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n, p, q = pixels(tile, P, Q, BLOCK_M)
    y, x = p * DOWN - TOP, q * ACROSS - LEFT
    u_rows = input + ((n * H + y) * W + x)[:, None] * C
    w_columns = weight + k.to(tl.int64)[None, :] * (R * S * C)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_c = tl.cdiv(C, BLOCK_K)
    for step in range(R * S * blocks_c):
        tap = step // blocks_c
        r, s = tap // S, tap % S
        c = step % blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N) & (y + r >= 0) & (y + r < H) & (x + s >= 0) & (x + s < W)
        mask = inside[:, None] & (c < C)[None, :]
        h = tl.load(u_rows + ((r * W + s) * C + c)[None, :], mask=mask, other=0.0)
        if affine is not None:
            z = normalise(h, affine, c, C)
            h = cast(tl.where(inside[:, None], activate(z, ACTIVATION), 0.0), h.dtype)
        mask = (c < C)[:, None] & (k < K)[None, :]
        w = tl.load(w_columns + (tap * C + c)[:, None], mask=mask, other=0.0)
        acc = dot(h, w, acc, PRECISION)

    m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = m[:, None] * K + k[None, :]
    mask = (m < M)[:, None] & (k < K)[None, :]
    if residual is not None:
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    result = cast(acc, output.dtype.element_ty)
    tl.store(output + offsets, result, mask=mask)
    if moments is not None:
        tiles = tl.cdiv(M, BLOCK_M)
        store_moments(result.to(tl.float32), moments, tile, tiles, m, M, k, K, BLOCK_M)


@operator
def preact_conv_forward(
    input: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    with_stats: bool,
    allow_tf32: bool = False,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    next_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    input, weight = nhwc(input), nhwc(weight)
    channels, _, *kernel_size = weight.shape
    conv, size, geometry = shape_of(
        input.shape, channels, kernel_size, stride, padding, dilation, groups
    )
    options = config.of_conv("preact_conv_forward", input.dtype, conv, geometry)
    options["BLOCK_N"] = config.block(channels, options["BLOCK_N"])
    options["BLOCK_K"] = config.block(conv.C, options["BLOCK_K"])
    rows = conv.output_pixels
    options["BLOCK_M"] = config.block(rows, options["BLOCK_M"])
    tiles = cdiv(rows, options["BLOCK_M"])
    output = activations(input, (input.shape[0], channels, *size))
    moments = vectors(input, 3, tiles, channels) if with_stats else None
    launch(
        preact_conv_forward_kernel,
        (tiles * cdiv(channels, options["BLOCK_N"]),),
        input,
        affine,
        weight,
        None if residual is None else nhwc(residual),
        output,
        moments,
        *conv,
        rows,
        ACTIVATION=activation,
        PRECISION=dot_precision(input.dtype, allow_tf32),
        **geometry,
        **options,
    )
    if moments is None:
        return output, vectors(input, 2, 0), vectors(input, 4, 0)
    next_bn = next_weight, next_bias, next_eps
    return output, *merge_moments(moments, rows, options["BLOCK_M"], *next_bn)
