"""preact_conv_dgrad: g = (dgrad(dy, W) + addend) * act'(z), and the sums of g.

    S1 = sum g, S2 = sum g * (u - mean) * rstd
    dy = scale' * g' + B' * (u' - mean') + C', BatchNorm's backward pass of the layer above

With frozen statistics du = residual + scale * g instead of g, and nothing is left to do.
Reads g', u' [M', K], W, u [M, C], addend and residual, writes g; 2 * M' * K * C * R * S FLOPs.

A program makes BLOCK_M pixels by BLOCK_N channels of g. With a stride, the pixels of one program
are of one phase, (y + TOP) mod DOWN and (x + LEFT) mod ACROSS: the same kernel taps reach all of
them. The first operand, dy, is computed in registers and zero outside of the image; the epilogue
applies the slope and leaves the tile's S1 and S2.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .conv import shape_of
from .launch import activations, cdiv, dot_precision, launch, nhwc, operator, vectors
from .reduce import add_up
from .tile import batch_norm_grad, cast, dot, frozen_grad, normalise, pixels, slope, store_sums


@triton.jit
def preact_conv_dgrad_kernel(
    grad,  # [N, P, Q, K]: dy, or g' where output is given
    output,  # u' [N, P, Q, K], or None
    output_affine,  # [4, K], or None
    output_sums,  # [2, K], or None
    weight,  # [K, R, S, C]
    input,  # u [N, H, W, C]
    affine,  # [4, C], or None where g = dgrad + addend
    addend,  # [N, H, W, C], or None
    residual,  # [N, H, W, C], or None
    g,  # [N, H, W, C]
    sums,  # [phases * tiles, 2, C], or None
    N,
    H,
    W,
    C,
    P,
    Q,
    K,
    M,  # N * P * Q
    tiles,  # of a phase
    R: tl.constexpr,
    S: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks_n = tl.cdiv(C, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    c = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(1)
    i, j = phase // ACROSS % DOWN, phase % ACROSS
    first_y, first_x = (i + DOWN - TOP % DOWN) % DOWN, (j + ACROSS - LEFT % ACROSS) % ACROSS
    rows = tl.cdiv(tl.maximum(H - first_y, 0), DOWN)
    columns = tl.cdiv(tl.maximum(W - first_x, 0), ACROSS)
    n, y, x = pixels(tile, tl.maximum(rows, 1), tl.maximum(columns, 1), BLOCK_M)
    mine = n < tl.where((rows > 0) & (columns > 0), N, 0)
    p, q = (first_y + TOP) // DOWN + y, (first_x + LEFT) // ACROSS + x  # of taps i and j
    dy_rows = ((n * P + p) * Q + q)[:, None] * K

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_k = tl.cdiv(K, BLOCK_K)
    taps_down = tl.cdiv(tl.maximum(R - i, 0), DOWN)
    taps_across = tl.cdiv(tl.maximum(S - j, 0), ACROSS)
    for step in range(taps_down * taps_across * blocks_k):
        tap = step // blocks_k
        down, across = tap // taps_across, tap % taps_across
        k = step % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = mine & (p >= down) & (p - down < P) & (q >= across) & (q - across < Q)
        mask = inside[:, None] & (k < K)[None, :]
        offsets = dy_rows + (k - (down * Q + across) * K)[None, :]
        dy = tl.load(grad + offsets, mask=mask, other=0.0)
        if output is not None:
            u = tl.load(output + offsets, mask=mask, other=0.0)
            du = batch_norm_grad(dy, u, output_affine, output_sums, k, K, M)
            dy = cast(tl.where(inside[:, None], du, 0.0), dy.dtype)
        r, s = i + down * DOWN, j + across * ACROSS
        mask = (k < K)[:, None] & (c < C)[None, :]
        w_rows = weight + k.to(tl.int64)[:, None] * (R * S * C)
        w = tl.load(w_rows + ((r * S + s) * C + c)[None, :], mask=mask, other=0.0)
        acc = dot(dy, w, acc, PRECISION)

    y, x = first_y + y * DOWN, first_x + x * ACROSS
    offsets = ((n * H + y) * W + x)[:, None] * C + c[None, :]
    mask = mine[:, None] & (c < C)[None, :]
    if addend is not None:
        acc += tl.load(addend + offsets, mask=mask, other=0.0).to(tl.float32)
    if affine is None:
        tl.store(g + offsets, cast(acc, g.dtype.element_ty), mask=mask)
    else:
        u = tl.load(input + offsets, mask=mask, other=0.0)
        result = acc * slope(normalise(u, affine, c, C), ACTIVATION)
        if not FROZEN:
            result = cast(result, u.dtype).to(tl.float32)
        if sums is not None:
            store_sums(result, u, affine, sums, phase * tiles + tile, c, C)
        if FROZEN:
            result = frozen_grad(result, residual, affine, offsets, mask, c, C)
        tl.store(g + offsets, cast(result, u.dtype), mask=mask)


@operator
def preact_conv_dgrad(
    grad: Tensor,
    output: Tensor | None,
    output_affine: Tensor | None,
    output_sums: Tensor | None,
    weight: Tensor,
    input: Tensor,
    affine: Tensor | None,
    addend: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    with_sums: bool,
    allow_tf32: bool = False,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, weight, input = nhwc(grad), nhwc(weight), nhwc(input)
    channels = input.shape[1]
    conv, _, geometry = shape_of(
        input.shape, grad.shape[1], weight.shape[2:], stride, padding, dilation, groups
    )
    options = config.of_conv("preact_conv_dgrad", input.dtype, conv, geometry)
    options["BLOCK_N"] = config.block(channels, options["BLOCK_N"])
    options["BLOCK_K"] = config.block(conv.K, options["BLOCK_K"])
    down, across = stride
    phases = down * across
    most_pixels = conv.N * cdiv(conv.H, down) * cdiv(conv.W, across)  # of a phase
    options["BLOCK_M"] = config.block(most_pixels, options["BLOCK_M"])
    tiles = cdiv(most_pixels, options["BLOCK_M"])
    g = activations(input, input.shape)
    with_sums = with_sums and affine is not None
    sums = vectors(input, phases * tiles, 2, channels) if with_sums else None
    launch(
        preact_conv_dgrad_kernel,
        (tiles * cdiv(channels, options["BLOCK_N"]), phases),
        grad,
        None if output is None else nhwc(output),
        output_affine,
        output_sums,
        weight,
        input,
        affine,
        None if addend is None else nhwc(addend),
        None if residual is None else nhwc(residual),
        g,
        sums,
        *conv,
        conv.output_pixels,
        tiles,
        FROZEN=frozen,
        ACTIVATION=activation,
        PRECISION=dot_precision(input.dtype, allow_tf32),
        **geometry,
        **options,
    )
    return g, vectors(input, 2, 0) if sums is None else add_up(sums)
