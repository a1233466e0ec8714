"""bn_relu_backward: g = dh * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd.

With frozen statistics du = residual + scale * g instead of g, and nothing is left to do.
Reads dh, u and residual [M, C], writes g [M, C]; 8 * M * C FLOPs. Else residual_grad finishes du.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import activations, cdiv, launch, nhwc, operator, row_tiles, vectors
from .reduce import add_up
from .tile import cast, frozen_grad, normalise, slope, store_sums, tile_of


@triton.jit
def bn_relu_backward_kernel(
    grad,  # dh [M, C]
    input,  # u [M, C]
    affine,  # [4, C]
    residual,  # [M, C], or None
    g,  # [M, C]
    sums,  # [tiles, 2, C], or None
    M,
    C,
    FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, m, c = tile_of(C, BLOCK_M, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    offsets = m[:, None] * C + c[None, :]
    dh = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(input + offsets, mask=mask, other=0.0)
    result = dh * slope(normalise(u, affine, c, C), ACTIVATION)
    if not FROZEN:
        result = cast(result, u.dtype).to(tl.float32)
    if sums is not None:
        store_sums(result, u, affine, sums, tile, c, C)
    if FROZEN:
        result = frozen_grad(result, residual, affine, offsets, mask, c, C)
    tl.store(g + offsets, cast(result, u.dtype), mask=mask)


@operator
def bn_relu_backward(
    grad: Tensor,
    input: Tensor,
    affine: Tensor,
    activation: str,
    with_sums: bool,
    frozen: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, input = nhwc(grad), nhwc(input)
    g = activations(input, input.shape)
    channels = input.shape[1]
    tiles, options = row_tiles("bn_relu_backward", input)
    sums = vectors(input, tiles, 2, channels) if with_sums else None
    launch(
        bn_relu_backward_kernel,
        (tiles * cdiv(channels, options["BLOCK_C"]),),
        grad,
        input,
        affine,
        None if residual is None else nhwc(residual),
        g,
        sums,
        input.numel() // channels,
        channels,
        FROZEN=frozen,
        ACTIVATION=activation,
        **options,
    )
    return g, vectors(input, 2, 0) if sums is None else add_up(sums)
