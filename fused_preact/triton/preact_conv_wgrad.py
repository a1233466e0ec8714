"""preact_conv_wgrad: dW = sum over pixels of dy h^T, h = act(scale * (u - mean) + shift) again.

    dy = scale' * g' + B' * (u' - mean') + C', BatchNorm's backward pass of the layer above

Reads g', u' [M', K] and u [M, C], writes dW [K, R, S, C]; 2 * M' * K * C * R * S FLOPs.

A program sums BLOCK_K by BLOCK_C of dW for one kernel tap over one of SPLITS runs of pixels; the
runs are added in order. Both operands are computed in registers; h is zero outside of the image.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .conv import shape_of
from .launch import cdiv, dot_precision, launch, nhwc, operator, vectors
from .reduce import add_up
from .tile import activate, batch_norm_grad, cast, dot, normalise, pixels


@triton.jit
def preact_conv_wgrad_kernel(
    grad,  # [N, P, Q, K]: dy, or g' where output is given
    output,  # u' [N, P, Q, K], or None
    output_affine,  # [4, K], or None
    output_sums,  # [2, K], or None
    input,  # u [N, H, W, C]
    affine,  # [4, C], or None where h is u itself
    dweight,  # [splits, K, R, S, C]
    N,
    H,
    W,
    C,
    P,
    Q,
    K,
    M,  # N * P * Q
    steps,  # of BLOCK_P pixels, a split
    R: tl.constexpr,
    S: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_k, blocks_c = tl.cdiv(K, BLOCK_K), tl.cdiv(C, BLOCK_C)
    program, split = tl.program_id(0), tl.program_id(1)
    k = program % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = program // blocks_k % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = program // blocks_k // blocks_c
    r, s = tap // S, tap % S

    acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for step in range(steps):
        tile = split.to(tl.int64) * steps + step
        n, p, q = pixels(tile, P, Q, BLOCK_P)
        m = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        y, x = p * DOWN - TOP + r, q * ACROSS - LEFT + s
        inside = (n < N) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        mask = inside[:, None] & (c < C)[None, :]
        h = tl.load(input + ((n * H + y) * W + x)[:, None] * C + c[None, :], mask=mask, other=0.0)
        if affine is not None:
            z = normalise(h, affine, c, C)
            h = cast(tl.where(inside[:, None], activate(z, ACTIVATION), 0.0), h.dtype)
        offsets = m[:, None] * K + k[None, :]
        mask = (m < M)[:, None] & (k < K)[None, :]
        dy = tl.load(grad + offsets, mask=mask, other=0.0)
        if output is not None:
            u = tl.load(output + offsets, mask=mask, other=0.0)
            dy = cast(batch_norm_grad(dy, u, output_affine, output_sums, k, K, M), dy.dtype)
        acc = dot(tl.trans(dy), h, acc, PRECISION)

    rows = (split.to(tl.int64) * K + k) * (R * S * C) + tap * C
    mask = (k < K)[:, None] & (c < C)[None, :]
    tl.store(dweight + rows[:, None] + c[None, :], acc, mask=mask)


@operator
def preact_conv_wgrad(
    grad: Tensor,
    output: Tensor | None,
    output_affine: Tensor | None,
    output_sums: Tensor | None,
    input: Tensor,
    affine: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    allow_tf32: bool = False,
) -> Tensor:
    grad, input = nhwc(grad), nhwc(input)
    conv, _, geometry = shape_of(
        input.shape, grad.shape[1], kernel_size, stride, padding, dilation, groups
    )
    taps = kernel_size[0] * kernel_size[1]
    options = config.of_conv("preact_conv_wgrad", input.dtype, conv, geometry)
    options["BLOCK_K"] = config.block(conv.K, options["BLOCK_K"])
    options["BLOCK_C"] = config.block(conv.C, options["BLOCK_C"])
    rows = conv.output_pixels
    options["BLOCK_P"] = config.block(rows, options["BLOCK_P"])
    programs = taps * cdiv(conv.K, options["BLOCK_K"]) * cdiv(conv.C, options["BLOCK_C"])
    blocks = cdiv(rows, options["BLOCK_P"])
    steps = cdiv(blocks, splits(conv, taps, cdiv(options.pop("PROGRAMS"), programs)))
    parts = vectors(input, cdiv(blocks, steps), conv.K, taps, conv.C)
    launch(
        preact_conv_wgrad_kernel,
        (programs, parts.shape[0]),
        grad,
        None if output is None else nhwc(output),
        output_affine,
        output_sums,
        input,
        affine,
        parts,
        *conv,
        rows,
        steps,
        ACTIVATION=activation,
        PRECISION=dot_precision(input.dtype, allow_tf32),
        **geometry,
        **options,
    )
    return add_up(parts).view(conv.K, *kernel_size, conv.C).permute(0, 3, 1, 2)


def splits(conv, taps, wanted):
    """Runs of pixels: as many as wanted, while their dW are no more than what is read once."""
    read = conv.input_pixels * conv.C + conv.output_pixels * conv.K
    return max(1, min(wanted, read // (conv.K * conv.C * taps)))
