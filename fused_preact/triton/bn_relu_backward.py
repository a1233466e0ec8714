"""bn_relu_backward: g = dh * act'(z),  S1 = sum g,  S2 = sum g * (u - mean) * rstd.

Reads dh and u [M, C], writes g [M, C]; 8 * M * C FLOPs. residual_grad finishes du from them.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import activations, cdiv, launch, nhwc, operator, row_tiles, vectors
from .reduce import add_up
from .tile import cast, normalise, slope, store_sums, tile_of


@triton.jit
def bn_relu_backward_kernel(
    grad,  # dh [M, C]
    input,  # u [M, C]
    affine,  # [4, C]
    g,  # [M, C]
    sums,  # [tiles, 2, C], or None
    M,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, m, c = tile_of(C, BLOCK_M, BLOCK_C)
    mask = (m < M)[:, None] & (c < C)[None, :]
    offsets = m[:, None] * C + c[None, :]
    dh = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(input + offsets, mask=mask, other=0.0)
    result = cast(dh * slope(normalise(u, affine, c, C), ACTIVATION), u.dtype)
    tl.store(g + offsets, result, mask=mask)
    if sums is not None:
        store_sums(result.to(tl.float32), u, affine, sums, tile, c, C)


@operator
def bn_relu_backward(
    grad: Tensor, input: Tensor, affine: Tensor, activation: str, with_sums: bool
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
        g,
        sums,
        input.numel() // channels,
        channels,
        ACTIVATION=activation,
        **options,
    )
    return g, vectors(input, 2, 0) if sums is None else add_up(sums)
